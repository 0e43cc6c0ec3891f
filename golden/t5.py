"""Tiny random T5, mT5 and UMT5 models of transformers, with logits of padded batches and greedy tokens.

    pip install -r golden/requirements.txt && python golden/t5.py

Writes golden/t5/NAME/: config.json, weights, expected.json. Weights are stored in 16 bits to keep the files small; what is
expected is computed in f32 from the stored values. Rows are of different lengths, padded and masked here.
"""

import json
import shutil

import torch
from shared import HERE, write_expected
from tiny import padded, randomise, store, token_rows
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

SIZES = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)

MODELS = {
    "v10": dict(**SIZES, relative_attention_num_buckets=8, relative_attention_max_distance=20),
    "v11": dict(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "uneven": {**SIZES, "d_kv": 12, "num_heads": 2, "num_decoder_layers": 3, "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 12, "relative_attention_max_distance": 16},
    "mt5": {**SIZES, "d_kv": 6, "num_heads": 3, "num_layers": 1, "num_decoder_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 30},
    "umt5": {**SIZES, "d_kv": 6, "num_heads": 3, "num_decoder_layers": 1, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 25},
}
KINDS = {"mt5": MT5Config, "umt5": UMT5Config}
NEW_TOKENS = 16


def main():
    out = HERE / "t5"
    shutil.rmtree(out, ignore_errors=True)
    for seed, (name, settings) in enumerate(MODELS.items()):
        multilingual = name in KINDS
        model = AutoModelForSeq2SeqLM.from_config(KINDS.get(name, T5Config)(**settings))
        untied = settings.get("tie_word_embeddings") is False or multilingual
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(SIZES["vocab_size"], SIZES["d_model"]))
        randomise(model, seed, 0.2)
        model.config.tie_word_embeddings = not untied or name == "umt5"
        model = store(model, out / name, torch.bfloat16 if seed % 2 else torch.float16)
        if not multilingual:
            # transformers 5 writes true whatever it read; checkpoints of v1.1 say false, and mean by it that states are not scaled
            config = json.loads((out / name / "config.json").read_text())
            config["tie_word_embeddings"] = not untied
            config.pop("scale_decoder_outputs", None)
            (out / name / "config.json").write_text(json.dumps(config, indent=2))
        model = AutoModelForSeq2SeqLM.from_pretrained(out / name, dtype=torch.float32).eval()
        assert multilingual or model.config.scale_decoder_outputs == (not untied)
        assert (model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()) == untied
        sources = token_rows(seed, (3, 30, 11, 1), SIZES["vocab_size"])
        labels = token_rows(seed + 50, (12, 5, 1, 25), SIZES["vocab_size"])
        ids, mask = padded(sources, 0)
        targets, _ = padded(labels, -100)
        with torch.no_grad():
            result = model(ids, attention_mask=mask, labels=targets)
            # without a cache: transformers makes one for as many layers as the encoder has
            greedy = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, use_cache=False)
        picked = [[result.logits[i, j].tolist() for j in (0, len(r) // 2, len(r) - 1)] for i, r in enumerate(labels)]
        tokens = [row[1:].tolist() for row in greedy]
        write_expected(out / name, {"sources": sources, "labels": labels, "logits": picked, "loss": result.loss.item(), "greedy": tokens})


if __name__ == "__main__":
    main()
