"""QLoRA steps over a model of 13 billion parameters, on a machine with 16 GB.

    python bench/large.py [--steps 2] [--tokens 512] [--dir SCRATCH] [--keep]

Writes a model of LLaMA-2-13B's shape with random weights straight into NF4 with double quantization, in bitsandbytes'
safetensors format, tensor by tensor (7.2 GB on disk, removed afterwards). Then asks `engobe plan`, trains a few steps with
checkpointing, and shows what a limit of 6 GB gets. Needs numpy and, for the binary, `cargo build --release`.

Fails if the peak is 12 GB or more, if the prediction is more than 10 % off, or if the limit does not refuse.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ENGOBE = os.environ.get("ENGOBE", str(ROOT / "target" / "release" / "engobe"))

HIDDEN, MLP, LAYERS, HEADS, VOCAB = 5120, 13824, 40, 40, 32000
BLOCK, NESTED = 64, 256
SHARD_LAYERS = 8

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype="<f4")


def dynamic_map():
    """bitsandbytes' create_dynamic_map(signed=True)."""
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += means.tolist() + (-means).tolist()
    return np.sort(np.array(numbers, dtype="<f4"))


def floats(rng, name, shape):
    """A tensor in f16."""
    values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape, dtype=np.float32) * 0.02
    yield name, "F16", list(shape), lambda: values.astype("<f2").tobytes()


def quantized(rng, name, rows, cols):
    """A matrix as bitsandbytes saves it: random codes, factors of about 0.03."""
    n = rows * cols
    blocks = n // BLOCK
    state = dict(quant_type="nf4", blocksize=BLOCK, dtype="float16", shape=[rows, cols], nested_blocksize=NESTED,
                 nested_dtype="float32", nested_offset=0.03)
    state = json.dumps(state).encode()
    yield name, "U8", [n // 2, 1], lambda: rng.bytes(n // 2)
    yield f"{name}.absmax", "U8", [blocks], lambda: rng.bytes(blocks)
    yield f"{name}.nested_absmax", "F32", [-(-blocks // NESTED)], lambda: np.full(-(-blocks // NESTED), 0.005, "<f4").tobytes()
    yield f"{name}.nested_quant_map", "F32", [256], lambda: dynamic_map().tobytes()
    yield f"{name}.quant_map", "F32", [16], NF4.tobytes
    yield f"{name}.quant_state.bitsandbytes__nf4", "U8", [len(state)], lambda: state


def layer(rng, i):
    p = f"model.layers.{i}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from quantized(rng, f"{p}.self_attn.{name}.weight", HIDDEN, HIDDEN)
    for name in ("gate_proj", "up_proj"):
        yield from quantized(rng, f"{p}.mlp.{name}.weight", MLP, HIDDEN)
    yield from quantized(rng, f"{p}.mlp.down_proj.weight", HIDDEN, MLP)
    yield from floats(rng, f"{p}.input_layernorm.weight", (HIDDEN,))
    yield from floats(rng, f"{p}.post_attention_layernorm.weight", (HIDDEN,))


def ends(rng):
    yield from floats(rng, "model.embed_tokens.weight", (VOCAB, HIDDEN))
    yield from floats(rng, "model.norm.weight", (HIDDEN,))
    yield from floats(rng, "lm_head.weight", (VOCAB, HIDDEN))


def write_shard(path, tensors):
    """One safetensors file; each tensor is made when it is written. Returns the names."""
    width = dict(U8=1, F16=2, F32=4)
    header, at = {}, 0
    for name, dtype, shape, _ in tensors:
        size = int(np.prod(shape)) * width[dtype]
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + size])
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, _, data in tensors:
            file.write(data())
    return list(header)


def write_model(directory):
    rng = np.random.default_rng(0)
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", hidden_size=HIDDEN,
                  intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                  vocab_size=VOCAB, rms_norm_eps=1e-5, max_position_embeddings=4096, rope_theta=10000.0,
                  tie_word_embeddings=False, torch_dtype="float16",
                  quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False,
                                           bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                           bnb_4bit_compute_dtype="float32", bnb_4bit_quant_storage="uint8"))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    groups = [range(i, min(i + SHARD_LAYERS, LAYERS)) for i in range(0, LAYERS, SHARD_LAYERS)] + [None]
    index = {}
    for k, group in enumerate(groups, 1):
        name = f"model-{k:05}-of-{len(groups):05}.safetensors"
        tensors = list(ends(rng)) if group is None else [t for i in group for t in layer(rng, i)]
        index |= dict.fromkeys(write_shard(directory / name, tensors), name)
    total = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(dict(metadata=dict(total_size=total), weight_map=index)))
    return total


def engobe(*args, check=True):
    done = subprocess.run([ENGOBE, *map(str, args)], capture_output=True, text=True)
    if check and done.returncode != 0:
        sys.exit(f"engobe {args[0]}: {done.stderr}")
    return done


def last_object(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dir", type=Path, help="where to write the model [a temporary directory]")
    parser.add_argument("--keep", action="store_true", help="keep the model; one that is there is used again")
    args = parser.parse_args()
    scratch = args.dir or Path(tempfile.mkdtemp(prefix="engobe-large-"))
    model = scratch / "llama-13b-nf4"
    failures = []
    try:
        if not (model / "model.safetensors.index.json").exists():
            model.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            total = write_model(model)
            print(f"wrote {total / 1e9:.2f} GB in {time.monotonic() - started:.0f} s", flush=True)
        rng = np.random.default_rng(1)
        rows = scratch / "rows.jsonl"
        rows.write_text("".join(json.dumps({"input_ids": rng.integers(5, VOCAB, args.tokens).tolist()}) + "\n"
                                for _ in range(args.steps)))
        settings = ["--model", model, "--max-seq-len", args.tokens, "--activation-checkpointing"]
        planned = engobe("plan", *settings, "--json", "--quiet")
        print(planned.stdout.rsplit("\n", 2)[0], flush=True)
        peak = last_object(planned)["peak_bytes"]

        run = ["--data", rows, "--allow", "eot-never-label", "--max-steps", args.steps]
        limited = engobe("train", *settings, *run, "--out", scratch / "limited", "--memory-limit", "6GB", check=False)
        print(f"\nwith --memory-limit 6GB: exit {limited.returncode}\n{limited.stderr.strip()}", flush=True)
        if limited.returncode == 0 or "memory_limit" not in limited.stderr:
            failures.append("6 GB were not refused")

        trained = last_object(engobe("train", *settings, *run, "--out", scratch / "run", "--json", "--quiet"))
        lines = (scratch / "run" / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines]
        measured = trained["peak_rss_bytes"]
        print(f"\nstart-up {trained['startup_seconds']:.1f} s; steps of {args.tokens} tokens: "
              + ", ".join(f"{s:.1f} s" for s in seconds) + f"; loss {trained['final_loss']:.3f}")
        print(f"peak RSS {measured / 1e9:.2f} GB, predicted {peak / 1e9:.2f} GB ({100 * (peak / measured - 1):+.1f} %)")
        if measured >= 12e9:
            failures.append("the peak is 12 GB or more")
        if abs(peak / measured - 1) > 0.10:
            failures.append("the prediction is more than 10 % off")
    finally:
        if not args.keep:
            shutil.rmtree(model, ignore_errors=True)
        for name in ("run", "limited"):
            shutil.rmtree(scratch / name, ignore_errors=True)
    sys.exit("; ".join(failures) if failures else 0)


main()
