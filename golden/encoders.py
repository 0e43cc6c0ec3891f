"""Tiny random encoders of transformers, with hidden states of padded batches.

    pip install -r golden/requirements.txt && python golden/encoders.py [FAMILY or NAME ...]

Writes golden/encoders/NAME/: config.json, weights, expected.json. Weights are stored in 16 bits to keep the files small;
what is expected is computed in f32 from the stored values. Rows are of different lengths, padded and masked here.
Models whose name ends in `_task` are stored with a classification head, so that names carry the task model's prefix.
"""

import random
import shutil
import sys
from pathlib import Path

import torch
from shared import write_rounded
from tiny import padded, randomise, store, token_rows
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

HERE = Path(__file__).resolve().parent
BERT = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40)
DISTIL = dict(vocab_size=40, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40)
DEBERTA = dict(**BERT, relative_attention=True, position_biased_input=False, type_vocab_size=0, pos_att_type=["p2c", "c2p"])
MODERN = dict(**BERT, local_attention=8, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)

# name -> model_type, settings
MODELS = {
    "bert": ("bert", dict(**BERT)),
    "bert_relu_task": ("bert", dict(**BERT, hidden_act="relu", type_vocab_size=3, layer_norm_eps=1e-5)),
    "bert_gelu_new": ("bert", {**BERT, "hidden_act": "gelu_new", "num_attention_heads": 2, "intermediate_size": 56}),
    "roberta": ("roberta", dict(**BERT, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)),
    "roberta_pad_0_task": ("roberta", dict(**BERT, type_vocab_size=2, pad_token_id=0)),
    "distilbert": ("distilbert", dict(**DISTIL)),
    "distilbert_sinusoidal_task": ("distilbert", dict(**DISTIL, sinusoidal_pos_embds=True, activation="relu")),
    "deberta_v3": ("deberta-v2", dict(**DEBERTA, position_buckets=6, share_att_key=True, norm_rel_ebd="layer_norm")),
    "deberta_v2_conv_task": ("deberta-v2", dict(**DEBERTA, position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3, conv_act="gelu")),
    "deberta_projected": ("deberta-v2", {**DEBERTA, "position_buckets": -1, "max_relative_positions": 9, "position_biased_input": True, "type_vocab_size": 2, "embedding_size": 24}),
    "deberta_c2p": ("deberta-v2", {**DEBERTA, "position_buckets": 8, "pos_att_type": ["c2p"]}),
    "modernbert": ("modernbert", dict(**{**MODERN, "num_hidden_layers": 4})),
    "modernbert_bias_task": ("modernbert", dict(**{**MODERN, "num_hidden_layers": 3}, attention_bias=True, mlp_bias=True, norm_bias=True, global_attn_every_n_layers=2, global_rope_theta=5e4, local_rope_theta=500.0)),
    "xlm_roberta_task": ("xlm-roberta", dict(**BERT, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)),
    "camembert": ("camembert", dict(**BERT, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)),
    "deberta_more_buckets": ("deberta-v2", {**DEBERTA, "hidden_size": 16, "position_buckets": 16, "max_relative_positions": 5, "share_att_key": True}),
    "electra_task": ("electra", dict(**BERT, embedding_size=24)),
}


def hidden_rows(model, rows, types, pad):
    """Hidden states of the first, middle and last token of each row, and the pooler's output if there is one."""
    ids, mask = padded(rows, pad)
    more = {"token_type_ids": padded(types, 0)[0]} if types else {}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **more)
    picked = [[out.last_hidden_state[i, j].tolist() for j in (0, len(r) // 2, len(r) - 1)] for i, r in enumerate(rows)]
    pooled = out.get("pooler_output")
    return picked, None if pooled is None else pooled.tolist()


def main(wanted):
    out = HERE / "encoders"
    for seed, (name, (kind, settings)) in enumerate(MODELS.items()):
        if wanted and not {kind, name} & set(wanted):
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        config = AutoConfig.for_model(kind, **settings)
        task = name.endswith("_task")
        model = (AutoModelForSequenceClassification if task else AutoModel).from_config(config)
        randomise(model, seed)
        model = store(model, out / name, torch.bfloat16 if seed % 2 else torch.float16)
        base = model.base_model if task else model
        rows = token_rows(seed, (1, 7, 24, 38), config.vocab_size)
        kinds = getattr(config, "type_vocab_size", 0)
        rng = random.Random(seed)
        types = [[rng.randrange(kinds) for _ in row] for row in rows] if kinds > 1 else None
        picked, pooled = hidden_rows(base, rows, types, config.pad_token_id)
        write_rounded(out / name / "expected.json", {"rows": rows, "types": types, "hidden": picked, "pooled": pooled})


if __name__ == "__main__":
    main(sys.argv[1:])
