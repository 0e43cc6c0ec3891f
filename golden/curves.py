"""What golden scripts of methods share: twenty steps of training, row by row, as engobe takes them."""

import json

import torch
from shared import HERE  # noqa: I001
from common import label_loss, targets

STEPS, BATCH, LR = 20, 2, 1e-2


def read_rows():
    return [json.loads(line) for line in (HERE / "peft" / "rows.jsonl").read_text().splitlines()]


def row_logits(model, ids):
    """Logits of a row's own tokens: PEFT leaves those of a prompt in front."""
    return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]


def train(model, rows, accumulation, steps=STEPS, rate=LR):
    """Loss over the labels of the window, AdamW, linear schedule, clipping; row by row, so that nothing is padded."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=rate)
    lines, at = [], 0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (steps - step) / steps
        optimizer.zero_grad()
        window = []
        for _ in range(accumulation):
            window += rows[at : at + BATCH]
            at += BATCH
            if at >= len(rows):
                at = 0
                break
        labels = sum(sum(label != -100 for label in targets(model, r)) for r in window)
        total = 0.0
        for row in window:
            loss, _ = label_loss(model, [row])
            (loss / labels).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        lines.append((total / labels, norm))
    return lines


def expect(model, base, accumulation, rows, path):
    """Trains, and writes what was seen: losses, gradient norms, and logits after a row before and after it."""
    probe = rows[0]["input_ids"]

    def logits():
        with torch.no_grad():
            return [round(v, 6) for v in row_logits(model, probe)[-1].tolist()]

    before = logits()
    curve = train(model, rows, accumulation)
    expected = {
        "base": base,
        "accumulation": accumulation,
        "learning_rate": LR,
        "losses": [round(loss, 7) for loss, _ in curve],
        "grad_norms": [round(norm, 7) for _, norm in curve],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "probe": probe,
        "logits_before": before,
        "logits_after": logits(),
    }
    path.write_text(json.dumps(expected))
