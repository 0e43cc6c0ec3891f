"""Training curves of PEFT's methods on the tiny T5 models of golden/t5, from adapters that are kept beside them.

    pip install -r golden/requirements.txt && python golden/peft_t5.py

Writes golden/peft_t5/NAME/: the adapter that training starts from, and expected.json with losses and gradient norms of ten
steps over the sources and labels of the base model's own expected.json, padded and masked here. Dropout is off. The steps
are taken in f64: AdamW's first step moves a value by the sign of its gradient, and gradients that sum to nothing (a bias
that all keys share) have in f32 the sign of their rounding.
"""

import json
import shutil
import sys

import torch
from shared import HERE, save_adapter, write_expected
from tiny import padded

from parity import perturb
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import T5ForConditionalGeneration

STEPS, LR = 10, 1e-3
FEED_FORWARD = ["q", "k", "wi_0", "wo"]
# name -> base, settings
CASES = {
    "default": ("v10", LoraConfig(r=4, lora_alpha=8)),
    "feed_forward": ("v11", LoraConfig(r=3, lora_alpha=6, target_modules=FEED_FORWARD)),
    "saved": (
        "uneven",
        LoraConfig(r=4, lora_alpha=8, target_modules=["EncDecAttention.v", "o"], modules_to_save=["relative_attention_bias"]),
    ),
    "ia3": ("v11", IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    # PEFT makes a second prompt for the decoder, which nothing reads
    "prompt": ("v10", PromptTuningConfig(num_virtual_tokens=5)),
    # before the keys of the decoder's own attention
    "prefix": ("v11", PrefixTuningConfig(num_virtual_tokens=3)),
    "prompt_source": ("uneven", PromptTuningConfig(num_virtual_tokens=2, num_transformer_submodules=1)),
}


def base_model(base, dtype=torch.float32):
    """A model of golden/t5 without dropout."""
    model = T5ForConditionalGeneration.from_pretrained(HERE / "t5" / base, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "T5Attention":
            module.dropout = 0.0
    return model


def curve(peft, base):
    """Losses and gradient norms of ten steps over the base's rows."""
    rows = json.loads((HERE / "t5" / base / "expected.json").read_text())
    ids, mask = padded(rows["sources"], 0)
    labels, _ = padded(rows["labels"], -100)
    params = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = peft(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
    return losses, norms


def main(wanted):
    out = HERE / "peft_t5"
    for seed, (name, (base, config)) in enumerate(CASES.items()):
        if wanted and name not in wanted:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        torch.manual_seed(seed)
        config.task_type = "SEQ_2_SEQ_LM"
        peft = get_peft_model(base_model(base), config).train()
        perturb(peft, seed)
        save_adapter(peft, out / name, f"golden/t5/{base}")
        losses, norms = curve(peft.double(), base)
        used = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        if config.peft_type == "PROMPT_TUNING":
            used //= config.num_transformer_submodules
        write_expected(out / name, {"base": base, "losses": losses, "grad_norms": norms, "trainable_parameters": used})


if __name__ == "__main__":
    main(sys.argv[1:])
