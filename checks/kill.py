"""Kills training at random moments, resumes it, and compares the final adapter with an undisturbed run's, bit by bit.

    python checks/kill.py [--times 20] [--seed N]

Half of the kills are aimed at checkpoint writes: every step writes one there, so most moments lie in or near one.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from common import CONFIGS, ENGOBE, Report, make_model, make_rows


def command(work, out, save_steps):
    return [
        ENGOBE, "train", "--model", work / "model", "--data", work / "rows.jsonl", "--out", out, "--resume",
        "--max-steps", "60", "--batch-size", "2", "--gradient-accumulation", "2", "--r", "8", "--lora-dropout", "0.1",
        "--max-seq-len", "64", "--save-steps", str(save_steps), "--eval-steps", "10", "--val-data", work / "val.jsonl",
        "--load-best", "--allow", "eot-never-label", "--quiet",
    ]


def digest(out):
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(out):
    import json

    lines = [json.loads(l) for l in (out / "metrics.jsonl").read_text().splitlines()]
    return [(l["step"], l["loss"], l["grad_norm"], l.get("eval_loss")) for l in lines]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, report = random.Random(args.seed), Report()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make_model(work / "model", args.seed, **CONFIGS["gqa_tied"])
        make_rows(work / "rows.jsonl", args.seed, 40)
        make_rows(work / "val.jsonl", args.seed + 1, 8)
        whole = work / "whole"
        started = time.monotonic()
        subprocess.run(command(work, whole, 7), check=True)
        length = time.monotonic() - started
        expected = digest(whole)
        for i in range(args.times):
            out, kills, alive = work / f"run{i}", 0, 0
            save_steps = 1 if i % 2 else 7
            while True:
                process = subprocess.Popen(command(work, out, save_steps), stderr=subprocess.PIPE)
                delay = rng.uniform(0.0, length * 1.2)
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
                    kills += 1
                    process.wait()
                    if process.returncode in (0, -signal.SIGKILL, -signal.SIGINT) and kills < 40:
                        continue
                if process.returncode != 0:
                    print(process.stderr.read().decode())
                alive = process.returncode
                break
            same = digest(out) == expected and losses(out) == losses(whole)
            left = [p for p in os.listdir(out) if "partial" in p]
            report.true(f"run {i} after {kills} kills", alive == 0 and same, f"{left or ''}")
    report.exit()


if __name__ == "__main__":
    main()
