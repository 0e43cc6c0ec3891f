"""Tiny random decoders of every family, with logits, greedy tokens, and ten steps of PEFT's LoRA over some.

    pip install -r golden/requirements.txt && python golden/decoders.py [NAME...]

Writes golden/decoders/NAME/: config.json, weights in 16 bits, expected.json; for the first of each family lora/ as well:
the adapter that training starts from, and its losses. Rows are those of golden/peft.
"""

import json
import shutil
import sys

import torch
import transformers
from llama import HERE, expect
from common import randomize
from parity import perturb, train_peft
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
FACTORS = dict(short_factor=[1.0, 1.1, 1.3, 1.4], long_factor=[1.0, 1.5, 2.5, 4.0])
GEMMA = dict(SIZES, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12, sliding_window=5, num_hidden_layers=3)
GPT2 = dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1)
OPT = dict(SIZES, ffn_dim=48, dropout=0.0, pad_token_id=0, word_embed_proj_dim=32)
OPT.pop("intermediate_size")
PHI = dict(SIZES, num_key_value_heads=2, pad_token_id=0)
GRANITE = dict(SIZES, num_key_value_heads=2, embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=3.0)
NEOX = dict(SIZES, bos_token_id=0, eos_token_id=1)

# name -> class of the configuration, what differs from its defaults; the first of a family is trained
CONFIGS = {
    "qwen2": ("Qwen2Config", dict(SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2Config", dict(SIZES, num_key_value_heads=1, use_sliding_window=True, sliding_window=7, max_window_layers=1, rope_theta=1e6)),
    "mistral": ("MistralConfig", dict(SIZES, num_key_value_heads=2, sliding_window=6)),
    "mistral_wide": ("MistralConfig", dict(SIZES, num_key_value_heads=4, head_dim=12, sliding_window=None, rope_theta=1e6)),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2_short_names": ("GPT2Config", dict(GPT2, n_inner=40, activation_function="gelu", scale_attn_by_inverse_layer_idx=True)),
    "qwen3": ("Qwen3Config", dict(SIZES, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)),
    "qwen3_bias": ("Qwen3Config", dict(SIZES, num_key_value_heads=4, head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "gemma3": ("Gemma3TextConfig", dict(GEMMA, num_hidden_layers=6, hidden_size=24, intermediate_size=32)),
    "gemma3_scaled": ("Gemma3TextConfig", dict(GEMMA, query_pre_attn_scalar=20, layer_types=["full_attention", "sliding_attention", "full_attention"], tie_word_embeddings=False, final_logit_softcapping=3.0, rope_scaling=dict(rope_type="linear", factor=8.0))),
    "gemma2": ("Gemma2Config", dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=4.0)),
    "gemma2_uncapped": ("Gemma2Config", dict(GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None, num_key_value_heads=4)),
    "phi3": ("Phi3Config", PHI),
    "phi3_window": ("Phi3Config", dict(PHI, sliding_window=8, rope_parameters=dict(rope_theta=1e4, rope_type="default", partial_rotary_factor=0.5), tie_word_embeddings=True)),
    "phi3_longrope": ("Phi3Config", dict(PHI, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=dict(rope_theta=1e4, rope_type="longrope", original_max_position_embeddings=32, factor=4.0, **FACTORS))),
    "opt": ("OPTConfig", OPT),
    "opt_post_norm": ("OPTConfig", dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=16)),
    "opt_plain": ("OPTConfig", dict(OPT, enable_bias=False, activation_function="gelu", tie_word_embeddings=False)),
    "gpt_neox": ("GPTNeoXConfig", dict(NEOX, rotary_pct=0.25)),
    "gpt_neox_serial": ("GPTNeoXConfig", dict(NEOX, rotary_pct=1.0, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new", rope_theta=2e4)),
    "gemma": ("GemmaConfig", dict(SIZES, num_key_value_heads=1, head_dim=12)),
    "gemma_bias": ("GemmaConfig", dict(SIZES, num_key_value_heads=4, head_dim=8, attention_bias=True, tie_word_embeddings=False, rope_theta=2e4)),
    "olmo2": ("Olmo2Config", dict(SIZES, num_key_value_heads=2, pad_token_id=0)),
    "olmo2_bias": ("Olmo2Config", dict(SIZES, num_key_value_heads=1, pad_token_id=0, attention_bias=True, tie_word_embeddings=True, rope_theta=5e5)),
    "granite": ("GraniteConfig", GRANITE),
    "granite_bias": ("GraniteConfig", dict(GRANITE, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, attention_multiplier=0.5, logits_scaling=0.7)),
    "smollm3": ("SmolLM3Config", dict(SIZES, num_key_value_heads=2, num_hidden_layers=4, hidden_size=24, intermediate_size=32, pad_token_id=0)),
    "smollm3_window": ("SmolLM3Config", dict(SIZES, num_key_value_heads=1, pad_token_id=0, no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=7, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "starcoder2": ("Starcoder2Config", dict(SIZES, num_key_value_heads=2)),
    "starcoder2_window": ("Starcoder2Config", dict(SIZES, num_key_value_heads=1, sliding_window=7, use_bias=False, tie_word_embeddings=False, hidden_act="gelu", rope_theta=1e5)),
    "phi": ("PhiConfig", SIZES),
    "phi_share": ("PhiConfig", dict(SIZES, num_key_value_heads=2, partial_rotary_factor=0.25, tie_word_embeddings=True, hidden_act="gelu")),
    "stablelm": ("StableLmConfig", dict(SIZES, num_key_value_heads=2)),
    "stablelm_parallel": ("StableLmConfig", dict(SIZES, num_key_value_heads=4, use_parallel_residual=True, use_qkv_bias=True, partial_rotary_factor=0.5, rope_theta=2e4)),
}


def train(model, out, seed):
    """An adapter on every linear layer, and ten steps from it."""
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules="all-linear"))
    perturb(peft, seed)
    peft.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"golden/decoders/{out.parent.name}"
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    rows = [json.loads(line) for line in (HERE / "peft" / "rows.jsonl").read_text().splitlines()]
    curve = train_peft(peft, rows, 10, 2, 1)
    expected = {"losses": [round(l, 7) for l, _ in curve], "grad_norms": [round(n, 7) for _, n in curve]}
    (out / "expected.json").write_text(json.dumps(expected))


def main():
    trained = set()
    for seed, (name, (kind, changes)) in enumerate(CONFIGS.items()):
        out = HERE / "decoders" / name
        first = kind not in trained
        trained.add(kind)
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        shutil.rmtree(out, ignore_errors=True)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**changes)).eval()
        randomize(model, around=0.0 if "gemma" in name else 1.0)
        model.to(torch.float16).save_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        if name == "gpt2_short_names":
            model.transformer.to(torch.float16).save_pretrained(out)
            model.float()
        expect(model, seed, out)
        if first:
            train(model, out / "lora", seed)


if __name__ == "__main__":
    main()
