"""Every family of decoders beside transformers and PEFT: losses, greedy tokens, adapters there and back, merges.

    python checks/families.py [--seed N] [--only NAME]

Models are those of golden/decoders.py, with other weights.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import ROOT, Report, engobe, label_loss, make_rows, randomize, train
from parity import exchange, perturb, relative, train_peft
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

sys.path.append(str(ROOT / "golden"))
from decoders import CONFIGS  # noqa: E402


def family(report, work, name, kind, changes, seed):
    torch.manual_seed(seed)
    directory = work / "base"
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**changes)).eval()
    randomize(model, around=0.0 if "gemma" in name else 1.0)
    model.save_pretrained(directory)
    data = work / f"train-{name}.jsonl"
    rows = make_rows(data, seed, 20, (4, 30), vocab=40)
    with torch.no_grad():
        total, count = label_loss(model, rows)
    found = engobe("eval", "--model", directory, "--data", data)
    report(f"{name}: eval", relative(found["loss"], total.item() / count), 1e-4)
    prompt = rows[0]["input_ids"][:4]
    with torch.no_grad():
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    mine = engobe("generate", "--model", directory, "--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", 24)["token_ids"]
    # engobe ends where the model does, which may be at once
    ends = model.config.eos_token_id
    ended = len(mine) == len(theirs) or theirs[len(mine)] in (ends if isinstance(ends, list) else [ends])
    report.true(f"{name}: greedy", mine == theirs[: len(mine)] and ended, f"{len(mine)} tokens")
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    perturb(peft, seed)
    start, out = work / "start", work / "out"
    peft.save_pretrained(start)
    lines = train(directory, data, out, "--init-adapter", start, steps=10)
    curve = train_peft(peft, rows, 10, 2, 1)
    report(f"{name}: losses", max(relative(m["loss"], c[0]) for m, c in zip(lines, curve)), 1e-3)
    exchange(report, work, name, model, directory, out, peft, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    report = Report()
    for i, (name, (kind, changes)) in enumerate(CONFIGS.items()):
        if args.only in name:
            with tempfile.TemporaryDirectory() as work:
                family(report, Path(work), name, kind, changes, args.seed + i)
    report.exit()
