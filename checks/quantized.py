"""Quantized bases beside transformers, PEFT and bitsandbytes; GGUF trained in place; memory while quantizing.

    python checks/quantized.py [--seed N] [--only exchange|blocks|types|curves|gguf|memory] [--device cuda]

With --device cuda, bitsandbytes and PEFT run on a GPU in the parts exchange, blocks and curves; engobe as always.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import bitsandbytes.functional as F
import gguf as ggml
import numpy as np
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from common import CONFIGS, Report, engobe, label_loss, make_model, make_rows, train
from parity import perturb, relative, train_peft
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

# rows of weights are whole blocks of 64: where blocks straddle rows, bitsandbytes' AVX-512 kernel errs
WIDE = dict(vocab_size=160, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4)


# where bitsandbytes and PEFT run
DEVICE = "cpu"


def four(kind, double=False):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32)


KINDS = {
    "nf4": (["--to", "nf4"], four("nf4")),
    "nf4+dq": (["--to", "nf4", "--double-quant"], four("nf4", True)),
    "fp4": (["--to", "fp4"], four("fp4")),
    "fp4+dq": (["--to", "fp4", "--double-quant"], four("fp4", True)),
    "int8": (["--to", "int8"], BitsAndBytesConfig(load_in_8bit=True)),
}


def load(directory, dtype=torch.float32, config=None):
    """In training mode: in evaluation, bitsandbytes repacks 4-bit weights on some CPUs, and computes in bf16."""
    more = {"quantization_config": config} if config else {}
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, device_map=DEVICE, **more).train()
    for p in model.parameters():
        if not isinstance(p, (Params4bit, Int8Params)):
            p.data = p.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32  # the files name the 16-bit type of the original
    return model


def tensors(directory):
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found.update({name: f.get_tensor(name) for name in f.keys()})
    return found


def factors(tensors, weight):
    """Double-quantized factors less their mean, and the largest of each one's block."""
    codes, most = tensors[f"{weight}.absmax"], tensors[f"{weight}.nested_absmax"]
    most = most.repeat_interleave(256)[: codes.numel()]
    return F.create_dynamic_map()[codes.int()] * most, most


def noise(tensors, weight):
    """What rounding and another order of summing do to the mean of a matrix' factors."""
    state = next(t for k, t in tensors.items() if k.startswith(f"{weight}.quant_state"))
    return 1e-6 * json.loads(bytes(state.numpy()))["nested_offset"]


def tied(w, ours, theirs, kind, block):
    """Where the codes of either side mean numbers that lie equally near to the weight: exact ties, the two zeros of FP4,
    blocks of zeros. 2^-22 of a block's largest weight is what rounding does to a quotient and to the middle of two levels."""
    n = w.numel()
    absmax = torch.nn.functional.pad(w.float().view(-1), (0, -n % block)).view(-1, block).abs().amax(1)
    absmax = absmax.repeat_interleave(block)[:n]
    levels = F.get_4bit_type(kind, device="cpu")
    apart = []
    for codes in (ours, theirs):
        nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[:n].long()
        apart.append((levels[nibbles] * absmax - w.float().view(-1)).abs())
    return ((apart[0] - apart[1]).abs() <= absmax * 2**-22).view(w.shape)


def same_numbers(report, name, ours, theirs, originals=None):
    """The files' tensors: codes and factors equal; double-quantized factors within one code.

    With `originals`, the weights that were quantized, codes may part at exact ties. Returns the tensors where they do.

    Next to zero, where the map's codes lie closer than it can tell, bitsandbytes' CPU library is further off than that:
    it first rounds to one of 65536 equal steps, which its CUDA kernels and engobe do not. There a factor may part by
    one such step, or by what another order of summing does to the mean. On a GPU, within one code is what is asked.
    """
    report.true(f"{name}: the same tensors", set(ours) == set(theirs), str(set(ours) ^ set(theirs))[:200])
    parted, moved, most_moved, codes, at_ties = 0.0, 0, 0, 0, set()
    for key in ours:
        a, b = ours[key], theirs[key]
        if "quant_state" in key:
            a, b = (json.loads(bytes(t.numpy())) for t in (a, b))
            mean = [s.pop("nested_offset", 0.0) for s in (a, b)]
            if a != b or relative(*mean) > 1e-6:
                report.true(f"{name}: {key}", False, f"{a} {b} {mean}")
        elif key.endswith(".absmax") and a.dtype == torch.uint8:
            differ = (a.int() - b.int()).abs()
            weight = key.removesuffix(".absmax")
            (mine, most), (other, _) = factors(ours, weight), factors(theirs, weight)
            step = 2 / 65536 * most + noise(ours, weight)
            if DEVICE != "cpu":
                # a factor that is the mean is 0 times 0, whatever its code
                differ = differ * ((mine - other).abs() > noise(ours, weight))
            parted = max([parted, *((mine - other).abs() / step)[differ > 1].tolist()])
            moved, codes = moved + int((differ > 0).sum()), codes + differ.numel()
            most_moved = max(most_moved, int(differ.max()))
        elif key.endswith("nested_absmax"):
            if not torch.allclose(a, b, rtol=1e-5, atol=noise(ours, key.removesuffix(".nested_absmax"))):
                report.true(f"{name}: {key}", False)
        elif originals and f"{key}.absmax" in ours:
            state = next(json.loads(bytes(t.numpy())) for k, t in ours.items() if k.startswith(f"{key}.quant_state"))
            if not torch.equal(a, b):
                at_ties.add(key)
            ties = tied(originals[key], a, b, state["quant_type"], state["blocksize"])
            if not ties.all():
                report.true(f"{name}: {key}", False, f"{(~ties).sum().item()} of {ties.numel()} codes differ, and not for a tie")
        elif not torch.equal(a, b):
            report.true(f"{name}: {key}", False, f"{(a != b).sum().item()} of {a.numel()} differ")
    if codes and DEVICE != "cpu":
        report(f"{name}: {moved} of {codes} codes of factors moved, at most by", most_moved, 1)
    elif codes:
        report(f"{name}: {moved} of {codes} codes of factors moved; those by more than one, in steps", parted, 1)
    return at_ties


def exchange(report, work, seed):
    """Point 1: what either side writes loads in the other, with equal numbers and losses."""
    bases = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    for i, (storage, dtype) in enumerate(bases.items()):
        kind = "gqa_tied" if i == 1 else ("head_dim_bias" if i == 2 else "plain")
        changes = {**CONFIGS[kind], "head_dim": 32}
        directory = work / f"base-{storage}"
        make_model(directory, seed + i, dtype, **{**WIDE, **changes})
        rows = make_rows(work / "rows.jsonl", seed + i, 10, (5, 60))
        for name, (flags, config) in KINDS.items():
            if name == "int8" and DEVICE != "cpu":
                continue  # there bitsandbytes multiplies in int8, with rounded activations
            label = f"{storage} {name}"
            theirs, ours = work / f"bnb-{storage}-{name}", work / f"ours-{storage}-{name}"
            load_as = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, device_map=DEVICE, quantization_config=config)
            load_as.save_pretrained(theirs)
            shard = 5.0 if i else 0.0001
            engobe("quantize", "--model", directory, "--out", ours, "--max-shard-size", shard, *flags)
            report.true(f"{label}: shards", len(list(ours.glob("*.safetensors"))) > 1 or i > 0)
            ties = same_numbers(report, label, tensors(ours), tensors(theirs), None if DEVICE == "cpu" else tensors(directory))
            with torch.no_grad():
                (a, count), (b, _) = (label_loss(load(d), rows) for d in (ours, theirs))
            a, b = a.item() / count, b.item() / count
            report(f"{label}: engobe's and bitsandbytes' files in transformers", relative(a, b), 1e-2 if ties else 1e-4 if "dq" in name else 1e-6)
            for who, where, expected in (("bitsandbytes'", theirs, b), ("engobe's", ours, a)):
                found = engobe("eval", "--model", where, "--data", work / "rows.jsonl")
                report(f"{label}: {who} files in engobe", relative(found["loss"], expected), 1e-5)


# sizes of a model whose matrices are whole blocks of 64, and of one whose blocks straddle rows and end short
EVEN = dict(hidden_size=128, intermediate_size=320, num_attention_heads=4, head_dim=32)
ODD = dict(hidden_size=36, intermediate_size=50, num_attention_heads=2, head_dim=18)
LINEAR = ("_proj.weight",)


def spoil(state, form, seed):
    """Draws every linear layer's matrix anew: normal, with outliers, or with blocks of zeros."""
    rng = torch.Generator().manual_seed(seed)
    for name, w in state.items():
        if name.endswith(LINEAR):
            x = torch.randn(w.numel(), generator=rng) * 0.15
            if form == "outliers":
                x[torch.randint(0, x.numel(), (x.numel() // 90,), generator=rng)] *= 50
            if form == "zeros":
                x.view(-1)[: x.numel() // 2] = 0
            state[name] = x.reshape(w.shape).to(w.dtype)


def definition(codes, state, shape):
    """A 4-bit tensor in f32, by what the numbers mean: bitsandbytes' AVX-512 kernel errs where blocks straddle rows."""
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    n = shape[0] * shape[1]
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[:n].long()
    return (state.code[nibbles] * absmax.repeat_interleave(state.blocksize)[:n]).reshape(shape)


def blocks(report, work, seed):
    """Point 1: blocks of every size, short last ones, types, outliers and zeros; bitsandbytes quantizes each tensor."""
    cases = [(kind, double, form) for kind in ("nf4", "fp4") for double in (False, True) for form in ("plain", "outliers", "zeros")]
    types = [torch.float32, torch.bfloat16, torch.float16]
    for i, block in enumerate((32, 64, 128, 256, 1024, 4096)):
        for k, (kind, double, form) in enumerate(cases):
            sizes, dtype = (EVEN, ODD)[(i + k) % 2], types[(i + k + k // 3) % 3]
            name = f"{kind}{'+dq' if double else ''}, blocks of {block}, {str(dtype)[6:]}, {form}, {'whole' if sizes is EVEN else 'uneven'}"
            base, ours, theirs, plain = (work / w for w in ("base", "ours", "theirs", "plain"))
            for directory in (base, ours, theirs, plain):
                shutil.rmtree(directory, ignore_errors=True)
            make_model(base, seed, dtype, **{**sizes, "num_hidden_layers": 1}, num_key_value_heads=sizes["num_attention_heads"], tie_word_embeddings=False)
            state = tensors(base)
            spoil(state, form, seed + 100 * i + k)
            save_file(state, base / "model.safetensors", metadata={"format": "pt"})
            shutil.copytree(base, theirs)
            shutil.copytree(base, plain)
            stored, meant = {}, {}
            for key, w in state.items():
                if not key.endswith(LINEAR):
                    stored[key], meant[key] = w, w.float()
                    continue
                codes, q = F.quantize_4bit(w.to(DEVICE), blocksize=block, quant_type=kind, compress_statistics=double)
                stored[key], meant[key] = codes.cpu(), definition(codes, q, w.shape).cpu()
                stored.update({f"{key}.{part}": t.cpu() for part, t in q.as_dict(packed=True).items()})
            save_file({k: t.contiguous() for k, t in stored.items()}, theirs / "model.safetensors", metadata={"format": "pt"})
            save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
            engobe("quantize", "--model", base, "--to", kind, *(["--double-quant"] if double else []), "--block-size", block, "--out", ours)
            found = tensors(ours)
            ties = same_numbers(report, name, found, stored, None if DEVICE == "cpu" else state)
            meant = {key: w for key, w in meant.items() if key not in ties}
            shutil.copy(ours / "config.json", theirs / "config.json")
            loads_here(report, name, work, seed, theirs, plain)
            loads_there(report, name, found, meant, block)


def loads_here(report, name, work, seed, theirs, plain):
    """bitsandbytes' tensors in engobe beside their meaning in f32."""
    rows = work / "blocks.jsonl"
    make_rows(rows, seed, 4, (20, 40))
    a, b = (engobe("eval", "--model", d, "--data", rows)["loss"] for d in (theirs, plain))
    report(f"{name}: bitsandbytes' tensors in engobe", relative(a, b), 1e-6)


def loads_there(report, name, found, meant, block):
    """engobe's tensors in bitsandbytes beside their meaning: half a step of the map where factors are quantized twice."""
    worst, limit = 0.0, 1e-6
    for key, expected in meant.items():
        if not key.endswith(LINEAR):
            continue
        parts = {k: t for k, t in found.items() if k.startswith(f"{key}.")}
        loaded = Params4bit.from_prequantized(found[key], parts, requires_grad=False, device=DEVICE)
        q = loaded.quant_state
        own = definition(loaded.data, q, expected.shape).cpu()
        if expected.shape[1] % block == 0:
            whole = F.dequantize_4bit(loaded.data, q).float().cpu()
            report.true(f"{name}: {key} in bitsandbytes", torch.allclose(whole, own.to(q.dtype).float(), rtol=1e-6, atol=0))
        if q.nested:
            # a code to the side is at most 1/64 of the largest deviation from the mean
            limit = 1 / 64
        worst = max(worst, ((own - expected).abs().max() / expected.abs().max()).item())
    report(f"{name}: engobe's tensors in bitsandbytes", worst, limit)


# GGUF's quantized types: where a block has its f16 scales, and the largest number that a scale meets
TYPES = {
    "Q4_0": ([0], 8), "Q4_1": ([0, 2], 15), "Q5_0": ([0], 16), "Q5_1": ([0, 2], 31), "Q8_0": ([0], 128), "Q2_K": ([80, 82], 45),
    "Q3_K": ([108], 128), "Q4_K": ([0, 2], 945), "Q5_K": ([0, 2], 1953), "Q6_K": ([208], 4064),
}


def write_gguf(path, name, seed):
    """A llama of random blocks: every byte of them but the scales is noise."""
    rng, kind = np.random.default_rng(seed), ggml.GGMLQuantizationType[name]
    d, ffn, kv, vocab = 256, 512, 128, 160
    file = ggml.GGUFWriter(path, "llama")
    for add, value in (
        (file.add_context_length, 128), (file.add_embedding_length, d), (file.add_block_count, 2), (file.add_feed_forward_length, ffn),
        (file.add_head_count, 4), (file.add_head_count_kv, 2), (file.add_layer_norm_rms_eps, 1e-5), (file.add_vocab_size, vocab),
        (file.add_rope_dimension_count, 64), (file.add_tokenizer_model, "no_vocab"),
    ):
        add(value)
    vector = lambda n: (1 + 0.3 * rng.normal(size=n)).astype(np.float32)
    file.add_tensor("token_embd.weight", (0.1 * rng.normal(size=(vocab, d))).astype(np.float32))
    file.add_tensor("output_norm.weight", vector(d))
    length, size = ggml.GGML_QUANT_SIZES[kind]
    places, largest = TYPES[name]
    for i in range(2):
        for part, rows, cols in (("attn_q", d, d), ("attn_k", kv, d), ("attn_v", kv, d), ("attn_output", d, d), ("ffn_gate", ffn, d), ("ffn_up", ffn, d), ("ffn_down", d, ffn)):
            blocks = rng.integers(0, 256, (rows * cols // length, size), dtype=np.uint8)
            for at in places:
                scales = (rng.normal(size=len(blocks)) * 0.2 / largest).astype(np.float16)
                blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
            file.add_tensor(f"blk.{i}.{part}.weight", blocks.reshape(rows, -1), raw_dtype=kind)
        for part in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{i}.{part}.weight", vector(d))
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
        write()


def types(report, work, seed):
    """Points 2 and 3: random blocks of every GGUF type mean what the gguf package says, and are trained over in place."""
    rows = work / "types.jsonl"
    make_rows(rows, seed, 6, (20, 60))
    for k, name in enumerate(TYPES):
        path, plain = work / f"{name}.gguf", work / f"{name}-f32.gguf"
        write_gguf(path, name, seed + k)
        engobe("convert", "--to", "gguf", "--model", path, "--type", "f32", "--out", plain)
        ours = {t.name: t.data for t in ggml.GGUFReader(plain).tensors}
        differ = 0
        for t in ggml.GGUFReader(path).tensors:
            expected = ggml.dequantize(t.data, t.tensor_type).astype(np.float32)
            differ += int((expected.view(np.uint32).ravel() != ours[t.name].view(np.uint32).ravel()).sum())
        report(f"{name}: elements that are not the gguf package's bit for bit", differ, 0)
        losses = []
        for base, dtype in ((path, "stored"), (path, "f32"), (plain, "stored")):
            out = work / f"{name}-{len(losses)}"
            engobe("train", "--model", base, "--dtype", dtype, "--data", rows, "--out", out, "--max-steps", 4, "--learning-rate", 1e-3, "--max-seq-len", 64)
            shutil.rmtree(out / "checkpoints")
            losses.append([json.loads(l)["loss"] for l in (out / "metrics.jsonl").read_text().splitlines()])
        report.true(f"{name}: 4 steps that change something", len(losses[0]) == 4 and len(set(losses[0])) == 4, str(losses[0]))
        # blocks of 256 are cut into other slices than floats are, so sums round in another order
        report(f"{name}: losses in place beside f32 copies", max(relative(a, b) for other in losses[1:] for a, b in zip(losses[0], other)), 1e-4)


LORAS = {
    "q, v": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all-linear": dict(r=8, lora_alpha=16, target_modules="all-linear"),
    "DoRA": dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
}


def curves(report, work, seed):
    """Point 3: twenty steps over NF4 with double quantization, quantized by each side itself."""
    for i, (name, lora) in enumerate(LORAS.items()):
        directory = work / f"curve-{i}"
        make_model(directory, seed + 70 + i, **{**WIDE, **CONFIGS["gqa_tied" if i else "plain"]})
        data = work / f"curve-{i}.jsonl"
        rows = make_rows(data, seed + i, 30, (4, 40))
        theirs = get_peft_model(load(directory, config=four("nf4", True)), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora))
        perturb(theirs, seed + i)
        start, out = work / f"curve-start-{i}", work / f"curve-out-{i}"
        theirs.save_pretrained(start)
        mine = train(directory, data, out, "--method", "qlora", "--init-adapter", start)
        curve = train_peft(theirs.train(), rows, 20, 2, 1)
        report(f"NF4+dq, {name}: losses", max(relative(m["loss"], c[0]) for m, c in zip(mine, curve)), 2e-3)
        report(f"NF4+dq, {name}: norms", max(relative(m["grad_norm"], c[1]) for m, c in zip(mine, curve)), 1e-2)


def gguf(report, work, seed):
    """Point 3: over SmolLM2's 4-bit blocks as they lie, and over their f32 copies."""
    model = engobe("fetch", "smollm2-135m")["path"]
    make_rows(work / "smol.jsonl", seed, 12, (100, 250), vocab=40000)
    curves = []
    for dtype in ("stored", "f32"):
        out = work / f"smol-{dtype}"
        done = engobe(
            "train", "--model", model, "--dtype", dtype, "--data", work / "smol.jsonl", "--out", out, "--max-steps", 12,
            "--learning-rate", 1e-3, "--max-seq-len", 256, "--allow", "eot-never-label",
        )
        print(f"     {dtype}: {done['tokens_per_second']:.0f} tokens/s, peak {done['peak_rss_bytes'] / 1e6:.0f} MB")
        curves.append([json.loads(l) for l in (out / "metrics.jsonl").read_text().splitlines()])
    report.true("12 steps", len(curves[0]) == len(curves[1]) == 12)
    for key in ("loss", "grad_norm"):
        report(f"Q4_1 in place and as f32: {key}", max(relative(a[key], b[key]) for a, b in zip(*curves)), 1e-4)


def memory(report, work, seed):
    """Peak memory of quantizing: the quantized size and one tensor, beside what any run takes."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=2000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16)
    directory = work / "large"
    make_model(directory, seed, torch.bfloat16, **sizes, num_key_value_heads=4, tie_word_embeddings=True)
    source = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    tensor = sizes["hidden_size"] * sizes["intermediate_size"] * 2
    rows = make_rows(work / "few.jsonl", seed, 1, (4, 5), vocab=2000)
    assert rows
    nothing = engobe("eval", "--model", make_tiny(work), "--data", work / "tiny.jsonl")["peak_rss_bytes"]
    print(f"     source {source / 1e6:.0f} MB, largest tensor {tensor / 1e6:.0f} MB, a run over nothing {nothing / 1e6:.0f} MB")
    for name, (flags, _) in KINDS.items():
        out = work / f"large-{name}"
        done = engobe("quantize", "--model", directory, "--out", out, *flags)
        size = done["bytes_after"]
        report(f"quantize to {name}: peak less a run over nothing, in tensors", (done["peak_rss_bytes"] - nothing) / tensor, 1.0)
        flags = ["--quantize", *flags[1:]]
        found = engobe("eval", "--model", directory, "--data", work / "few.jsonl", *flags)
        over = found["peak_rss_bytes"] - nothing - size
        print(f"     {name}: {size / 1e6:.0f} MB quantized; eval over it peaks at {found['peak_rss_bytes'] / 1e6:.0f} MB")
        report(f"quantized as {name} while read: peak less the quantized size, in tensors", over / tensor, 1.0)


def make_tiny(work):
    make_model(work / "tiny", 1, **CONFIGS["plain"])
    make_rows(work / "tiny.jsonl", 1, 1, (4, 5))
    return work / "tiny"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    DEVICE, report = args.device, Report()
    for part in (exchange, blocks, types, curves, gguf, memory):
        if args.only in part.__name__:
            with tempfile.TemporaryDirectory() as work:
                part(report, Path(work), args.seed)
    report.exit()
