"""all-MiniLM-L6-v2 (or another encoder) on SST-2 by several methods: the table of docs/tasks.md.

    python checks/sst2.py --model ./all-MiniLM-L6-v2 --data ./sst2 [--seed 42 7] [--only lora]

The directory holds train.tsv, dev.tsv and test.tsv: text, a tab, and the label. Each method goes over the training rows
once; seconds are of the whole `engobe train`, loading and validation included.
"""

import argparse
import tempfile
import time
from pathlib import Path

from common import engobe

COMMON = ["--batch-size", 32, "--max-steps", 217, "--warmup-steps", 20]
# name, rate, settings
METHODS = [
    ("all weights (`full`)", "1e-4", ["--method", "full", "--target-modules", ".+"]),
    ("LoRA, r = 8 on all linear layers", "2e-3", ["--r", 8, "--lora-alpha", 16]),
    ("bottlenecks, Houlsby's", "2e-3", ["--method", "bottleneck", "--architecture", "houlsby"]),
    ("bottlenecks, Pfeiffer's", "3e-3", ["--method", "bottleneck"]),
    ("prefix of 20", "3e-2", ["--method", "prefix-tuning", "--num-virtual-tokens", 20]),
    ("BitFit", "3e-3", ["--method", "bitfit"]),
    ("prompt of 20", "3e-2", ["--method", "prompt-tuning", "--num-virtual-tokens", 20]),
]


def run(model, data, work, rate, settings, seed):
    """What training says, its seconds, and accuracies of validation and test rows."""
    started = time.monotonic()
    said = engobe("train", "--model", model, "--data", data / "train.tsv", "--val-data", data / "dev.tsv", "--out", work,
                  *COMMON, "--learning-rate", rate, "--seed", seed, *settings)
    seconds = time.monotonic() - started
    test = engobe("eval", "--model", model, "--adapter", work, "--data", data / "test.tsv")
    return said, seconds, said["eval_scores"]["accuracy"], test["accuracy"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[42, 7])
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    whole = engobe("plan", "--model", args.model, *METHODS[0][2])["trainable_parameters"]
    seeds = ", ".join(map(str, args.seed))
    print(f"| method | learning rate | trained | share | validation ({seeds}) | test | seconds | peak memory |\n|---|---|---|---|---|---|---|---|")
    for name, rate, settings in METHODS:
        if args.only not in name:
            continue
        found = []
        for seed in args.seed:
            with tempfile.TemporaryDirectory() as work:
                found.append(run(args.model, args.data, Path(work) / "run", rate, settings, seed))
        said = found[0][0]
        share = "all" if said["trainable_parameters"] == whole else f"{100 * said['trainable_parameters'] / whole:.2f} %"
        percent = lambda at: ", ".join(f"{100 * f[at]:.2f} %" for f in found)
        seconds = ", ".join(f"{f[1]:.0f}" for f in found)
        peak = max(f[0]["peak_rss_bytes"] for f in found) / 1e6
        print(f"| {name} | {rate} | {said['trainable_parameters']:,} | {share} | {percent(2)} | {percent(3)} | {seconds} | {peak:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
