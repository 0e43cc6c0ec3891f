"""Prompts, their encoders and prefixes of PEFT on tiny models: logits, and curves of 20 steps.

    pip install -r golden/requirements.txt && python golden/virtual_tokens.py

Writes golden/virtual_tokens/NAME/: the adapter that training starts from as PEFT saves it; encoder.safetensors, what of
its encoder a file of PEFT's leaves out, by engobe's names of parameters; expected.json with losses, gradient norms, and
logits before the training and after it. The models are those of golden/llama, the rows golden/peft/rows.jsonl.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
STEPS, BATCH, LR = 20, 2, 1e-2
CASES = {
    "prompt": ("gqa_tied", 1, PromptTuningConfig(num_virtual_tokens=5)),
    "prompt_one": ("head_dim_bias", 4, PromptTuningConfig(num_virtual_tokens=1)),
    "p_mlp": ("gqa_tied", 1, PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=12)),
    "p_lstm": (
        "plain",
        4,
        PromptEncoderConfig(
            num_virtual_tokens=6,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=5,
            encoder_num_layers=2,
        ),
    ),
    "prefix": ("gqa_tied", 1, PrefixTuningConfig(num_virtual_tokens=4)),
    "prefix_long": ("head_dim_bias", 4, PrefixTuningConfig(num_virtual_tokens=9)),
    "prefix_projection": (
        "gqa_tied",
        4,
        PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7),
    ),
}


def row_logits(model, ids):
    """Logits of a row's own tokens: PEFT leaves those of a prompt in front."""
    return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]


def train(model, rows, accumulation):
    """What engobe does: loss over the labels of the window, AdamW, linear schedule, clipping. Row by row, no padding."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR)
    lines, at = [], 0
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (STEPS - step) / STEPS
        optimizer.zero_grad()
        window = []
        for _ in range(accumulation):
            window += rows[at : at + BATCH]
            at += BATCH
            if at >= len(rows):
                at = 0
                break
        labels = sum(sum(label != -100 for label in r["labels"][1:]) for r in window)
        total = 0.0
        for row in window:
            logits = row_logits(model, row["input_ids"])
            loss = cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
            (loss / labels).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        lines.append((total / labels, norm))
    return lines


def hidden_state(encoder, kind, layers):
    """The encoder's parameters by engobe's names: the outer projection of a prefix in pieces by block and half."""
    out = {}
    for name, value in encoder.state_dict().items():
        name = f"encoder.{name}"
        if kind == "PREFIX_TUNING" and ".transform.2." in name:
            pieces = value.chunk(2 * layers)
            for i, piece in enumerate(pieces):
                out[f"{name}.{i // 2}.{('key', 'value')[i % 2]}"] = piece.contiguous()
        else:
            out[name] = value.contiguous()
    return out


def main():
    out = HERE / "virtual_tokens"
    shutil.rmtree(out, ignore_errors=True)
    rows = [json.loads(line) for line in (HERE / "peft" / "rows.jsonl").read_text().splitlines()]
    for seed, (name, (base, accumulation, config)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(HERE / "llama" / base, dtype=torch.float32)
        config.task_type = "CAUSAL_LM"
        peft = get_peft_model(model, config)
        peft.eval()  # no dropout anywhere; the encoder goes on encoding
        peft.save_pretrained(out / name)
        (out / name / "README.md").unlink(missing_ok=True)
        path = out / name / "adapter_config.json"
        saved = json.loads(path.read_text())
        saved["base_model_name_or_path"] = f"golden/llama/{base}"
        path.write_text(json.dumps(saved, indent=2, sort_keys=True))
        encoder = peft.prompt_encoder["default"]
        if name.startswith("p_") or name == "prefix_projection":
            state = hidden_state(encoder, saved["peft_type"], model.config.num_hidden_layers)
            save_file(state, out / name / "encoder.safetensors")
        probe = rows[0]["input_ids"]
        logits = lambda: [round(v, 6) for v in row_logits(peft, probe)[-1].tolist()]  # noqa: E731
        with torch.no_grad():
            before = logits()
        curve = train(peft, rows, accumulation)
        with torch.no_grad():
            after = logits()
        expected = {
            "base": base,
            "accumulation": accumulation,
            "learning_rate": LR,
            "losses": [round(loss, 7) for loss, _ in curve],
            "grad_norms": [round(norm, 7) for _, norm in curve],
            "trainable_parameters": peft.get_nb_trainable_parameters()[0],
            "probe": probe,
            "logits_before": before,
            "logits_after": after,
        }
        (out / name / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()
