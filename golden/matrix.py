"""Ten steps of PEFT's methods over a tiny model of every family: losses and gradient norms.

    pip install -r golden/requirements.txt && python golden/matrix.py [FAMILY...]

Writes golden/matrix/FAMILY.json, one entry for each method. No adapter is stored: `fill` makes its values from names and
indices, and the test makes the same ones. Models are those of golden/decoders and golden/llama, rows golden/peft/rows.jsonl.
Those of golden/t5 have their own rows, and steps in f64 for the reason that golden/peft_t5.py gives.
"""

import sys

import torch

from shared import HERE, filled, seq2seq_rows, write_rounded  # noqa: I001
from curves import read_rows
from parity import load_encoder, train_peft
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
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from virtual_tokens import hidden_state

STEPS, BATCH = 10, 2
T5 = (["layer_norm", "final_layer_norm"], "shared")
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
    "gemma": ("decoders/gemma", *LLAMA),
    "olmo2": ("decoders/olmo2", ["k_proj", "v_proj"], ["down_proj"], ["q_norm", "post_feedforward_layernorm"], "embed_tokens"),
    "granite": ("decoders/granite", *LLAMA),
    "smollm3": ("decoders/smollm3", *LLAMA),
    "starcoder2": ("decoders/starcoder2", ["k_proj", "v_proj"], ["mlp.c_proj"], ["input_layernorm", "norm"], "embed_tokens"),
    "phi": ("decoders/phi", ["k_proj", "v_proj"], ["fc2"], ["input_layernorm", "final_layernorm"], "embed_tokens"),
    "stablelm": ("decoders/stablelm", *LLAMA),
    "t5_v10": ("t5/v10", ["k", "v"], ["wo"], *T5),
    "t5_v11": ("t5/v11", ["q", "EncDecAttention.v"], ["wi_1"], *T5),
    "mt5": ("t5/mt5", ["k", "v"], ["wi_1"], *T5),
    "t5_uneven": ("t5/uneven", ["SelfAttention.k", "o"], ["wi_0"], *T5),
}
# what enters their blocks or their logits has a factor, or their head a bias
OTHER_HEADS = ["granite", "phi"]
# PEFT takes keys to be as wide as the model; over transformers 5 it takes every T5's head to be the embedding's matrix; its MiSS
# takes torch.nn.Linear alone, and GPT-2 is made of Conv1D
TOKENS, PREFIXES = ["trainable-tokens", "lora-tokens"], ["prefix-tuning", "prefix-projection"]
NOT_IN_PEFT = {"gpt2": ["miss"], "t5_uneven": PREFIXES, "t5_v11": TOKENS, "mt5": TOKENS + PREFIXES}


def methods(attention, feed_forward, norms, embedding):
    """name -> class and settings."""
    both = attention + feed_forward
    return {
        "lora": (LoraConfig, dict(r=2, lora_alpha=4, target_modules="all-linear")),
        "dora": (LoraConfig, dict(r=2, lora_alpha=4, target_modules=both, use_dora=True)),
        "adalora": (AdaLoraConfig, dict(init_r=3, target_r=2, lora_alpha=4, tinit=2, tfinal=3, deltaT=1, total_step=STEPS, target_modules=both)),
        "ia3": (IA3Config, dict(target_modules=both, feedforward_modules=feed_forward)),
        "vera": (VeraConfig, dict(r=4, target_modules=both)),
        "miss": (MissConfig, dict(r=4, target_modules=both)),
        "ln-tuning": (LNTuningConfig, dict(target_modules=norms)),
        "prompt-tuning": (PromptTuningConfig, dict(num_virtual_tokens=3)),
        "p-tuning": (PromptEncoderConfig, dict(num_virtual_tokens=3, encoder_hidden_size=6)),
        "prefix-tuning": (PrefixTuningConfig, dict(num_virtual_tokens=3)),
        "trainable-tokens": (TrainableTokensConfig, dict(target_modules=[embedding], token_indices=[3, 17, 5])),
    }


def more_methods(attention, *_places):
    """What is looked at over encoder-decoders besides, and over decoders with a head of another kind."""
    return {
        "p-tuning-lstm": (
            PromptEncoderConfig,
            # of two prompts below each other an LSTM makes the first see the second, which nothing reads
            dict(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=5, num_transformer_submodules=1),
        ),
        "prefix-projection": (PrefixTuningConfig, dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7)),
        "lora-tokens": (LoraConfig, dict(r=2, lora_alpha=4, target_modules=attention, trainable_token_indices=[3, 17, 5])),
        "lora-head": (LoraConfig, dict(r=2, lora_alpha=4, target_modules=[*attention, "lm_head"])),
    }


def fill(peft):
    """Gives what the adapter's file has, and an encoder that it leaves out, the values that the test gives them."""
    encoder = getattr(peft, "prompt_encoder", {"default": None})["default"]
    if hasattr(encoder, "encoder_type") or hasattr(encoder, "transform"):
        config = peft.peft_config["default"]
        names = hidden_state(encoder, config.peft_type.value, config.num_layers)
        load_encoder(encoder, {name: filled(name, value) for name, value in names.items()})
        with torch.no_grad():
            for name, p in peft.base_model.named_parameters():
                if p.requires_grad:  # a head beside it
                    p.copy_(filled(f"base_model.{name.replace('.modules_to_save.default', '')}", p))
        return
    # (PEFT would take the base's own head into the file of an adapter that adapts it)
    state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    # a tied head's tokens are the embedding's, by another name
    tokens = next((name for name in state if "trainable_tokens" in name and "head" not in name), None)
    source = {name: tokens if "trainable_tokens" in name else name for name in state}
    set_peft_model_state_dict(peft, {name: filled(source[name], value) for name, value in state.items()})


def used(peft):
    """Parameters that are trained; of the two prompts that PEFT makes for an encoder-decoder only one is read."""
    count, config = peft.get_nb_trainable_parameters()[0], peft.peft_config["default"]
    if config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        count -= (config.num_transformer_submodules - 1) * config.num_virtual_tokens * config.token_dim
    return count


def start(base):
    """The model, its rows and what PEFT calls its task."""
    if not base.startswith("t5/"):
        model = AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32, attn_implementation="eager")
        return model, read_rows(), "CAUSAL_LM"
    model = AutoModelForSeq2SeqLM.from_pretrained(HERE / base, dtype=torch.float32)
    return model, seq2seq_rows(base), "SEQ_2_SEQ_LM"


def main():
    (HERE / "matrix").mkdir(exist_ok=True)
    for family, (base, *places) in FAMILIES.items():
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        found, two_sided = {}, base.startswith("t5/")
        # steps of 5e-3 leave T5's tiny models where a gradient's rounding grows a hundredfold in ten steps
        rate = 1e-3 if two_sided else 5e-3
        for name, (kind, settings) in (methods(*places) | (more_methods(*places) if two_sided or family in OTHER_HEADS else {})).items():
            if name in NOT_IN_PEFT.get(family, ()):
                continue
            print(family, name, flush=True)
            model, rows, task = start(base)
            config = kind(task_type=task, **settings)
            peft = get_peft_model(model, config)
            fill(peft)
            peft = peft.double() if two_sided else peft
            curve = train_peft(peft.eval(), rows, STEPS, BATCH, 1, lr=rate)
            found[name] = {
                "config": {"peft_type": config.peft_type.value, "task_type": task, **settings},
                "trainable_parameters": used(peft),
                "losses": [loss for loss, _ in curve],
                "grad_norms": [norm for _, norm in curve],
            }
        write_rounded(HERE / "matrix" / f"{family}.json", {"base": base, "learning_rate": rate, "methods": found})


if __name__ == "__main__":
    main()
