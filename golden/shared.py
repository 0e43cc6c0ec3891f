"""What the golden scripts share. Importing it also makes `common` and `parity` of checks/ importable."""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "checks"))


def mix(seed, index):
    """A 64-bit hash, as engobe_kernels::dropout::mix: numbers that a test makes again instead of storing them."""
    mask = (1 << 64) - 1
    z = (seed ^ ((index + 1) * 0x9E3779B97F4A7C15)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def filled(name, like):
    """Values of a tensor that its name alone says (engobe_testkit::filled makes the same): between -1/16 and 1/16, and
    around 1 for what multiplies."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & ((1 << 64) - 1)
    around = 1.0 if any(part in name for part in ("ia3_l", "magnitude", "ln_tuning_layers.weight", "vera_lambda")) else 0.0
    values = [((mix(seed, i) & 0xFFFF) - 32768) * 2.0**-19 + around for i in range(like.numel())]
    return torch.tensor(values, dtype=torch.float32).reshape(like.shape)


def seq2seq_rows(base):
    """The rows that the golden file of an encoder-decoder has."""
    rows = json.loads((HERE / base / "expected.json").read_text())
    return [{"input_ids": source, "labels": labels} for source, labels in zip(rows["sources"], rows["labels"], strict=True)]


def write_rounded(path, value):
    """JSON, its numbers to seven places."""
    text = json.dumps(value, default=float)
    path.write_text(json.dumps(json.loads(text, parse_float=lambda f: round(float(f), 7))))


def write_expected(directory, expected):
    """expected.json, its numbers to seven places."""
    write_rounded(directory / "expected.json", expected)


def save_adapter(peft, directory, base):
    """A PEFT directory over `base`, a path below the repository's root."""
    peft.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
