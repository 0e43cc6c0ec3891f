"""What each storage of the frozen weights costs in quality: perplexity of SmolLM2 on checks/data, before and after LoRA.

    python checks/quality.py [--work DIR] [--only NAME] [--timing]

SmolLM2-135M-Instruct is fetched as a Q4_1 GGUF file; decoded to f32 it is the base that all others are made from. Labels
are the answers of 58 chats; LoRA learns from 59 others. The differences to f32 are means over the same labels, with a
standard error over ten groups of rows. Prints a Markdown table; fails if NF4 is not closer to f32 than FP4 by more than
two standard errors. With --work, what is there already is not made again.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGOBE = os.environ.get("ENGOBE", str(ROOT / "target" / "release" / "engobe"))
DATA = ROOT / "checks" / "data"
GROUPS = 10

# name -> how the model is made ("gguf" as it was fetched, "f32" decoded, else flags of `engobe quantize`), and what else
# `train` is told
STORAGES = {
    "f32": ("f32", []),
    "Q4_1 GGUF in place": ("gguf", []),
    "int8": ("--to int8", []),
    "nf4": ("--to nf4", []),
    "nf4 + double": ("--to nf4 --double-quant", []),
    "fp4": ("--to fp4", []),
    "fp4 + double": ("--to fp4 --double-quant", []),
    "f32, kept in bf16": ("f32", ["--compute-dtype", "bf16"]),
    "nf4 + double, kept in bf16": ("--to nf4 --double-quant", ["--compute-dtype", "bf16"]),
    "f32, kept in f16": ("f32", ["--compute-dtype", "f16"]),
}
TIMED = ["f32", "Q4_1 GGUF in place", "int8", "nf4 + double", "fp4", "f32, kept in bf16", "f32, kept in f16"]
TRAINING = ["--max-steps", 40, "--max-seq-len", 512, "--learning-rate", 3e-4, "--warmup-steps", 4, "--seed", 1]


def engobe(*args):
    command = [ENGOBE, *map(str, args), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def groups_of_rows(work):
    """The held-out rows in ten files."""
    rows = (DATA / "answers-test.jsonl").read_text().splitlines(keepends=True)
    files = []
    for i in range(GROUPS):
        files.append(work / f"test{i}.jsonl")
        files[-1].write_text("".join(rows[i::GROUPS]))
    return files


def losses(model, groups, *flags):
    """Summed loss and labels of each group."""
    found = [engobe("eval", "--model", model, "--data", file, *flags) for file in groups]
    return [(f["loss"] * f["label_tokens"], f["label_tokens"]) for f in found]


def mean(sums):
    return sum(loss for loss, _ in sums) / sum(n for _, n in sums)


def difference(sums, base):
    """Mean difference a label, and its standard error: groups of nearly one size are independent samples."""
    apart = [(a - b) / n for (a, n), (b, _) in zip(sums, base)]
    centre = sum(apart) / len(apart)
    variance = sum((d - centre) ** 2 for d in apart) / (len(apart) - 1)
    return mean(sums) - mean(base), math.sqrt(variance / len(apart))


def size(path):
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(f.stat().st_size for f in files)


def made(name, work, source):
    """The model of this storage."""
    recipe, _ = STORAGES[name]
    if recipe == "gguf":
        return source
    base = work / "f32.gguf"
    if not base.exists():
        engobe("convert", "--to", "gguf", "--model", source, "--type", "f32", "--out", base)
    if recipe == "f32":
        return base
    out = work / recipe.replace("--to ", "").replace(" ", "")
    if not out.exists():
        engobe("quantize", "--model", base, "--out", out, *recipe.split())
    return out


def measured(name, work, source, groups):
    """All numbers of one storage, kept in the work directory."""
    kept = work / f"{name.replace(' ', '')}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model, flags = made(name, work, source), STORAGES[name][1]
    before = losses(model, groups)
    run = work / f"{name.replace(' ', '')}-run"
    trained = engobe("train", "--model", model, "--data", DATA / "answers-train.jsonl", "--out", run, *TRAINING, *flags)
    after = losses(model, groups, "--adapter", run)
    found = dict(bytes=size(model), before=before, after=after, peak=trained["peak_rss_bytes"])
    kept.write_text(json.dumps(found))
    return found


def table(found):
    base = found["f32"]
    print("| weights | on disk | perplexity | nats above f32 | after LoRA | nats above f32 | peak of training |")
    print("|---|---|---|---|---|---|---|")
    for name, f in found.items():
        cells = [name, f"{f['bytes'] / 1e6:.0f} MB"]
        for key in ("before", "after"):
            apart, error = difference(f[key], base[key])
            cells += [f"{math.exp(mean(f[key])):.3f}", "" if name == "f32" else f"{apart:+.4f} ± {error:.4f}"]
        print("| " + " | ".join([*cells, f"{f['peak'] / 1e6:.0f} MB"]) + " |", flush=True)


def verdict(found):
    """Fails unless NF4 lies closer to f32 than FP4, and that is no chance."""
    failed = 0
    for pair in (("nf4", "fp4"), ("nf4 + double", "fp4 + double")):
        if not all(name in found for name in pair):
            continue
        for key in ("before", "after"):
            nf4, fp4 = (found[name][key] for name in pair)
            closer = abs(mean(nf4) - mean(found["f32"][key])) < abs(mean(fp4) - mean(found["f32"][key]))
            apart, error = difference(fp4, nf4)
            sure = key == "after" or abs(apart) > 2 * error  # training moves both towards the same text
            failed += not (closer and sure)
            print(f"{'ok  ' if closer and sure else 'FAIL'} {pair[0]} {key} LoRA: {pair[1]} is {apart:+.4f} ± {error:.4f} nats behind it")
    sys.exit(f"{failed} failed" if failed else 0)


def timing(work, source):
    """Tokens a second of training on rows of 512 random tokens, each storage in turn, twice; the faster."""
    rng, rows = random.Random(1), work / "timing.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [rng.randrange(20, 49000) for _ in range(512)]}) + "\n" for _ in range(8)))
    rate = {}
    for _ in range(2):
        for name in TIMED:
            with tempfile.TemporaryDirectory() as out:
                run = ["--out", Path(out) / "run", "--max-steps", 6, "--max-seq-len", 512, "--allow", "eot-never-label"]
                engobe("train", "--model", made(name, work, source), "--data", rows, *run, *STORAGES[name][1])
                lines = map(json.loads, (Path(out) / "run" / "metrics.jsonl").read_text().splitlines())
                # the first step touches everything for the first time
                steps = [m for m in lines if m["step"] > 1]
                here = sum(m["tokens"] for m in steps) / sum(m["seconds"] for m in steps)
                rate[name] = max(rate.get(name, 0), here)
    print("| weights | tokens a second in training | of f32 |\n|---|---|---|")
    for name, value in rate.items():
        print(f"| {name} | {value:.0f} | {value / rate['f32']:.2f} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--timing", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        source = Path(subprocess.run([ENGOBE, "fetch", "smollm2-135m"], capture_output=True, text=True, check=True).stdout.split()[-1])
        if args.timing:
            return timing(work, source)
        groups = groups_of_rows(work)
        names = [name for name in STORAGES if name == "f32" or args.only in name]
        found = {name: measured(name, work, source, groups) for name in names}
        table(found)
        verdict(found)


main()
