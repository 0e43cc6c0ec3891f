"""What the checks share: models, rows, and the engobe binary."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import warnings

import torch

from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.disable_progress_bar()
logging.set_verbosity_error()
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
ENGOBE = os.environ.get("ENGOBE", str(ROOT / "target" / "release" / "engobe"))
# of all programs; more than the machine has free make llama.cpp crawl
THREADS = int(os.environ.get("THREADS", "2"))
torch.set_num_threads(THREADS)


def engobe(*args, ok=True, env=None):
    """Runs engobe with --json and returns the object; with ok=False, the finished process."""
    command = [ENGOBE, *map(str, args)]
    if ok:
        command += ["--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if not ok:
        return done
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


SIZES = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
)

# name -> what differs from SIZES
CONFIGS = {
    "plain": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "gqa_tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "mqa_theta": dict(num_key_value_heads=1, rope_theta=5e5, rms_norm_eps=1e-5),
    "head_dim_bias": dict(num_key_value_heads=2, head_dim=24, attention_bias=True, mlp_bias=True),
    "linear": dict(num_key_value_heads=2, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "dynamic": dict(num_key_value_heads=2, max_position_embeddings=16, rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    "llama3": dict(
        num_key_value_heads=2,
        rope_theta=5e5,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "yarn": dict(
        num_key_value_heads=2,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "longrope": dict(
        num_key_value_heads=2,
        original_max_position_embeddings=32,
        rope_scaling=dict(
            rope_type="longrope",
            short_factor=[1.0 + 0.05 * i for i in range(8)],
            long_factor=[1.0 + 0.5 * i for i in range(8)],
            factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}


def randomize(model, around=1.0):
    """Random weights that leave logits far from flat; those of norms lie around 1, or 0 where 1 is added to them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = any(part in name.lower() for part in ("norm", ".ln_")) and name.endswith("weight")
            scale = 0.5 if norm else 0.15
            p.copy_(torch.randn_like(p) * scale + (around if norm else 0.0))


def make_model(directory, seed, dtype=torch.float32, shard=None, **changes):
    """A random model whose logits are far from flat, saved; returns it in f32."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, **changes})
    model = LlamaForCausalLM(config).eval()
    randomize(model)
    model.to(dtype).save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def make_rows(path, seed, count, lengths=(5, 40), vocab=160, masked=0.4, answers=None):
    """Rows of random token ids whose first part is masked; with `answers`, the labels are other tokens, of such lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        n = rng.randint(*lengths)
        ids = [rng.randrange(vocab) for _ in range(n)]
        cut = int(n * masked * rng.random())
        labels = [-100] * cut + ids[cut:]
        if answers:
            labels = [rng.randrange(vocab) for _ in range(rng.randint(*answers))]
        rows.append({"input_ids": ids, "labels": labels})
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows


def targets(model, row):
    """Tokens that a row's loss is about: a decoder's next ones, all of an encoder-decoder's."""
    return row["labels"] if model.config.is_encoder_decoder else row["labels"][1:]


def label_loss(model, rows):
    """Summed cross entropy and number of labels, row by row without padding."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]], device=model.device), torch.tensor(targets(model, row))
        if model.config.is_encoder_decoder:
            # (given labels, PEFT's AdaLoRA wants a penalty that a loaded adapter lacks)
            shifted = torch.cat([torch.tensor([model.config.decoder_start_token_id]), labels[:-1]])
            logits = model(input_ids=ids, decoder_input_ids=shifted.to(ids.device)[None]).logits[0]
        else:
            # PEFT leaves the logits of a prompt in front
            logits = model(ids).logits[0, -len(row["input_ids"]) : -1]
        logits = (logits if logits.dtype == torch.float64 else logits.float()).cpu()
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total, count


def train(directory, data, out, *more, steps=20, rate=1e-3):
    """Steps of engobe's as train_peft takes them; what metrics.jsonl says of each."""
    engobe(
        "train", "--model", directory, "--data", data, "--out", out, "--no-shuffle", "--no-packing", "--max-steps", steps,
        "--batch-size", 2, "--learning-rate", rate, "--lr-scheduler", "linear", "--allow", "eot-never-label", *more,
    )
    return [json.loads(l) for l in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def greedy_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def llama_cpp(path, lora=None, flash_attention=True, exact_cache=False):
    """Greedy continuations by llama.cpp of a GGUF file: with either of its two ways to compute attention, and keys and
    values in f16 or, with `exact_cache`, in f32. Returns a function of a prompt (text or ids), a number of tokens and
    tokens that must not come, which gives token ids, how many nats each lies above the second best, and their
    log-probabilities."""
    import xllamacpp as xlc

    params = xlc.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.sampling.temp, params.sampling.top_k, params.sampling.seed = 0.0, 1, 1
    if not flash_attention:
        params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if exact_cache:
        params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    if lora:
        params.lora_adapters = [xlc.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xlc.Server(params)

    def complete(prompt, count, banned=()):
        body = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": 2, "cache_prompt": False}
        body["logit_bias"] = [[token, False] for token in banned]
        done = server.handle_completions(body)
        steps = done.get("completion_probabilities") or done["choices"][0]["logprobs"]["content"]
        margins = [s["top_logprobs"][0]["logprob"] - s["top_logprobs"][1]["logprob"] for s in steps]
        return [s["id"] for s in steps], margins, [s["logprob"] for s in steps]

    return complete


class Report:
    """Counts what held and what did not."""

    def __init__(self):
        self.failed = 0

    def __call__(self, name, value, limit):
        good = value <= limit
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {value:.3g} (limit {limit:g})", flush=True)

    def true(self, name, good, detail=""):
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name} {detail}", flush=True)

    def exit(self):
        sys.exit(f"{self.failed} failed" if self.failed else 0)
