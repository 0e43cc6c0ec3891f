"""Training curves of PEFT's LoRA and its kin on tiny models, from adapters that are kept beside them.

    pip install -r golden/requirements.txt && python golden/peft_lora.py [NAME ...]

Writes golden/peft/NAME/: the adapter that training starts from, and expected.json with losses and gradient norms. All
share golden/peft/rows.jsonl. The models are those of golden/llama.
"""

import shutil
import sys

import torch

from shared import HERE, save_adapter, write_expected  # noqa: I001
from common import make_rows
from parity import LORAS, kind_of, peft_config, perturb, train_peft
from peft import get_peft_model
from transformers import LlamaForCausalLM

STEPS, BATCH = 20, 2


def main():
    out = HERE / "peft"
    wanted = sys.argv[1:] or list(LORAS)
    for name in wanted:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    rows = make_rows(out / "rows.jsonl", 5, 18, (4, 30), vocab=40)
    for seed, (name, lora) in enumerate(LORAS.items()):
        if name not in wanted:
            continue
        base = kind_of(name)
        model = LlamaForCausalLM.from_pretrained(HERE / "llama" / base, dtype=torch.float32)
        lora = {**lora, "layers_to_transform": [1]} if "layers_to_transform" in lora else lora
        if "exclude_modules" in lora:
            lora = {**lora, "exclude_modules": ["layers.1.self_attn.k_proj"]}
        peft = get_peft_model(model, peft_config(lora))
        perturb(peft, seed)
        save_adapter(peft, out / name, f"golden/llama/{base}")
        accumulation = 4 if seed % 2 else 1
        curve = train_peft(peft, rows, STEPS, BATCH, accumulation, loraplus=lora.get("loraplus"))
        expected = {
            "base": base,
            "accumulation": accumulation,
            "losses": [l for l, _ in curve],
            "grad_norms": [n for _, n in curve],
            "trainable_parameters": peft.get_nb_trainable_parameters()[0],
            "all_parameters": peft.get_nb_trainable_parameters()[1],
        }
        if "loraplus" in lora:
            expected["loraplus"] = lora["loraplus"]
        write_expected(out / name, expected)


if __name__ == "__main__":
    main()
