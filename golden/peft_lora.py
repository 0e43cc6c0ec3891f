"""Training curves of PEFT's LoRA on tiny models, from adapters that are kept beside them.

    pip install -r golden/requirements.txt && python golden/peft_lora.py

Writes golden/peft/NAME/: the adapter that training starts from, and expected.json with losses and gradient norms. All
share golden/peft/rows.jsonl. The models are those of golden/llama.
"""

import shutil

import torch
from tiny import save_adapter

from shared import HERE, save_adapter, write_expected  # noqa: I001
from common import make_rows
from parity import LORAS, perturb, train_peft
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

STEPS, BATCH = 20, 2


def main():
    out = HERE / "peft"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    rows = make_rows(out / "rows.jsonl", 5, 18, (4, 30), vocab=40)
    for seed, (name, lora) in enumerate(LORAS.items()):
        base = "head_dim_bias" if name.startswith("bias") else ("gqa_tied" if name in ("default", "saved_embed") else "plain")
        model = LlamaForCausalLM.from_pretrained(HERE / "llama" / base, dtype=torch.float32)
        lora = {**lora, "layers_to_transform": [1]} if "layers_to_transform" in lora else lora
        if "exclude_modules" in lora:
            lora = {**lora, "exclude_modules": ["layers.1.self_attn.k_proj"]}
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora))
        perturb(peft, seed)
        save_adapter(peft, out / name, f"golden/llama/{base}")
        accumulation = 4 if seed % 2 else 1
        curve = train_peft(peft, rows, STEPS, BATCH, accumulation)
        expected = {
            "base": base,
            "accumulation": accumulation,
            "losses": [l for l, _ in curve],
            "grad_norms": [n for _, n in curve],
            "trainable_parameters": peft.get_nb_trainable_parameters()[0],
            "all_parameters": peft.get_nb_trainable_parameters()[1],
        }
        write_expected(out / name, expected)


if __name__ == "__main__":
    main()
