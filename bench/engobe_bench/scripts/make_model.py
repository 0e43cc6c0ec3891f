"""Random weights of the SmolLM2-135M shape, as transformers saves them.

    python make_model.py OUT {float32,bfloat16,float16}
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

# HuggingFaceTB/SmolLM2-135M's config.json
SHAPE = dict(
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
)


def main(out, dtype):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).save_pretrained(out)


main(*sys.argv[1:])
