"""Encoder-decoders beside transformers and PEFT, through the command line: losses, greedy tokens, ten steps, adapters of every
method there and back.

    python checks/seq2seq.py [--seed N] [--only NAME]

Models are random T5, mT5 and UMT5 of many shapes, saved as transformers saves them; rows are of token ids.
"""

import argparse
import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from common import Report, engobe, label_loss, make_rows, randomize, train
from parity import begin_with, keys_fit, peft_config, perturb, relative, train_peft
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

SIZES = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, decoder_start_token_id=0)
# name -> configuration, what differs from SIZES; one with a head of its own says tie_word_embeddings=False
CONFIGS = {
    "v10": (T5Config, dict()),
    "v11": (T5Config, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "narrow_heads": (T5Config, dict(d_kv=6, num_heads=3, relative_attention_num_buckets=16, relative_attention_max_distance=24)),
    "wide_heads": (T5Config, dict(d_kv=24, feed_forward_proj="gated-relu", tie_word_embeddings=False)),
    "deep_encoder": (T5Config, dict(num_layers=4, num_decoder_layers=1, feed_forward_proj="gelu")),
    "deep_decoder": (T5Config, dict(num_layers=1, num_decoder_layers=3, feed_forward_proj="gated-silu", relative_attention_num_buckets=64)),
    "few_buckets": (T5Config, dict(relative_attention_num_buckets=4, relative_attention_max_distance=3, feed_forward_proj="silu")),
    "odd_buckets": (T5Config, dict(relative_attention_num_buckets=7, relative_attention_max_distance=30, feed_forward_proj="tanh")),
    "gated_tied": (T5Config, dict(feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-3, decoder_start_token_id=7)),
    "gelu_new": (T5Config, dict(feed_forward_proj="gelu_new", tie_word_embeddings=False, pad_token_id=3, decoder_start_token_id=3)),
    "mt5": (MT5Config, dict(tie_word_embeddings=False)),
    "mt5_shapes": (MT5Config, dict(tie_word_embeddings=False, d_kv=10, num_heads=5, num_decoder_layers=3, feed_forward_proj="relu")),
    "umt5": (UMT5Config, dict(tie_word_embeddings=False, num_decoder_layers=3)),
    "umt5_tied": (UMT5Config, dict(d_kv=6, num_heads=3, relative_attention_num_buckets=9, relative_attention_max_distance=30)),
    "mt5_tied": (MT5Config, dict(relative_attention_max_distance=40)),
}
# every method, over a tied head and one of its own
OVER = ["v10", "v11"]
LORAS = {
    "lora": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "lora_some": dict(r=3, lora_alpha=6, target_modules=["EncDecAttention.v", "SelfAttention.q", "wo"], modules_to_save=["relative_attention_bias"]),
    "rslora_layers": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q", "o"], layers_to_transform=[1]),
    "patterns": dict(
        r=4, lora_alpha=8, target_modules=r"decoder\..*EncDecAttention\.(q|v)|encoder\..*\.o", rank_pattern={"o": 2},
        alpha_pattern={r"decoder\.block\.1\..*\.v": 3},
    ),
    "excluded": dict(r=4, lora_alpha=8, target_modules=["q", "v", "wo"], exclude_modules=["EncDecAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"]),
    "saved_head": dict(r=4, lora_alpha=8, target_modules=["v"], modules_to_save=["lm_head", "final_layer_norm"]),
    "olora": dict(r=3, lora_alpha=4, target_modules=["o", "wo"], init_lora_weights="olora"),
    "dora_all": dict(r=2, lora_alpha=4, target_modules="all-linear", use_dora=True, use_rslora=True),
    "ia3_all": dict(peft_type="IA3", target_modules=["q", "EncDecAttention.k", "o", "wi_0", "wi", "wo"], feedforward_modules=["wi_0", "wi", "wo"]),
    "dora": dict(r=4, lora_alpha=8, target_modules=["q", "v"], use_dora=True),
    "pissa": dict(r=4, lora_alpha=8, target_modules=["q", "v"], init_lora_weights="pissa"),
    "lora_head": dict(r=4, lora_alpha=8, target_modules=["q", "lm_head"]),
    "adalora": dict(peft_type="ADALORA", init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=10, lora_alpha=8, target_modules=["q", "v", "o"]),
    "ia3": dict(peft_type="IA3", target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
    "vera": dict(peft_type="VERA", r=6, target_modules=["q", "v"]),
    "miss": dict(peft_type="MISS", r=8, target_modules=["q", "v", "o"]),
    "ln_tuning": dict(peft_type="LN_TUNING", target_modules=["layer_norm", "final_layer_norm"]),
    "tokens": dict(peft_type="TRAINABLE_TOKENS", token_indices=[1, 9, 30]),
    "lora_tokens": dict(r=4, lora_alpha=8, target_modules=["q"], trainable_token_indices=[3, 17, 5]),
}
# over transformers 5 PEFT puts the embedding's trained rows into every T5's head, its own or not
OF_TIED = ["tokens", "lora_tokens"]
# a T5 whose head is the embedding's matrix scales what it reads, and no configuration of transformers 4 has that of another head
CHANGES_HEAD = ["lora_head", "saved_head"]
VIRTUAL = {
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    # PEFT makes two prompts unless it is told not to, of which the second is not read
    "p_twice": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=12),
    "p_mlp": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=12, num_transformer_submodules=1),
    "p_lstm": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=6, num_transformer_submodules=1
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4),
    "prefix_projection": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=10),
}
NEW_TOKENS = 16


def make(directory, kind, changes, seed):
    """A random model, saved as transformers does it, and read again."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(kind(**{**SIZES, **changes}))
    if changes.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    randomize(model)
    model.save_pretrained(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    own = model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert own == (changes.get("tie_word_embeddings") is False)
    return model


def greedy(model, source):
    """Greedy tokens without a cache: transformers makes one for as many layers as the encoder has, and PEFT's prefixes are lost
    in it."""
    said = [model.config.decoder_start_token_id]
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([said]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
    return said[1:]


def same(report, name, model, directory, adapter, data, rows):
    """The losses and greedy tokens of both."""
    with torch.no_grad():
        total, count = label_loss(model, rows)
    more = ["--adapter", adapter] if adapter else []
    found = engobe("eval", "--model", directory, *more, "--data", data)
    report(f"{name}: loss", relative(found["loss"], float(total) / count), 1e-4)
    for row in rows[:2]:
        ids = ",".join(map(str, row["input_ids"]))
        said = engobe("generate", "--model", directory, *more, "--prompt-ids", ids, "--max-new-tokens", NEW_TOKENS)
        mine, theirs = said["token_ids"], greedy(model, row["input_ids"])
        good = mine == theirs[: len(mine)] and theirs[len(mine) :][:1] in ([], [model.config.eos_token_id])
        report.true(f"{name}: greedy", good, f"{len(mine)} tokens" if good else f"{mine} {theirs}")


def method(report, work, name, base, directory, config, seed, data, rows):
    """Ten steps from one start; engobe's adapter in PEFT, and PEFT's in engobe."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    config.task_type = "SEQ_2_SEQ_LM"
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    start, out, saved = work / f"start-{name}", work / f"out-{name}", work / f"peft-{name}"
    if not config.is_prompt_learning:
        perturb(theirs, seed)
    twice = isinstance(config, PromptEncoderConfig) and config.num_transformer_submodules == 2
    begin = begin_with(theirs, config, directory, data, start, seed) if not twice else ["--method", "p-tuning", "--num-virtual-tokens", 4]
    mine = train(directory, data, out, *begin, steps=10)
    curve = train_peft(theirs, rows, 10, 2, 1)
    if not twice:
        report(f"{name}: losses", max(relative(m["loss"], c[0]) for m, c in zip(mine, curve, strict=True)), 1e-3)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    if not config.is_prompt_learning:
        keys_fit(report, name, base, out)
    same(report, f"{name}: engobe's in PEFT", loaded, directory, out, data, rows)
    theirs.save_pretrained(saved)
    same(report, f"{name}: PEFT's in engobe", theirs, directory, saved, data, rows)
    tied = base.lm_head.weight.data_ptr() == base.shared.weight.data_ptr()
    if tied and name.split()[-1] in CHANGES_HEAD and base.config.model_type == "t5":
        done = engobe("merge", "--model", directory, "--adapter", out, "--out", work / "refused", ok=False)
        report.true(f"{name}: merge is refused", done.returncode == 1 and "keep the adapter as it is" in done.stderr, done.stderr.strip())
    elif not config.is_prompt_learning:
        merged(report, f"{name}: merged", loaded, directory, out, work / f"merged-{name}", data, rows)


def merged(report, name, loaded, directory, adapter, out, data, rows):
    """What is merged says in transformers and in engobe what base and adapter say; so does it over a configuration of
    transformers 4."""
    with torch.no_grad():
        total, count = label_loss(loaded, rows)
    for older in (False, True):
        base = Path(f"{directory}-older") if older else directory
        if older:
            as_transformers_4(directory, base)
        out = Path(f"{out}-older") if older else out
        engobe("merge", "--model", base, "--adapter", adapter, "--out", out)
        whole, info = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        report.true(f"{name}: keys", not info["missing_keys"] and not info["unexpected_keys"], str(info)[:120])
        with torch.no_grad():
            found, _ = label_loss(whole.eval(), rows)
        report(f"{name}: in transformers", relative(float(found), float(total)), 1e-4)
        mine = engobe("eval", "--model", out, "--data", data)
        report(f"{name}: in engobe", relative(mine["loss"], float(total) / count), 1e-4)


def as_transformers_4(directory, to):
    """The same model with a configuration as transformers 4 wrote it: `tie_word_embeddings` says whether states are scaled."""
    shutil.copytree(directory, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    if config["model_type"] == "t5":
        config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
    (to / "config.json").write_text(json.dumps(config))


def main(seed, only):
    report = Report()
    for i, (name, (kind, changes)) in enumerate(CONFIGS.items()):
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            directory, data = work / "base", work / "rows.jsonl"
            base = make(directory, kind, changes, seed + i)
            rows = make_rows(data, seed + i, 12, (3, 40), vocab=SIZES["vocab_size"], answers=(1, 30))
            same(report, name, base, directory, None, data, rows)
            configs = {key: peft_config(settings) for key, settings in LORAS.items()} | VIRTUAL
            for j, (key, config) in enumerate(configs.items()):
                if name in OVER and not (key in OF_TIED and changes.get("tie_word_embeddings") is False) or key == "lora":
                    method(report, work, f"{name} {key}", base, directory, config, seed + j, data, rows)
    report.exit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    main(args.seed, args.only)
