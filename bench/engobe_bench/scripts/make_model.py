"""Random weights of a known model's shape, as transformers saves them.

    python make_model.py OUT {float32,bfloat16,float16} {smollm2,gpt2,minilm,deberta,t5}

Encoders have a tokenizer too: each of the words w0, w1, ... is a token.
"""

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers import BertConfig, DebertaV2Config, GPT2Config, LlamaConfig, T5Config
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
    # sentence-transformers/all-MiniLM-L6-v2's config.json, with a head for two classes; dropout is off on both sides
    "minilm": BertConfig(
        vocab_size=30522,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    # microsoft/deberta-v3-small's config.json, with fewer words (those of the texts) and a head; dropout is off on both sides
    "deberta": DebertaV2Config(
        vocab_size=30522,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=12,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_relative_positions=-1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
}
ENCODERS = ["minilm", "deberta"]


def tokenizer(vocab_size):
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    words = {f"w{i}": len(special) + i for i in range(vocab_size - len(special))}
    made = Tokenizer(models.WordLevel({**special, **words}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def main(out, dtype, shape):
    torch.manual_seed(0)
    config = SHAPES[shape]
    encoder = shape in ENCODERS
    texts = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = (AutoModelForSequenceClassification if encoder else texts).from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    if encoder:
        tokenizer(config.vocab_size).save_pretrained(out)


main(*sys.argv[1:])
