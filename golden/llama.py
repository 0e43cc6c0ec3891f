"""Tiny random LLaMA models of transformers, with logits and greedy tokens.

    pip install -r golden/requirements.txt && python golden/llama.py

Writes golden/llama/NAME/: config.json, weights, expected.json. Weights are stored in 16 bits to keep the files small;
what is expected is computed in f32 from the stored values.
"""

import json
import shutil

import torch

from shared import HERE, write_expected  # noqa: I001
from common import CONFIGS, make_model

SMALL = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def expect(model, seed, out):
    """Logits and greedy tokens of the model, into out/expected.json."""
    torch.manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (1, 48))
    with torch.no_grad():
        # 24 tokens stay within the length that the scaled variants were trained for, 48 go beyond it
        logits = {n: model(ids[:, :n]).logits[0, [0, n // 2, n - 1]].double().tolist() for n in (24, 48)}
        greedy = model.generate(ids[:, :6], attention_mask=torch.ones(1, 6, dtype=torch.long), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = {"ids": ids[0].tolist(), "logits": {str(n): l for n, l in logits.items()}, "greedy": greedy[0, 6:].tolist()}
    write_expected(out, expected)
    (out / "generation_config.json").unlink(missing_ok=True)


def main():
    out = HERE / "llama"
    shutil.rmtree(out, ignore_errors=True)
    storage = {"gqa_tied": torch.bfloat16, "plain": torch.float32}
    for seed, (name, changes) in enumerate(CONFIGS.items()):
        changes = {**SMALL, **changes}
        if "head_dim" in changes:
            changes["head_dim"] = 12
        if name == "longrope":
            changes["rope_scaling"] = {
                **changes["rope_scaling"],
                "short_factor": [1.0, 1.1, 1.3, 1.4],
                "long_factor": [1.0, 1.5, 2.5, 4.0],
            }
        shard = "20KB" if name == "plain" else None
        model = make_model(out / name, seed, storage.get(name, torch.float16), shard, **changes)
        expect(model, seed, out / name)
    # transformers 4 wrote rope settings under other keys
    old = out / "llama3_old_keys"
    shutil.copytree(out / "llama3", old)
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (old / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
