"""Ten steps of PEFT's methods over a tiny model of every family: losses and gradient norms.

    pip install -r golden/requirements.txt && python golden/matrix.py [FAMILY...]

Writes golden/matrix/FAMILY.json, one entry for each method. No adapter is stored: `fill` makes its values from names and
indices, and the test makes the same ones. Models are those of golden/decoders and golden/llama, rows golden/peft/rows.jsonl.
"""

import json
import sys

import torch

from shared import HERE, filled, write_rounded  # noqa: I001
from curves import read_rows
from parity import train_peft
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM
from virtual_tokens import hidden_state

STEPS, BATCH, LR = 10, 2, 5e-3
# family -> base, keys and values, the end of the feed-forward, norms, the embedding
LLAMA = (["k_proj", "v_proj"], ["down_proj"], ["input_layernorm", "norm"], "embed_tokens")
FAMILIES = {
    "llama": ("llama/gqa_tied", *LLAMA),
    "mistral": ("decoders/mistral", *LLAMA),
    "qwen2": ("decoders/qwen2", *LLAMA),
    "qwen3": ("decoders/qwen3", ["k_proj", "v_proj"], ["down_proj"], ["q_norm", "post_attention_layernorm"], "embed_tokens"),
    "gemma2": ("decoders/gemma2", ["k_proj", "v_proj"], ["down_proj"], ["pre_feedforward_layernorm", "norm"], "embed_tokens"),
    "gemma3_text": ("decoders/gemma3", ["k_proj", "v_proj"], ["down_proj"], ["k_norm", "post_feedforward_layernorm"], "embed_tokens"),
    "phi3": ("decoders/phi3", ["qkv_proj"], ["down_proj"], ["input_layernorm", "norm"], "embed_tokens"),
    "gpt2": ("decoders/gpt2", ["c_attn"], ["mlp.c_proj"], ["ln_1", "ln_f"], "wte"),
    "opt": ("decoders/opt", ["k_proj", "v_proj"], ["fc2"], ["self_attn_layer_norm", "final_layer_norm"], "embed_tokens"),
    "gpt_neox": ("decoders/gpt_neox", ["query_key_value"], ["dense_4h_to_h"], ["input_layernorm", "final_layer_norm"], "embed_in"),
}


def methods(attention, feed_forward, norms, embedding):
    """name -> class and settings."""
    both = attention + feed_forward
    return {
        "lora": (LoraConfig, dict(r=2, lora_alpha=4, target_modules="all-linear")),
        "dora": (LoraConfig, dict(r=2, lora_alpha=4, target_modules=both, use_dora=True)),
        "adalora": (AdaLoraConfig, dict(init_r=3, target_r=2, lora_alpha=4, tinit=2, tfinal=3, deltaT=1, total_step=STEPS, target_modules=both)),
        "ia3": (IA3Config, dict(target_modules=both, feedforward_modules=feed_forward)),
        "vera": (VeraConfig, dict(r=4, target_modules=both)),
        "miss": (MissConfig, dict(r=2, target_modules=both)),
        "ln-tuning": (LNTuningConfig, dict(target_modules=norms)),
        "prompt-tuning": (PromptTuningConfig, dict(num_virtual_tokens=3)),
        "p-tuning": (PromptEncoderConfig, dict(num_virtual_tokens=3, encoder_hidden_size=6)),
        "prefix-tuning": (PrefixTuningConfig, dict(num_virtual_tokens=3)),
        "trainable-tokens": (TrainableTokensConfig, dict(target_modules=[embedding], token_indices=[3, 17, 5])),
    }


def fill(peft):
    """Gives what the adapter's file has, and an encoder that it leaves out, the values that the test gives them."""
    state = get_peft_model_state_dict(peft)
    # a tied head's tokens are the embedding's, by another name
    tokens = next((name for name in state if "trainable_tokens" in name and "head" not in name), None)
    source = {name: tokens if "trainable_tokens" in name else name for name in state}
    set_peft_model_state_dict(peft, {name: filled(source[name], value) for name, value in state.items()})
    encoder = getattr(peft, "prompt_encoder", {"default": None})["default"]
    if encoder is not None and hasattr(encoder, "encoder_type"):
        names = hidden_state(encoder, "P_TUNING", 0)
        encoder.load_state_dict({name.removeprefix("encoder."): filled(name, value) for name, value in names.items()})


def main():
    rows = read_rows()
    (HERE / "matrix").mkdir(exist_ok=True)
    for family, (base, *places) in FAMILIES.items():
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        found = {}
        for name, (kind, settings) in methods(*places).items():
            if name == "miss" and family == "gpt2":
                continue  # PEFT's takes torch.nn.Linear alone, and GPT-2 is made of Conv1D
            print(family, name, flush=True)
            model = AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32, attn_implementation="eager")
            config = kind(task_type="CAUSAL_LM", **settings)
            peft = get_peft_model(model, config)
            fill(peft)
            curve = train_peft(peft.eval(), rows, STEPS, BATCH, 1, lr=LR)
            found[name] = {
                "config": {"peft_type": config.peft_type.value, "task_type": "CAUSAL_LM", **settings},
                "trainable_parameters": peft.get_nb_trainable_parameters()[0],
                "losses": [loss for loss, _ in curve],
                "grad_norms": [norm for _, norm in curve],
            }
        write_rounded(HERE / "matrix" / f"{family}.json", {"base": base, "learning_rate": LR, "methods": found})


if __name__ == "__main__":
    main()
