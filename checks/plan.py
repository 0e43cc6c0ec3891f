"""`engobe plan` beside the peak that `engobe train` measures.

    .venv/bin/python checks/plan.py [--only NAME] [--markdown]

Synthetic models are written with random weights; SmolLM2 is fetched. Rows fill max_seq_len, and every token of a decoder's is
a label. Each run does three steps. Fails if a prediction is more than 10 % off.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ENGOBE = os.environ.get("ENGOBE", str(ROOT / "target" / "release" / "engobe"))
LIMIT = 0.10

SMOL = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
WIDE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False)

# name, model (sizes and stored type, or None for SmolLM2's GGUF), tokens in a row, other flags
CASES = [
    ("SmolLM2 Q4_1", None, 512, []),
    ("SmolLM2 Q4_1", None, 512, ["--activation-checkpointing"]),
    ("SmolLM2 Q4_1, batch 4", None, 256, ["--batch-size", "4", "--activation-checkpointing"]),
    ("SmolLM2 Q4_1, 8-bit AdamW, r 64", None, 256, ["--optimizer", "adamw_8bit", "--r", "64", "--activation-checkpointing"]),
    ("SmolLM2 Q4_1, paged AdamW, r 64", None, 256, ["--optimizer", "paged_adamw", "--r", "64", "--activation-checkpointing"]),
    ("SmolLM2 Q4_1, accumulation 2", None, 128, ["--gradient-accumulation", "2", "--r", "64"]),
    ("SmolLM2 Q4_1, kept in bf16", None, 512, ["--compute-dtype", "bf16"]),
    ("SmolLM2 Q4_1, batch 4, kept in bf16", None, 256, ["--compute-dtype", "bf16", "--batch-size", "4", "--activation-checkpointing"]),
    ("135M f32", (SMOL, "F32"), 512, []),
    ("135M f32, kept in bf16", (SMOL, "F32"), 512, ["--compute-dtype", "bf16"]),
    ("135M bf16", (SMOL, "BF16"), 1024, ["--activation-checkpointing"]),
    ("135M bf16, dropout, q and v", (SMOL, "BF16"), 512, ["--lora-dropout", "0.1", "--target-modules", "q_proj,v_proj"]),
    ("135M bf16 widened to f32", (SMOL, "BF16"), 256, ["--dtype", "f32"]),
    ("400M bf16", (WIDE, "BF16"), 512, []),
    ("400M bf16, kept in f16", (WIDE, "BF16"), 512, ["--compute-dtype", "f16"]),
    ("400M bf16, SGD", (WIDE, "BF16"), 2048, ["--activation-checkpointing", "--optimizer", "sgd"]),
    ("400M bf16 in NF4", (WIDE, "BF16"), 512, ["--quantize", "nf4", "--double-quant", "--activation-checkpointing"]),
    ("135M f32 in int8", (SMOL, "F32"), 256, ["--quantize", "int8"]),
    ("SmolLM2 Q4_1, prompt of 20", None, 512, ["--method", "prompt-tuning"]),
    ("SmolLM2 Q4_1, prompt of 100", None, 256, ["--method", "prompt-tuning", "--num-virtual-tokens", "100"]),
    ("SmolLM2 Q4_1, P-tuning", None, 512, ["--method", "p-tuning"]),
    ("SmolLM2 Q4_1, P-tuning with an LSTM", None, 256, ["--method", "p-tuning", "--set", "encoder_reparameterization_type=LSTM", "--activation-checkpointing"]),
    ("SmolLM2 Q4_1, prefix of 20", None, 512, ["--method", "prefix-tuning"]),
    ("SmolLM2 Q4_1, prefix of 100", None, 256, ["--method", "prefix-tuning", "--num-virtual-tokens", "100"]),
    ("SmolLM2 Q4_1, projected prefix", None, 256, ["--method", "prefix-tuning", "--prefix-projection", "--activation-checkpointing"]),
    ("SmolLM2 Q4_1, Pfeiffer", None, 512, ["--method", "bottleneck"]),
    ("SmolLM2 Q4_1, Houlsby", None, 512, ["--method", "bottleneck", "--architecture", "houlsby", "--reduction-factor", "4"]),
    ("SmolLM2 Q4_1, parallel, kept in bf16", None, 512, ["--method", "bottleneck", "--architecture", "parallel", "--compute-dtype", "bf16"]),
    ("SmolLM2 Q4_1, Houlsby of the upper half", None, 512, ["--method", "bottleneck", "--architecture", "houlsby", "--set", f"leave_out={list(range(15))}"]),
    ("SmolLM2 Q4_1, DoRA", None, 512, ["--use-dora"]),
    ("SmolLM2 Q4_1, IA3", None, 512, ["--method", "ia3"]),
    ("SmolLM2 Q4_1, VeRA", None, 512, ["--method", "vera"]),
    ("SmolLM2 Q4_1, MiSS", None, 512, ["--method", "miss"]),
    ("SmolLM2 Q4_1, AdaLoRA", None, 512, ["--method", "adalora"]),
    ("SmolLM2 Q4_1, LN tuning", None, 512, ["--method", "ln-tuning"]),
    ("SmolLM2 Q4_1, tokens", None, 512, ["--method", "trainable-tokens", "--token-indices", "5,6,7"]),
    ("135M f32, v and down in full", (SMOL, "F32"), 256, ["--method", "full", "--target-modules", "v_proj,down_proj"]),
    ("400M bf16, prefix of 50", (WIDE, "BF16"), 512, ["--method", "prefix-tuning", "--num-virtual-tokens", "50"]),
    ("400M bf16, Pfeiffer", (WIDE, "BF16"), 512, ["--method", "bottleneck"]),
]

BERT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=30522)
DEBERTA = {**BERT, **dict(vocab_size=60000, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
                          pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0)}
T5_SMALL = dict(vocab_size=32128)
T5_BASE = dict(vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
BERT_TOKENIZER, T5_TOKENIZER, BPE = "bert", "t5", "roberta"
# name, transformers' classes and sizes, the tokenizer of the tests that its rows are read with, tokens in a row, other flags
TASKS = [
    ("BERT-base, two classes", ("Bert", BERT), BERT_TOKENIZER, 128, ["--batch-size", "8"]),
    ("BERT-base, two classes", ("Bert", BERT), BERT_TOKENIZER, 512, ["--batch-size", "2", "--activation-checkpointing"]),
    ("BERT-base, prefix of 20", ("Bert", BERT), BERT_TOKENIZER, 128, ["--batch-size", "8", "--method", "prefix-tuning"]),
    ("BERT-base, Houlsby", ("Bert", BERT), BERT_TOKENIZER, 128, ["--batch-size", "8", "--method", "bottleneck", "--architecture", "houlsby"]),
    ("ModernBERT-base, two classes", ("ModernBert", dict(hidden_size=768, num_hidden_layers=22, num_attention_heads=12, intermediate_size=1152, vocab_size=50368)), BERT_TOKENIZER, 256, ["--batch-size", "4"]),
    ("DeBERTa-v3-base, two classes", ("DebertaV2", DEBERTA), "deberta", 128, ["--batch-size", "8"]),
    ("DeBERTa-v3-base, two classes", ("DebertaV2", DEBERTA), "deberta", 512, ["--batch-size", "1"]),
    ("GPT-2, two classes", ("GPT2", dict(vocab_size=50257)), BPE, 256, ["--batch-size", "4", "--task", "seq-cls"]),
    ("SmolLM2's shape, two classes", ("Llama", dict(**SMOL, max_position_embeddings=2048, pad_token_id=1)), BPE, 256, ["--batch-size", "2", "--task", "seq-cls"]),
    ("OLMo 2's blocks in that shape", ("Olmo2", dict(**SMOL, max_position_embeddings=2048, pad_token_id=1)), BPE, 256, ["--batch-size", "2", "--task", "seq-cls"]),
    ("StarCoder 2's blocks in that shape", ("Starcoder2", dict(**SMOL, max_position_embeddings=2048, pad_token_id=1)), BPE, 256, ["--batch-size", "2", "--task", "seq-cls"]),
    ("Phi's blocks in that shape", ("Phi", dict(**SMOL, max_position_embeddings=2048, pad_token_id=1)), BPE, 256, ["--batch-size", "2", "--task", "seq-cls"]),
    ("GPT-NeoX's blocks in that shape", ("GPTNeoX", dict(**{k: v for k, v in SMOL.items() if k != "num_key_value_heads"}, max_position_embeddings=2048, pad_token_id=1)), BPE, 256, ["--batch-size", "2", "--task", "seq-cls"]),
    ("T5-small", ("T5", T5_SMALL), T5_TOKENIZER, 128, ["--batch-size", "8"]),
    ("T5-small", ("T5", T5_SMALL), T5_TOKENIZER, 256, ["--batch-size", "8", "--activation-checkpointing"]),
    ("T5-small, all linear layers", ("T5", T5_SMALL), T5_TOKENIZER, 256, ["--batch-size", "4", "--r", "16"]),
    ("T5 v1.1 base", ("T5", T5_BASE), T5_TOKENIZER, 128, ["--batch-size", "4"]),
    ("T5 v1.1 base, prompt of 20", ("T5", T5_BASE), T5_TOKENIZER, 256, ["--batch-size", "2", "--method", "prompt-tuning"]),
    ("T5 v1.1 base, in NF4", ("T5", T5_BASE), T5_TOKENIZER, 256, ["--batch-size", "2", "--quantize", "nf4", "--double-quant", "--activation-checkpointing"]),
]


def write_task_model(directory, kind, sizes, tokenizer):
    """A random model with one of the tests' tokenizers beside it."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes)
    seq2seq = kind == "T5"
    model = getattr(transformers, kind + ("ForConditionalGeneration" if seq2seq else "ForSequenceClassification"))(config)
    model.save_pretrained(directory)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(ROOT / "crates/data/tests/golden/tasks" / tokenizer / name, directory / name)


def write_task_rows(path, kind, length, count):
    """Texts of more tokens than a row takes."""
    text = "funny mat " * length
    row = {"source": text, "target": text} if kind == "T5" else {"text": text}
    rows = [row if kind == "T5" else {**row, "label": i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shapes(c):
    d, f = c["hidden_size"], c["intermediate_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    yield "model.embed_tokens.weight", (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        for name, shape in [("self_attn.q_proj", (d, d)), ("self_attn.k_proj", (kv, d)), ("self_attn.v_proj", (kv, d)),
                            ("self_attn.o_proj", (d, d)), ("mlp.gate_proj", (f, d)), ("mlp.up_proj", (f, d)),
                            ("mlp.down_proj", (d, f)), ("input_layernorm", (d,)), ("post_attention_layernorm", (d,))]:
            yield f"{p}.{name}.weight", shape
    yield "model.norm.weight", (d,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], d)


def write_model(directory, sizes, dtype):
    """A random model, tensor by tensor."""
    directory.mkdir()
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", rms_norm_eps=1e-5,
                  max_position_embeddings=4096, rope_theta=10000.0, torch_dtype="float32" if dtype == "F32" else "bfloat16",
                  **sizes)
    (directory / "config.json").write_text(json.dumps(config))
    header, at, width = {}, 0, 4 if dtype == "F32" else 2
    for name, shape in shapes(sizes):
        size = int(np.prod(shape)) * width
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + size])
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape in shapes(sizes):
            scale = np.float32(0.02)
            values = rng.standard_normal(shape, dtype=np.float32) * scale + np.float32(len(shape) == 1)
            file.write(values.tobytes() if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def write_rows(path, vocab, length, count):
    rng = np.random.default_rng(1)
    rows = [json.dumps({"input_ids": rng.integers(5, vocab, length).tolist()}) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n")


def engobe(*args):
    done = subprocess.run([ENGOBE, *map(str, args), "--json", "--quiet"], capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip()
    return json.loads(done.stdout.strip().splitlines()[-1]), None


def measure(report, name, path, rows, out, length, flags, allow):
    """Plans a run and does it; True if the prediction holds."""
    batch = int(flags[flags.index("--batch-size") + 1]) if "--batch-size" in flags else 1
    settings = ["--model", path, "--max-seq-len", length, "--data", rows, *flags]
    planned, error = engobe("plan", *settings)
    trained, train_error = engobe("train", *settings, "--out", out, "--max-steps", 3, "--allow", allow) if not error else (None, None)
    if error or train_error:
        print(f"FAIL {name}: {error or train_error}", flush=True)
        return False
    peak, measured = planned["peak_bytes"], trained["peak_rss_bytes"]
    off = peak / measured - 1
    good = abs(off) <= LIMIT and planned["trainable_parameters"] == trained["trainable_parameters"]
    what = name + (", checkpointing" if "--activation-checkpointing" in flags else "")
    if report == "markdown":
        print(f"| {what} | {batch} x {length} | {peak / 1e6:.0f} MB | {measured / 1e6:.0f} MB | {100 * off:+.1f} % |", flush=True)
    else:
        parts = " ".join(f"{k[:-6]} {planned[k] / 1e6:.0f}" for k in planned if k.endswith("_bytes") and k != "peak_bytes")
        print(f"{'ok  ' if good else 'FAIL'} {what}, {batch} x {length}: predicted {peak / 1e6:.0f} MB, "
              f"measured {measured / 1e6:.0f} MB ({100 * off:+.1f} %)\n       {parts}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    report, failed = "markdown" if args.markdown else "text", 0
    if args.markdown:
        print("| model and settings | tokens | predicted | measured | off |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for i, (name, model, length, flags) in enumerate(CASES):
            if args.only not in name:
                continue
            path, vocab = "smollm2-135m", 49152
            if model:
                path, vocab = scratch / f"{model[0]['hidden_size']}-{model[1]}", model[0]["vocab_size"]
                if not path.exists():
                    write_model(path, *model)
            batch = int(flags[flags.index("--batch-size") + 1]) if "--batch-size" in flags else 1
            rows = scratch / f"rows{i}.jsonl"
            write_rows(rows, vocab, length, 8 * batch)
            failed += not measure(report, name, path, rows, scratch / f"run{i}", length, flags, "eot-never-label")
        for i, (name, (kind, sizes), tokenizer, length, flags) in enumerate(TASKS):
            if args.only not in name:
                continue
            path, rows = scratch / f"task{i}", scratch / f"task{i}.jsonl"
            write_task_model(path, kind, sizes, tokenizer)
            write_task_rows(rows, kind, length, 32)
            failed += not measure(report, name, path, rows, scratch / f"task-run{i}", length, flags, "conflicting-labels,duplicate-rows,truncated-rows,eot-never-label")
            shutil.rmtree(path)
    sys.exit(f"{failed} failed" if failed else 0)


main()
