"""LoRA with PyTorch and PEFT: the loop that a careful user writes. One JSON object on stdout at the end.

The fast choices are made here: fused AdamW, gradients set to None, no cache, padding only to the longest row of the
batch, one synchronisation a step (the loss, which every trainer logs). `--attention` picks transformers' attention;
bench/compare tries both and takes the faster.
"""

import time

STARTED = time.monotonic()  # the clock that bench/compare reads before it starts this process

import argparse
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

logging.disable_progress_bar()


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--dtype", default="float32", help="how weights are kept, and what is computed in")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--nf4", action="store_true", help="quantize linear layers by bitsandbytes: NF4, double quantization")
    parser.add_argument("--seq-cls", action="store_true", help="classes of texts: data is a TSV file with a header, text and label")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    return parser.parse_args()


def read(args):
    """Rows of token ids and labels: one for each token, or one for all of a text."""
    lines = open(args.data).read().splitlines()
    if not args.seq_cls:
        return [json.loads(line) for line in lines]
    texts, labels = zip(*(line.split("\t") for line in lines[1:]))
    ids = AutoTokenizer.from_pretrained(args.model)(list(texts), truncation=True, max_length=128)["input_ids"]
    return [{"input_ids": row, "labels": [int(label)]} for row, label in zip(ids, labels)]


def batches(rows, size):
    """Rows in their order, padded to the longest of each batch, round and round."""
    while True:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            longest = max(len(row["input_ids"]) for row in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            width = max(len(row["labels"]) for row in part)
            labels = torch.full((len(part), width), -100, dtype=torch.long)
            mask = torch.zeros(len(part), longest, dtype=torch.long)
            for i, row in enumerate(part):
                n = len(row["input_ids"])
                ids[i, :n] = torch.tensor(row["input_ids"])
                labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
                mask[i, :n] = 1
            # one label of a text
            yield {"input_ids": ids, "labels": labels[:, 0] if width == 1 else labels, "attention_mask": mask}


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    more = {}
    if args.nf4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        more = {"quantization_config": config, "device_map": "cpu"}
    texts = AutoConfig.from_pretrained(args.model).is_encoder_decoder
    kinds = {"SEQ_CLS": AutoModelForSequenceClassification, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM, "CAUSAL_LM": AutoModelForCausalLM}
    task = "SEQ_CLS" if args.seq_cls else "SEQ_2_SEQ_LM" if texts else "CAUSAL_LM"
    model = kinds[task].from_pretrained(args.model, dtype=dtype, attn_implementation=args.attention, **more)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type=task)
    model = get_peft_model(model, lora)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if args.compile else model
    feed = batches(read(args), args.batch_size)
    more = {} if args.seq_cls else {"use_cache": False}
    steps, first_step_at, first_step_done = [], time.monotonic(), None
    for _ in range(args.steps):
        start = time.perf_counter()
        batch = next(feed)
        loss = forward(**batch, **more).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds = time.perf_counter() - start
        first_step_done = first_step_done or time.monotonic()
        steps.append(
            {
                "seconds": seconds,
                "loss": value,
                "tokens": int(batch["attention_mask"].sum()),
                "padded_tokens": batch["input_ids"].numel(),
                # the first position of a decoder's row is nobody's target
                "label_tokens": int(((batch["labels"] if args.seq_cls or texts else batch["labels"][:, 1:]) != -100).sum()),
            }
        )
    print(
        json.dumps(
            {
                "steps": steps,
                "started_at": STARTED,
                "first_step_at": first_step_at,
                "first_step_done": first_step_done,
                "trainable_parameters": sum(p.numel() for p in trainable),
            }
        )
    )


main()
