"""Random weights of a known model's shape, as transformers saves them.

    python make_model.py OUT {float32,bfloat16,float16} {smollm2,gpt2,t5}
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, LlamaConfig, T5Config
from transformers.utils import logging

logging.disable_progress_bar()

SHAPES = {
    # HuggingFaceTB/SmolLM2-135M's config.json
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # openai-community/gpt2's sizes are the defaults; dropout is off on both sides
    "gpt2": GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    # google-t5/t5-small's sizes; dropout is off on both sides
    "t5": T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, dropout_rate=0.0, decoder_start_token_id=0),
}


def main(out, dtype, shape):
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if SHAPES[shape].is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(SHAPES[shape]).to(getattr(torch, dtype)).save_pretrained(out)


main(*sys.argv[1:])
