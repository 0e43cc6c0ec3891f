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
from curves import expect, read_rows
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
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
    rows = read_rows()
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
        expect(peft, base, accumulation, rows, out / name / "expected.json")


if __name__ == "__main__":
    main()
