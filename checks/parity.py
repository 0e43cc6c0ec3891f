"""engobe beside transformers and PEFT: losses of models, curves of training, adapters there and back, merges.

    python checks/parity.py [--seed N] [--only models|training|prompts|own] [--cases PREFIX]

Logits are compared through losses and greedy tokens (eval, generate), and, for adapters and merges, in PEFT itself.
"""

import argparse
import contextlib
import copy
import tempfile
from pathlib import Path
from unittest import mock

import torch
from common import CONFIGS, Report, engobe, greedy_logits, label_loss, make_model, make_rows, targets, train
from peft import (
    PeftConfig,
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def relative(a, b):
    return abs(a - b) / max(abs(b), 1e-12)


def models(report, work, seed):
    """Point 2: eval's loss and greedy tokens, for every configuration and storage."""
    kinds = [(name, changes, torch.float32, None) for name, changes in CONFIGS.items()]
    kinds += [
        ("bf16", CONFIGS["gqa_tied"], torch.bfloat16, None),
        ("f16_sharded", CONFIGS["plain"], torch.float16, "60KB"),
    ]
    for i, (name, changes, dtype, shard) in enumerate(kinds):
        directory = work / f"model-{name}"
        model = make_model(directory, seed + i, dtype, shard, **changes)
        rows = make_rows(work / "rows.jsonl", seed + i, 12, (5, 60))
        if name in ("dynamic", "longrope"):
            rows = make_rows(work / "rows.jsonl", seed + i, 6, (60, 60))  # rope depends on the longest row of a batch
        with torch.no_grad():
            total, count = label_loss(model, rows)
        found = engobe("eval", "--model", directory, "--data", work / "rows.jsonl")
        report(f"eval {name}", relative(found["loss"], total.item() / count), 1e-4)
        report.true(f"labels {name}", found["label_tokens"] == count)
        if name not in ("dynamic", "longrope"):
            prompt = rows[0]["input_ids"][:5]
            with torch.no_grad():
                out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
            ids = ",".join(map(str, prompt))
            text = engobe("generate", "--model", directory, "--prompt-ids", ids, "--max-new-tokens", 24)
            mine, theirs = text["token_ids"], out[0, len(prompt) :].tolist()
            report.true(f"greedy {name}", mine == theirs[: len(mine)] and len(mine) > 0, f"{len(mine)} tokens")


LORAS = {
    "default": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all_linear": dict(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj", "k_proj"],
        rank_pattern={"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
        alpha_pattern={"q_proj": 3},
        exclude_modules=["layers.1.self_attn.k_proj"],
    ),
    "regex": dict(r=2, lora_alpha=4, target_modules=r".*\.(up|gate)_proj"),
    "layers": dict(r=4, lora_alpha=8, target_modules=["o_proj", "up_proj"], layers_to_transform=[0, 2]),
    "saved": dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "saved_embed": dict(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    "head": dict(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"]),
    "bias_all": dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], bias="all"),
    "bias_lora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], bias="lora_only"),
    "dora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True),
    "bias_dora": dict(
        r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True, use_dora=True, bias="lora_only",
        rank_pattern={"down_proj": 2},
    ),
    "head_dora": dict(r=2, lora_alpha=8, target_modules=["o_proj", "lm_head"], use_dora=True),
    "bias_b": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_bias=True),
    "pissa": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"),
    "olora": dict(
        r=3, lora_alpha=4, target_modules=["o_proj", "down_proj"], init_lora_weights="olora", rank_pattern={"o_proj": 2}
    ),
    "pissa_dora": dict(r=2, lora_alpha=4, target_modules=["up_proj"], init_lora_weights="pissa", use_dora=True),
    "embed": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"]),
    "tied_embed": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    "tokens": dict(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=[3, 17, 5]),
    "tied_tokens": dict(r=4, lora_alpha=8, target_modules=["v_proj"], trainable_token_indices=[3, 17, 5]),
    "loraplus": dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"], loraplus=(8.0, 5e-4)),
    "bias_loraplus": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="lora_only", use_dora=True, loraplus=(4.0, 1e-6)
    ),
    "ia3": dict(peft_type="IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "bias_ia3": dict(
        peft_type="IA3", target_modules=r".*\.(q_proj|up_proj|o_proj)", feedforward_modules=r".*\.o_proj",
        modules_to_save=["norm"],
    ),
    "vera": dict(peft_type="VERA", r=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    "tied_vera": dict(peft_type="VERA", r=4, target_modules="all-linear", d_initial=0.3, projection_prng_key=5),
    "ln_tuning": dict(peft_type="LN_TUNING", target_modules=["input_layernorm", "norm"]),
    "adalora": dict(
        peft_type="ADALORA", init_r=4, target_r=2, tinit=3, tfinal=4, deltaT=2, total_step=20, lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
    ),
    "bias_adalora": dict(
        peft_type="ADALORA", init_r=3, target_r=1, tinit=1, tfinal=6, total_step=20, lora_alpha=4, beta1=0.7, beta2=0.9,
        orth_reg_weight=0.1, target_modules="all-linear",
    ),
    "only_tokens": dict(peft_type="TRAINABLE_TOKENS", token_indices=[1, 9, 30]),
    "tied_only_tokens": dict(peft_type="TRAINABLE_TOKENS", token_indices=[1, 9, 30]),
    # From the second iteration on, what is quantized has rounding errors of an SVD in it: once in some models a weight
    # next to the middle of two levels falls to the other side (losses 4e-4 apart were seen, 3e-7 elsewhere)
    "loftq": dict(
        r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="loftq",
        loftq_config={"loftq_bits": 4, "loftq_iter": 1},
    ),
    "loftq_again": dict(
        r=3, lora_alpha=3, target_modules="all-linear", init_lora_weights="loftq",
        loftq_config={"loftq_bits": 4, "loftq_iter": 3},
    ),
    "loftq_int8": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="loftq",
        loftq_config={"loftq_bits": 8, "loftq_iter": 2},
    ),
    "miss": dict(peft_type="MISS", r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "tied_miss": dict(peft_type="MISS", r=6, target_modules="all-linear", modules_to_save=["norm"]),
}
if not torch.cuda.is_available():
    # bitsandbytes' code for CPUs errs where blocks straddle the rows of a matrix, as those of down_proj do
    LORAS["loftq_again"]["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
CONFIGS_OF = {
    "LORA": LoraConfig, "ADALORA": AdaLoraConfig, "IA3": IA3Config, "VERA": VeraConfig, "MISS": MissConfig,
    "LN_TUNING": LNTuningConfig, "TRAINABLE_TOKENS": TrainableTokensConfig,
}


def peft_config(settings):
    """PEFT's configuration of an entry of LORAS; what only trains is left out."""
    settings = {k: v for k, v in settings.items() if k != "loraplus"}
    kind = settings.pop("peft_type", "LORA")
    return CONFIGS_OF[kind](task_type="CAUSAL_LM", **settings)

# The model that a setting is tried on: biases where there are some to train, a head of its own or a tied one.
KINDS = {"bias": "head_dim_bias", "default": "gqa_tied", "saved_embed": "gqa_tied", "tied": "gqa_tied"}


def kind_of(name):
    return next((kind for prefix, kind in KINDS.items() if name.startswith(prefix)), "plain")


def perturb(model, seed):
    """Makes a new adapter's B (and what else trains) random: an adapter of zeros proves little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.03)


def orthogonality(model):
    """AdaLoRA's penalty, which PEFT adds to the loss that a model works out itself; None for other methods."""
    if not hasattr(model.base_model, "update_and_allocate"):
        return None
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
    return model.peft_config["default"].orth_reg_weight * sum(norms) / len(norms)


def train_peft(model, rows, steps, batch, accumulation, lr=1e-3, loraplus=None):
    """What engobe does: loss normalised by the labels of the window, AdamW, linear schedule, clipping."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr)
    if loraplus:
        ratio, embedding = loraplus
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_lr_embedding=embedding,
            loraplus_weight_decay=0.01,
        )
    rates = [group["lr"] for group in optimizer.param_groups]
    lines, at = [], 0
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (steps - step) / steps
        optimizer.zero_grad()
        window = []
        for _ in range(accumulation):
            window.append(rows[at : at + batch])
            at += batch
            if at >= len(rows):
                at = 0
                break  # an epoch's last window may be short
        labels = sum(sum(l != -100 for l in targets(model, r)) for b in window for r in b)
        total = 0.0
        for b in window:
            loss, _ = label_loss(model, b)
            (loss / labels).backward()
            total += loss.item()
        penalty = orthogonality(model)
        if penalty is not None:
            penalty.backward()
            total += penalty.item() * labels
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        if penalty is not None:
            model.base_model.update_and_allocate(step)
        lines.append((total / labels, norm))
    return lines


def training(report, work, seed):
    """Points 3 and 4: curves from the same start, and both sides' files in the other."""
    for i, (name, lora) in enumerate(LORAS.items()):
        kind = kind_of(name)
        directory = work / f"base-{name}"
        base = make_model(directory, seed + 50 + i, **CONFIGS[kind])
        data = work / f"train-{name}.jsonl"
        accumulation = 4 if i % 2 else 1
        rows = make_rows(data, seed + i, 30, (4, 40))
        theirs = get_peft_model(copy.deepcopy(base), peft_config(lora))
        perturb(theirs, seed + i)
        start = work / f"start-{name}"
        theirs.save_pretrained(start)
        out = work / f"out-{name}"
        plus = lora.get("loraplus")
        more = ["--loraplus-lr-ratio", plus[0], "--loraplus-lr-embedding", plus[1]] if plus else []
        mine = train(directory, data, out, "--init-adapter", start, *more, "--gradient-accumulation", accumulation)
        curve = train_peft(theirs, rows, 20, 2, accumulation, loraplus=lora.get("loraplus"))
        report.true(f"{name}: 20 steps", len(mine) == 20)
        report(f"{name}: losses", max(relative(m["loss"], c[0]) for m, c in zip(mine, curve)), 1e-3)
        report(f"{name}: norms", max(relative(m["grad_norm"], c[1]) for m, c in zip(mine, curve)), 1e-2)
        exchange(report, work, name, base, directory, out, theirs, rows)


def keys_fit(report, name, base, out):
    """Every tensor of engobe's adapter has its place in PEFT's, and every place its tensor."""
    # what from_pretrained leaves out in silence; into a model of its own, as AdaLoRA's ranks are cut only once
    fresh = get_peft_model(copy.deepcopy(base), PeftConfig.from_pretrained(out))
    keys = set_peft_model_state_dict(fresh, load_peft_weights(out, device="cpu"))
    state = fresh.state_dict(keep_vars=True)
    held = {state[k].data_ptr() for k in state.keys() - set(keys.missing_keys)}
    adapters = ("lora_", "modules_to_save", "ia3_l", "vera_", "miss_", "ln_tuning_layers", "trainable_tokens_delta")
    # (a tied head's tokens and VeRA's matrices are tensors that go by several names)
    missing = [k for k in keys.missing_keys if any(p in k for p in adapters) and state[k].data_ptr() not in held]
    report.true(f"{name}: keys", not missing and not keys.unexpected_keys, f"{missing} {keys.unexpected_keys}")


def exchange(report, work, name, base, directory, out, theirs, rows):
    """engobe's adapter in PEFT, PEFT's in engobe, and the merged directory in transformers."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    keys_fit(report, name, base, out)
    with torch.no_grad():
        total, count = label_loss(loaded, rows)
        mine = engobe("eval", "--model", directory, "--adapter", out, "--data", work / f"train-{name}.jsonl")
        report(f"{name}: engobe's adapter in PEFT", relative(mine["loss"], total.item() / count), 1e-4)
        saved = work / f"peft-{name}"
        theirs.eval().save_pretrained(saved)
        total, count = label_loss(theirs, rows)
        mine = engobe("eval", "--model", directory, "--adapter", saved, "--data", work / f"train-{name}.jsonl")
        report(f"{name}: PEFT's adapter in engobe", relative(mine["loss"], total.item() / count), 1e-4)
    merged = work / f"merged-{name}"
    engobe("merge", "--model", directory, "--adapter", out, "--out", merged)
    whole, info = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    report.true(f"{name}: merged keys", not info["missing_keys"] and not info["unexpected_keys"], str(info)[:120])
    a, b = greedy_logits(whole.eval(), rows[0]["input_ids"]), greedy_logits(loaded, rows[0]["input_ids"])
    report(f"{name}: merged logits", ((a - b).abs().max() / b.abs().max()).item(), 1e-4)
    mine = engobe("eval", "--model", merged, "--data", work / f"train-{name}.jsonl")
    with torch.no_grad():
        total, count = label_loss(loaded, rows)
    report(f"{name}: merged in engobe", relative(mine["loss"], total.item() / count), 1e-4)


# name -> model, PEFT's configuration
PROMPTS = {
    "prompt": ("gqa_tied", PromptTuningConfig, dict(num_virtual_tokens=7)),
    "prompt_one": ("head_dim_bias", PromptTuningConfig, dict(num_virtual_tokens=1)),
    "prompt_rope": ("yarn", PromptTuningConfig, dict(num_virtual_tokens=20)),
    "p_mlp": ("gqa_tied", PromptEncoderConfig, dict(num_virtual_tokens=4, encoder_hidden_size=24)),
    "p_mlp_wide": ("plain", PromptEncoderConfig, dict(num_virtual_tokens=9)),
    "p_lstm": (
        "plain", PromptEncoderConfig,
        dict(num_virtual_tokens=6, encoder_reparameterization_type="LSTM", encoder_hidden_size=10, encoder_num_layers=2),
    ),
    "p_lstm_deep": (
        "mqa_theta", PromptEncoderConfig,
        dict(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_num_layers=3),
    ),
    "prefix": ("gqa_tied", PrefixTuningConfig, dict(num_virtual_tokens=4)),
    "prefix_long": ("head_dim_bias", PrefixTuningConfig, dict(num_virtual_tokens=30)),
    "prefix_one_head": ("mqa_theta", PrefixTuningConfig, dict(num_virtual_tokens=1)),
    "prefix_projection": (
        "gqa_tied", PrefixTuningConfig, dict(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=20)
    ),
    "prefix_projection_wide": ("plain", PrefixTuningConfig, dict(num_virtual_tokens=8, prefix_projection=True)),
}
METHODS = {PromptTuningConfig: "prompt-tuning", PromptEncoderConfig: "p-tuning", PrefixTuningConfig: "prefix-tuning"}


def take_encoder(theirs, start):
    """The encoder that engobe started from, in PEFT's."""
    (path,) = start.glob("checkpoints/*/adapter.safetensors")
    load_encoder(theirs.prompt_encoder["default"], load_file(path))


def load_encoder(encoder, ours):
    """Gives an encoder of PEFT's the values of engobe's, which has the outer projection of a prefix in pieces."""
    state = {}
    for name, value in encoder.state_dict().items():
        if f"encoder.{name}" in ours:
            state[name] = ours[f"encoder.{name}"]
        else:
            layers = len([k for k in ours if k.startswith(f"encoder.{name}.")]) // 2
            pieces = [ours[f"encoder.{name}.{i}.{half}"] for i in range(layers) for half in ("key", "value")]
            state[name] = torch.cat(pieces)
        assert state[name].shape == value.shape, name
    encoder.load_state_dict(state)


def greedy(model, ids, count):
    """Greedy tokens of a model whose whole input is run each time: no cache, whose length PEFT's prefixes confuse."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


def prompts(report, work, seed):
    """Prompts, their encoders and prefixes: curves from the same start, both sides' files in the other."""
    for i, (name, (kind, config, settings)) in enumerate(PROMPTS.items()):
        directory = work / f"base-{name}"
        base = make_model(directory, seed + 90 + i, **CONFIGS[kind])
        prompt(report, work, name, base, directory, config(task_type="CAUSAL_LM", **settings), seed + i)


def begin_with(theirs, config, directory, data, start, seed):
    """What makes engobe start as PEFT's model of virtual tokens does."""
    encoded = "encoder_reparameterization_type" in config.to_dict() or getattr(config, "prefix_projection", False)
    if encoded:
        # files hold what an encoder makes, so PEFT takes engobe's encoder; nothing is learned at a rate of 0
        keys = ("num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "prefix_projection")
        found = {k: getattr(config, k, None) for k in keys}
        spell = lambda v: str(v).lower() if isinstance(v, bool) else getattr(v, "value", v)
        sets = [part for k, v in found.items() if v is not None for part in ("--set", f"{k}={spell(v)}")]
        begin = ["--method", METHODS[type(config)], "--seed", seed, *sets]
        train(directory, data, start, *begin, "--save-steps", 1, steps=1, rate=0)
        take_encoder(theirs, start)
        return begin
    theirs.save_pretrained(start)
    return ["--init-adapter", start]


def prompt(report, work, name, base, directory, config, seed, vocab=160):
    """One of them."""
    data, accumulation = work / f"train-{name}.jsonl", 1 + seed % 3
    rows = make_rows(data, seed, 30, (4, 40), vocab=vocab)
    torch.manual_seed(seed)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()  # no dropout; the encoder goes on encoding
    start, out, saved = work / f"start-{name}", work / f"out-{name}", work / f"peft-{name}"
    begin = begin_with(theirs, config, directory, data, start, seed)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    mine = train(directory, data, out, *begin, "--gradient-accumulation", accumulation)
    curve = train_peft(theirs, rows, 20, 2, accumulation)
    report.true(f"{name}: 20 steps", len(mine) == 20)
    report(f"{name}: losses", max(relative(m["loss"], c[0]) for m, c in zip(mine, curve)), 1e-3)
    report(f"{name}: norms", max(relative(m["grad_norm"], c[1]) for m, c in zip(mine, curve)), 1e-2)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    theirs.save_pretrained(saved)
    for what, model, adapter in (("engobe's adapter in PEFT", loaded, out), ("PEFT's adapter in engobe", theirs, saved)):
        with torch.no_grad():
            total, count = label_loss(model, rows)
        found = engobe("eval", "--model", directory, "--adapter", adapter, "--data", data)
        report(f"{name}: {what}", relative(found["loss"], total.item() / count), 1e-4)
        ids = rows[1]["input_ids"][:6]
        said = engobe("generate", "--model", directory, "--adapter", adapter, "--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", 16)
        mine, expected = said["token_ids"], greedy(model, ids, 16)
        same = mine == expected[: len(mine)] and expected[len(mine) :][:1] in ([], [model.config.eos_token_id])
        report.true(f"{name}: {what}, greedy", same, f"{len(mine)} tokens")
    again = engobe("inspect", saved)["parameters"]
    report.true(f"{name}: parameters of the file", again == sum(v.numel() for v in load_file(saved / "adapter_model.safetensors").values()), f"{again}, trained {trained}")


def own(report, work, seed):
    """The base's own parameters, which PEFT has no method for, beside plain torch."""
    for i, (name, method, more, chosen) in enumerate([
        ("bitfit", "bitfit", [], lambda n: n.endswith(".bias")),
        ("bitfit of some", "bitfit", ["--target-modules", "q_proj,down_proj"], lambda n: n.endswith(("q_proj.bias", "down_proj.bias"))),
        ("full", "full", ["--target-modules", "v_proj,up_proj"], lambda n: "v_proj" in n or "up_proj" in n),
    ]):
        directory, data = work / f"own-{i}", work / f"own-{i}.jsonl"
        model = make_model(directory, seed + 120 + i, **CONFIGS["head_dim_bias"])
        rows = make_rows(data, seed + i, 30, (4, 40))
        for key, p in model.named_parameters():
            p.requires_grad_(chosen(key))
        out, merged = work / f"own-{i}-out", work / f"own-{i}-merged"
        mine = train(directory, data, out, "--method", method, *more, "--gradient-accumulation", 1 + i % 2)
        trained = engobe("inspect", out)["parameters"]
        report.true(f"{name}: parameters", trained == sum(p.numel() for p in model.parameters() if p.requires_grad), str(trained))
        curve = train_peft(model, rows, 20, 2, 1 + i % 2)
        report(f"{name}: losses", max(relative(m["loss"], c[0]) for m, c in zip(mine, curve)), 1e-3)
        report(f"{name}: norms", max(relative(m["grad_norm"], c[1]) for m, c in zip(mine, curve)), 1e-2)
        engobe("merge", "--model", directory, "--adapter", out, "--out", merged)
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        a, b = greedy_logits(whole, rows[0]["input_ids"]), greedy_logits(model, rows[0]["input_ids"])
        report(f"{name}: merged logits", ((a - b).abs().max() / b.abs().max()).item(), 1e-4)


def loftq_here():
    """PEFT's LoftQ computes on CUDA, by name; without a GPU `cuda` means the CPU here, where bitsandbytes has the same
    functions."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    to = torch.Tensor.to

    def on_cpu(self, *args, **more):
        cpu = lambda a: "cpu" if isinstance(a, (str, torch.device)) and str(a) == "cuda" else a
        return to(self, *map(cpu, args), **{k: cpu(v) for k, v in more.items()})

    return mock.patch.object(torch.Tensor, "to", on_cpu)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="models, training, prompts or own")
    parser.add_argument("--cases", default="", help="of training and prompts, those whose name begins so")
    args = parser.parse_args()
    LORAS, PROMPTS = ({k: v for k, v in all.items() if k.startswith(args.cases)} for all in (LORAS, PROMPTS))
    report = Report()
    with tempfile.TemporaryDirectory() as work, loftq_here():
        for part in (models, training, prompts, own):
            if args.only in part.__name__:
                part(report, Path(work), args.seed)
    report.exit()
