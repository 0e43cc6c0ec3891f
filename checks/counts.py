"""Trainable parameters that `engobe plan` counts from a config.json, beside those of PEFT and AdapterHub.

    .venv/bin/python checks/counts.py [--only NAME]
    PYTHONPATH=DIR .venv/bin/python checks/counts.py --hub      (DIR: see golden/bottleneck.py)

Models have the shapes of known ones and no weights, on either side.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from common import Report, engobe

LLAMA = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
# name -> class of the configuration, what differs from its defaults
MODELS = {
    "llama-3.2-1b": ("LlamaConfig", dict(LLAMA, num_key_value_heads=8, tie_word_embeddings=True)),
    "llama-2-7b": ("LlamaConfig", dict(vocab_size=32000)),
    "gpt2": ("GPT2Config", dict()),
    "opt-350m": ("OPTConfig", dict(hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=512, do_layer_norm_before=False)),
    "pythia-160m": ("GPTNeoXConfig", dict(vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)),
    "qwen2.5-0.5b": ("Qwen2Config", dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)),
    "gemma-3-270m": ("Gemma3TextConfig", dict(vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256)),
    "phi-3-mini": ("Phi3Config", dict()),
}
LLAMAS = ["llama-3.2-1b", "llama-2-7b"]
# OPT-350m's embedding is narrower than its blocks: PEFT makes prompts as wide as these, which its forward refuses
PROMPTED = [name for name in MODELS if name != "opt-350m"]

# name -> engobe's method, PEFT's type, its settings, and the models (all, if none are named)
CASES = {
    "lora": ("lora", "LORA", dict(r=16, target_modules="all-linear"), None),
    "lora, q and v": ("lora", "LORA", dict(r=8, target_modules=["q_proj", "v_proj"]), [*LLAMAS, "opt-350m", "qwen2.5-0.5b", "gemma-3-270m"]),
    "lora, patterns": ("lora", "LORA", dict(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 12}, layers_to_transform=[0, 3, 5]), LLAMAS),
    "lora, embeddings": ("lora", "LORA", dict(r=4, target_modules=["embed_tokens", "o_proj"]), LLAMAS),
    "lora, saved head": ("lora", "LORA", dict(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]), ["llama-2-7b"]),
    "lora, biases": ("lora", "LORA", dict(r=4, target_modules=["q_proj"], bias="all"), ["opt-350m", "qwen2.5-0.5b"]),
    "dora": ("lora", "LORA", dict(r=16, target_modules="all-linear", use_dora=True), [*LLAMAS, "qwen2.5-0.5b", "phi-3-mini"]),
    "tokens": ("lora", "LORA", dict(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 9]), LLAMAS),
    "adalora": ("adalora", "ADALORA", dict(init_r=12, target_r=8, target_modules="all-linear", total_step=100), [*LLAMAS, "opt-350m"]),
    "ia3": ("ia3", "IA3", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), [*LLAMAS, "gemma-3-270m"]),
    "vera": ("vera", "VERA", dict(r=64, target_modules=["q_proj", "v_proj"]), LLAMAS),
    "miss": ("miss", "MISS", dict(r=64, target_modules="all-linear"), LLAMAS),
    "ln-tuning": ("ln-tuning", "LN_TUNING", dict(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]), [*LLAMAS, "qwen2.5-0.5b"]),
    "trainable-tokens": ("trainable-tokens", "TRAINABLE_TOKENS", dict(token_indices=[1, 2, 3, 4]), LLAMAS),
    "prompt-tuning": ("prompt-tuning", "PROMPT_TUNING", dict(num_virtual_tokens=20), PROMPTED),
    "prompt-tuning, 1": ("prompt-tuning", "PROMPT_TUNING", dict(num_virtual_tokens=1), PROMPTED),
    "p-tuning, MLP": ("p-tuning", "P_TUNING", dict(num_virtual_tokens=20, encoder_hidden_size=128), PROMPTED),
    "p-tuning, MLP of the model's width": ("p-tuning", "P_TUNING", dict(num_virtual_tokens=7), LLAMAS),
    "p-tuning, LSTM": ("p-tuning", "P_TUNING", dict(num_virtual_tokens=20, encoder_reparameterization_type="LSTM", encoder_hidden_size=96, encoder_num_layers=3), PROMPTED),
    "prefix-tuning": ("prefix-tuning", "PREFIX_TUNING", dict(num_virtual_tokens=20), None),
    "prefix-tuning, projected": ("prefix-tuning", "PREFIX_TUNING", dict(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512), None),
}
# AdapterHub's: configuration and changes, and engobe's settings for the same
HUB = {
    "pfeiffer": ("SeqBnConfig", dict(), dict(architecture="pfeiffer")),
    "pfeiffer, wide": ("SeqBnConfig", dict(reduction_factor=4), dict(architecture="pfeiffer", reduction_factor=4)),
    "houlsby": ("DoubleSeqBnConfig", dict(), dict(architecture="houlsby")),
    "houlsby, layers left out": ("DoubleSeqBnConfig", dict(leave_out=[0, 1, 2]), dict(architecture="houlsby", leave_out=[0, 1, 2])),
    "parallel": ("ParBnConfig", dict(), dict(architecture="parallel")),
    "factors by layer": ("SeqBnConfig", dict(reduction_factor={"0": 2, "default": 32}), dict(architecture="pfeiffer", reduction_factor={"0": 2, "default": 32})),
    "norm and learned scaling": (
        "DoubleSeqBnConfig", dict(ln_after=True, scaling="learned"), dict(architecture="houlsby", ln_after=True, scaling="learned"),
    ),
}
HUB_MODELS = [*LLAMAS, "gpt2"]


def toml(value):
    """A value of `--set`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and isinstance(value[0], str):
        return ",".join(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items()) + " }"
    return json.dumps(value)


def outline(directory, name):
    """A model without weights, and its config.json for engobe."""
    kind, changes = MODELS[name]
    config = getattr(transformers, kind)(**changes)
    config.save_pretrained(directory / name)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def planned(directory, name, method, settings):
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={toml(value)}")]
    return engobe("plan", "--model", directory / name / "config.json", "--method", method, *sets)["trainable_parameters"]


def peft_counts(report, work, only):
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for name, (method, kind, settings, models) in CASES.items():
        for model in models or MODELS:
            if only not in f"{name} {model}":
                continue
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings)
            with torch.device("meta"):
                theirs = peft.get_peft_model(outline(work, model), config).get_nb_trainable_parameters()[0]
            mine = planned(work, model, method, settings)
            report.true(f"{name}, {model}", mine == theirs, f"{mine:,}" if mine == theirs else f"{mine:,}, PEFT {theirs:,}")


def hub_counts(report, work, only):
    import adapters

    for name, (kind, changes, settings) in HUB.items():
        for model in HUB_MODELS:
            if only not in f"{name} {model}":
                continue
            with torch.device("meta"):
                theirs = outline(work, model)
                adapters.init(theirs)
                theirs.add_adapter("task", config=getattr(adapters, kind)(**changes))
                theirs.train_adapter("task")
            count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
            mine = planned(work, model, "bottleneck", settings)
            report.true(f"{name}, {model}", mine == count, f"{mine:,}" if mine == count else f"{mine:,}, AdapterHub {count:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--hub", action="store_true")
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        (hub_counts if args.hub else peft_counts)(report, Path(work), args.only)
    report.exit()
