"""Every family of encoders beside transformers and PEFT, on random configurations: vectors, losses and predictions of models
saved with their heads, ten steps of LoRA, adapters read by PEFT, merged directories.

    python checks/encoders.py [--seed N] [--rounds N] [--only FAMILY]

Each round draws a configuration of each family, and one of four tasks for it. Texts, pairs and words go through tokenizers of crates/data/tests/golden/tasks.
"""

import argparse
import copy
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from common import ROOT, Report, engobe, randomize
from parity import perturb, relative
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

TOKENIZERS = ROOT / "crates/data/tests/golden/tasks"
WORDS = ("the cat sat on the mat a stirring , funny and finally transporting re-imagining nothing new under sun ! no jim henson was"
         " puppeteer one long string of cliches 19 unaffable ?").split()
NAMES = ["bad", "good", "so-so", "O", "B-X", "I-X"]
STEPS, BATCH, RATE = 10, 4, 5e-3
# family -> tokenizer, layers that LoRA adapts
FAMILIES = {
    "bert": ("bert", ["query", "value", "dense"]),
    "roberta": ("roberta", ["query", "key", "intermediate.dense"]),
    "distilbert": ("bert", ["q_lin", "v_lin", "lin1"]),
    "electra": ("bert", ["query", "value", "dense", "embeddings_project"]),
    "deberta": ("deberta", ["query_proj", "key_proj", "value_proj", "intermediate.dense"]),
    "modernbert": ("roberta", ["Wqkv", "Wi", "mlp.Wo"]),
}


def draw(family, rng, tokenizer):
    """Hugging Face's model_type and a configuration."""
    heads = rng.choice([1, 2, 4])
    width = heads * rng.choice([6, 8, 12])
    layers, inner, act = rng.randint(1, 4), rng.choice([24, 40, 56]), rng.choice(["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "gelu_python"])
    pad = tokenizer.pad_token_id
    common = dict(vocab_size=len(tokenizer) + rng.randint(0, 9), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                  intermediate_size=inner, max_position_embeddings=rng.choice([160, 200]), pad_token_id=pad, hidden_act=act)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    common["layer_norm_eps"] = rng.choice([1e-12, 1e-7, 1e-5])
    if family == "bert":
        return "bert", {**common, **still, "type_vocab_size": rng.choice([2, 3])}
    if family == "electra":
        return "electra", {**common, **still, "type_vocab_size": 2, "embedding_size": rng.choice([width, 10])}
    if family == "roberta":
        return rng.choice(["roberta", "xlm-roberta", "camembert"]), {**common, **still, "type_vocab_size": rng.choice([1, 2])}
    if family == "distilbert":
        return "distilbert", dict(
            vocab_size=common["vocab_size"], dim=width, n_layers=layers, n_heads=heads, hidden_dim=inner, pad_token_id=pad, activation=rng.choice(["gelu", "relu"]),
            max_position_embeddings=170, sinusoidal_pos_embds=rng.random() < 0.5, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    if family == "deberta":
        conv = rng.choice([0, 0, 3, 5])
        return "deberta-v2", {
            **common, **still, "type_vocab_size": rng.choice([0, 2]), "position_biased_input": rng.random() < 0.5, "relative_attention": rng.random() < 0.85,
            "pos_att_type": rng.choice([["p2c", "c2p"], ["c2p"], ["p2c"], "c2p|p2c", []]), "share_att_key": rng.random() < 0.5,
            "position_buckets": rng.choice([-1, 4, 6, 16]), "max_relative_positions": rng.choice([-1, 5, 24]),
            "norm_rel_ebd": rng.choice(["none", "layer_norm"]), "conv_kernel_size": conv, "conv_act": rng.choice(["tanh", "gelu"]),
            "embedding_size": rng.choice([width, 20]), "pooler_dropout": 0.0, "pooler_hidden_act": rng.choice(["gelu", "tanh"]),
            "pooler_hidden_size": width}
    common.pop("layer_norm_eps"), common.pop("hidden_act")
    return "modernbert", {
        **common, "hidden_activation": act, "local_attention": rng.choice([2, 6, 8, 128]), "global_attn_every_n_layers": rng.choice([1, 2, 3]),
        "attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5, "norm_bias": rng.random() < 0.5, "norm_eps": rng.choice([1e-5, 1e-6]),
        "decoder_bias": rng.random() < 0.5, "tie_word_embeddings": rng.random() < 0.5, "classifier_pooling": rng.choice(["cls", "mean"]),
        "classifier_bias": rng.random() < 0.5, "classifier_activation": rng.choice(["gelu", "relu"]), "classifier_dropout": 0.0,
        "embedding_dropout": 0.0, "attention_dropout": 0.0, "mlp_dropout": 0.0, "deterministic_flash_attn": rng.random() < 0.5,
        "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}


def text(rng, most=14):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def rows_of(task, rng, names, pairs):
    """Twelve rows, as a file has them."""
    if task == "token-cls":
        rows = [rng.choices(WORDS, k=rng.randint(1, 12)) for _ in range(12)]
        return [{"tokens": words, "tags": [rng.choice(names) for _ in words]} for words in rows]
    label = {"regression": lambda i: round(rng.gauss(0, 2), 3), "multi-label": lambda i: [n for n in names if rng.random() < 0.4],
             "seq-cls": lambda i: names[i % len(names)]}[task]
    return [{"text": text(rng), **({"text_pair": text(rng)} if pairs else {}), "label": label(i)} for i in range(12)]


def encoded(tokenizer, rows, task, names):
    """A padded batch with labels."""
    if task == "token-cls":
        spaced = tokenizer.cls_token == "<s>"
        # RoBERTa's tokenizer is used with add_prefix_space=True for words
        words = [[" " * spaced + word for word in r["tokens"]] for r in rows]
        batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full(batch["input_ids"].shape, -100)
        firsts = []
        for i, row in enumerate(rows):
            words, seen = batch.word_ids(i), set()
            at = [j for j, word in enumerate(words) if word is not None and not (word in seen or seen.add(word))]
            labels[i, at] = torch.tensor([names.index(row["tags"][words[j]]) for j in at])
            firsts.append({words[j]: j for j in at})
        return batch, labels, firsts
    pairs = [[r["text_pair"] for r in rows]] if "text_pair" in rows[0] else []
    batch = tokenizer([r["text"] for r in rows], *pairs, padding=True, return_tensors="pt")
    of = {"regression": lambda r: r["label"], "multi-label": lambda r: [float(n in r["label"]) for n in names], "seq-cls": lambda r: names.index(r["label"])}[task]
    return batch, torch.tensor([of(r) for r in rows]), None


def fitting(model, batch):
    """The inputs that the model takes."""
    kinds = getattr(model.config, "type_vocab_size", 0)
    return {k: v for k, v in batch.items() if k != "token_type_ids" or kinds > 1}


def vectors(report, name, work, directory, rows, tokenizer, model, adapter=None):
    """Of texts or pairs, one of them longer than the model reads; `adapter` is on the model already."""
    config = model.config
    # RoBERTa's kin begin behind the padding's row
    limit = config.max_position_embeddings - (config.pad_token_id + 1 if "roberta" in config.model_type or "camembert" in config.model_type else 0)
    texts = [[r[key] for r in rows] for key in ("text", "text_pair") if key in rows[0]]
    batch = tokenizer(*texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    data, more = work / "texts.jsonl", ["--adapter", adapter] if adapter else []
    data.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "label"}) + "\n" for r in rows))
    with torch.no_grad():
        hidden = model(**fitting(model, batch)).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    for pooling, expected in {"cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1)}.items():
        out = work / "vectors.jsonl"
        engobe("embed", "--model", directory, "--data", data, "--out", out, "--pooling", pooling, *more)
        mine = torch.tensor([json.loads(line) for line in out.read_text().splitlines()])
        what = f"{name}: vectors, {pooling}{', adapted' if adapter else ''}"
        report(what, ((mine - expected).abs().max() / expected.abs().max()).item(), 1e-4)


def compared(said, logits, task, names, firsts):
    """The largest difference of predictions in the file `said`."""
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    if task == "regression":
        return max(abs(line["prediction"] - z.item()) for line, z in zip(lines, logits, strict=True)) / max(1.0, logits.abs().max().item())
    if task == "token-cls":
        theirs = [[names[logits[i, at[w]].argmax()] if w in at else None for w in range(len(line["tags"]))] for i, (line, at) in enumerate(zip(lines, firsts, strict=True))]
        return float(sum(a != b for line, row in zip(lines, theirs) for a, b in zip(line["tags"], row, strict=True)))
    scores = logits.sigmoid() if task == "multi-label" else logits.softmax(-1)
    return max(abs(line["scores"][n] - scores[i, j].item()) for i, line in enumerate(lines) for j, n in enumerate(names))


def train_theirs(peft, batches):
    params = [p for p in peft.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(params, lr=RATE), []
    peft.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (STEPS - step) / STEPS
        optimizer.zero_grad()
        loss = peft(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def one(report, work, family, round_, seed):
    kind, targets = FAMILIES[family]
    rng = random.Random(f"{family} {seed} {round_}")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / kind)
    model_type, settings = draw(family, rng, tokenizer)
    task = ["seq-cls", "token-cls", "regression", "multi-label"][(round_ + list(FAMILIES).index(family)) % 4]
    names = NAMES[3:] if task == "token-cls" else NAMES[: 1 if task == "regression" else rng.choice([2, 3])]
    name = f"{model_type} {round_} {task}"
    print(name, {k: v for k, v in settings.items() if v != 0.0 or k == "type_vocab_size"}, flush=True)
    problem = {"seq-cls": "single_label_classification", "multi-label": "multi_label_classification", "regression": "regression", "token-cls": None}[task]
    config = AutoConfig.for_model(model_type, num_labels=len(names), problem_type=problem, **settings)
    config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    torch.manual_seed(seed + round_)
    auto = AutoModelForTokenClassification if task == "token-cls" else AutoModelForSequenceClassification
    model = auto.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    directory = work / "model"
    shutil.copytree(TOKENIZERS / kind, directory)
    model.save_pretrained(directory)
    bare = work / "bare"
    shutil.copytree(TOKENIZERS / kind, bare)
    model.base_model.save_pretrained(bare)

    pairs = rng.random() < 0.5
    texts = rows_of("seq-cls", rng, NAMES[:2], pairs)
    texts[3]["text"] = " ".join(rng.choices(WORDS, k=90))
    vectors(report, name, work, rng.choice([directory, bare]), texts, tokenizer, model.base_model)
    adapted = get_peft_model(copy.deepcopy(model.base_model), LoraConfig(task_type="FEATURE_EXTRACTION", r=2, lora_alpha=4, target_modules=targets))
    perturb(adapted, seed)
    adapted.eval().save_pretrained(work / "features")
    vectors(report, name, work, rng.choice([directory, bare]), texts, tokenizer, adapted, work / "features")

    rows = rows_of(task, rng, names, pairs)
    data, said = work / "rows.jsonl", work / "said.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = "seq-cls" if task == "multi-label" else task
    found = engobe("eval", "--model", directory, "--task", asked, "--data", data, "--predictions", said)
    batch, labels, firsts = encoded(tokenizer, rows, task, names)
    with torch.no_grad():
        expected = model(**fitting(model, batch), labels=labels)
    report(f"{name}: loss", relative(found["loss"], expected.loss.item()), 1e-4)
    report(f"{name}: predictions", compared(said, expected.logits, task, names, firsts), 1e-4)

    peft = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS" if task == "token-cls" else "SEQ_CLS", r=2, lora_alpha=4, target_modules=targets))
    perturb(peft, seed)
    start, out = work / "start", work / "out"
    peft.save_pretrained(start)
    engobe("train", "--model", directory, "--task", asked, "--data", data, "--out", out, "--init-adapter", start, "--no-shuffle", "--max-steps", STEPS,
           "--batch-size", BATCH, "--learning-rate", RATE, "--lr-scheduler", "linear", "--allow", "duplicate-rows")
    batches = []
    for i in range(0, len(rows), BATCH):
        batch, labels, _ = encoded(tokenizer, rows[i : i + BATCH], task, names)
        batches.append({**fitting(model, batch), "labels": labels})
    curve = train_theirs(peft, batches)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    report(f"{name}: ten losses", max(relative(line["loss"], loss) for line, loss in zip(lines, curve, strict=True)), 1e-3)

    engobe("eval", "--model", directory, "--adapter", out, "--data", data, "--predictions", said)
    again = PeftModel.from_pretrained(auto.from_pretrained(directory, dtype=torch.float32), out).eval()
    batch, _, firsts = encoded(tokenizer, rows, task, names)
    with torch.no_grad():
        logits = again(**fitting(model, batch)).logits
    report(f"{name}: adapter in PEFT", compared(said, logits, task, names, firsts), 1e-4)

    merged_in_transformers(report, name, directory, out, work / "merged", auto, batch, logits, config)


def merged_in_transformers(report, name, directory, out, merged, auto, batch, logits, config):
    engobe("merge", "--model", directory, "--adapter", out, "--out", merged)
    read, told = auto.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        apart = (read.eval()(**fitting(read, batch)).logits - logits).abs().max() / logits.abs().max().clamp(min=1.0)
    report(f"{name}: merged, in transformers", apart.item(), 1e-4)
    # DeBERTa without relative positions has a norm of theirs that nothing reads
    missing = [key for key in told["missing_keys"] if "encoder.LayerNorm" not in key or config.relative_attention]
    report.true(f"{name}: merged", not missing and not told["unexpected_keys"] and list(read.config.id2label.values()) == list(config.id2label.values()), str(told))


def from_masked_model(report, work, family, round_, seed):
    """A head over what a masked language model left: whatever it lacks begins at random, is trained and saved."""
    kind, targets = FAMILIES[family]
    rng = random.Random(f"masked {family} {seed} {round_}")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / kind)
    model_type, settings = draw(family, rng, tokenizer)
    torch.manual_seed(seed + round_)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **settings))
    randomize(model)
    directory, out, data, said = work / "masked", work / "masked-out", work / "masked.jsonl", work / "said.jsonl"
    shutil.copytree(TOKENIZERS / kind, directory)
    model.save_pretrained(directory)
    rows = rows_of("seq-cls", rng, NAMES[:3], False)
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    engobe("train", "--model", directory, "--task", "seq-cls", "--data", data, "--out", out, "--target-modules", ",".join(targets), "--r", 2,
           "--max-steps", 4, "--batch-size", BATCH, "--learning-rate", RATE, "--allow", "duplicate-rows")
    names = sorted(NAMES[:3])
    engobe("eval", "--model", directory, "--adapter", out, "--data", data, "--predictions", said)
    again = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(names), dtype=torch.float32)
    again = PeftModel.from_pretrained(again, out).eval()
    batch, _, _ = encoded(tokenizer, rows, "seq-cls", names)
    with torch.no_grad():
        logits = again(**fitting(model, batch)).logits
    name = f"{model_type} {round_} from a masked model"
    report(f"{name}: adapter in PEFT", compared(said, logits, "seq-cls", names, None), 1e-4)
    again.config.id2label = dict(enumerate(names))
    merged_in_transformers(report, name, directory, out, work / "masked-merged", AutoModelForSequenceClassification, batch, logits, again.config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    report = Report()
    for round_ in range(args.rounds):
        for family in FAMILIES:
            if args.only in family:
                with tempfile.TemporaryDirectory() as work:
                    one(report, Path(work), family, round_, args.seed)
                    from_masked_model(report, Path(work), family, round_, args.seed)
    report.exit()
