"""Adapters that PEFT combined (add_weighted_adapter): golden/combined/NAME, out of golden/peft/default and tied_embed.

    python golden/combine.py

What drops elements at random is left out: torch's generator can't be followed.
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
NAMES = ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune"]


def main():
    out = HERE / "combined"
    shutil.rmtree(out, ignore_errors=True)
    base = LlamaForCausalLM.from_pretrained(HERE / "llama" / "gqa_tied", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, HERE / "peft" / "default", adapter_name="one")
    model.load_adapter(HERE / "peft" / "tied_embed", adapter_name="two")
    for name in NAMES:
        density = {} if name in ("linear", "cat", "svd") else {"density": 0.4}
        model.add_weighted_adapter(["one", "two"], [0.7, -0.3], name, combination_type=name, **density)
        model.peft_config[name].base_model_name_or_path = "golden/llama/gqa_tied"
        model.save_pretrained(out, selected_adapters=[name], save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
