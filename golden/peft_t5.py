"""Training curves of PEFT's LoRA on the tiny T5 models of golden/t5, from adapters that are kept beside them.

    pip install -r golden/requirements.txt && python golden/peft_t5.py

Writes golden/peft_t5/NAME/: the adapter that training starts from, and expected.json with losses and gradient norms of ten
steps over the sources and labels of the base model's own expected.json, padded and masked here. Dropout is off.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from tiny import padded, write

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "checks"))
from parity import perturb  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import T5ForConditionalGeneration  # noqa: E402

STEPS, LR = 10, 1e-3
# name -> base, settings
CASES = {
    "default": ("v10", dict(r=4, lora_alpha=8)),
    "feed_forward": ("v11", dict(r=3, lora_alpha=6, target_modules=["q", "k", "wi_0", "wo"])),
    "saved": ("uneven", dict(r=4, lora_alpha=8, target_modules=["EncDecAttention.v", "o"], modules_to_save=["relative_attention_bias"])),
}


def main():
    out = HERE / "peft_t5"
    shutil.rmtree(out, ignore_errors=True)
    for seed, (name, (base, lora)) in enumerate(CASES.items()):
        model = T5ForConditionalGeneration.from_pretrained(HERE / "t5" / base, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "T5Attention":
                module.dropout = 0.0
        peft = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", lora_dropout=0.0, **lora)).train()
        perturb(peft, seed)
        peft.save_pretrained(out / name)
        (out / name / "README.md").unlink(missing_ok=True)
        path = out / name / "adapter_config.json"
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = f"golden/t5/{base}"
        path.write_text(json.dumps(config, indent=2, sort_keys=True))
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
        trainable = peft.get_nb_trainable_parameters()[0]
        write(out / name / "expected.json", {"base": base, "losses": losses, "grad_norms": norms, "trainable_parameters": trainable})


if __name__ == "__main__":
    main()
