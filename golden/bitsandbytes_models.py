"""Tiny LLaMA models that transformers and bitsandbytes quantized and saved, with logits; and training curves of PEFT
over one of them.

    pip install -r golden/requirements.txt && python golden/bitsandbytes_models.py

Writes golden/bitsandbytes/NAME/ (config.json, model.safetensors, expected.json) and golden/qlora/NAME/ (the adapter
that training starts from, expected.json). What is expected is computed in f32. Rows of weights are whole blocks of 64:
where blocks straddle rows, bitsandbytes' AVX-512 kernel errs. The rows to train on are golden/peft/rows.jsonl.
"""

import json
import shutil
import tempfile

import torch

from shared import HERE, save_adapter, write_expected  # noqa: I001
from common import make_model
from parity import perturb, train_peft
from bitsandbytes.nn import Int8Params, Params4bit
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

SIZES = dict(vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)


def four(kind, double=False, **more):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32, **more)


MODELS = {
    "nf4_dq": (four("nf4", True), torch.float32, dict(num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True)),
    "nf4_bf16": (four("nf4", bnb_4bit_quant_storage=torch.bfloat16), torch.bfloat16, dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "fp4_bias": (four("fp4"), torch.float32, dict(num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), torch.float32, dict(num_key_value_heads=1, tie_word_embeddings=True)),
}


def load(directory):
    """The model in f32, in training mode: in evaluation, bitsandbytes repacks weights on some CPUs, and computes in bf16."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu").train()
    for p in model.parameters():
        if not isinstance(p, (Params4bit, Int8Params)):
            p.data = p.data.float()  # transformers leaves them as they are stored beside codes in a 16-bit storage
    return model


def models(out):
    shutil.rmtree(out, ignore_errors=True)
    for seed, (name, (config, dtype, changes)) in enumerate(MODELS.items()):
        with tempfile.TemporaryDirectory() as plain:
            make_model(plain, seed, dtype, **{**SIZES, **changes})
            LlamaForCausalLM.from_pretrained(plain, dtype=dtype, device_map="cpu", quantization_config=config).save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        torch.manual_seed(seed)
        ids = torch.randint(0, SIZES["vocab_size"], (1, 24))
        with torch.no_grad():
            logits = load(out / name)(ids).logits[0, [0, 12, 23]].double().tolist()
        write_expected(out / name, {"ids": ids[0].tolist(), "logits": logits})


LORAS = {
    "default": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all_linear": dict(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
}


def curves(out, base):
    shutil.rmtree(out, ignore_errors=True)
    rows = [json.loads(line) for line in (HERE / "peft" / "rows.jsonl").read_text().splitlines()]
    for seed, (name, lora) in enumerate(LORAS.items()):
        peft = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora))
        perturb(peft, seed)
        save_adapter(peft, out / name, "golden/bitsandbytes/nf4_dq")
        curve = train_peft(peft.train(), rows, 20, 2, 1)
        expected = {"losses": [l for l, _ in curve], "grad_norms": [n for _, n in curve]}
        write_expected(out / name, expected)


if __name__ == "__main__":
    models(HERE / "bitsandbytes")
    curves(HERE / "qlora", HERE / "bitsandbytes" / "nf4_dq")
