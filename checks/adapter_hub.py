"""Bottlenecks with a head and AdapterHub's package: what engobe trained, read by the package into transformers' classes and
into its own; what the package wrote over its own models, read by engobe.

    pip install --target DIR --no-deps adapters==1.3.0 transformers==4.57.6 "tokenizers<0.23" "huggingface_hub<1"
    PYTHONPATH=DIR python checks/adapter_hub.py

(the package wants an older transformers than the other checks)
"""

import json
import shutil
import tempfile
from pathlib import Path

import adapters
import torch
from common import ROOT, Report, engobe, randomize
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedTokenizerFast

TOKENIZERS = ROOT / "crates/data/tests/golden/tasks"
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
DEBERTA = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm")
# model_type -> tokenizer, configuration, the activation of the package's head that engobe knows over it
MODELS = {
    "bert": ("bert", SIZES, "tanh"),
    "roberta": ("roberta", dict(SIZES, pad_token_id=1), "tanh"),
    "xlm-roberta": ("roberta", dict(SIZES, pad_token_id=1), "tanh"),
    "distilbert": ("bert", dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64), "relu"),
    "electra": ("bert", dict(SIZES, embedding_size=24), "gelu"),
    "deberta-v2": ("deberta", dict(SIZES, **DEBERTA), "gelu"),
}
NAMES = ["bad", "good", "so-so"]
TEXTS = ["the cat sat on the mat", "a stirring , funny and finally transporting re-imagining", "nothing new under the sun !", "no",
         "jim henson was a puppeteer", "one long string of cliches"]


def tokenizer_of(base):
    names = json.loads((base / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"), **{k: v for k, v in names.items() if k in ("pad_token", "cls_token", "sep_token")})


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def scores(base, adapter, data, said):
    """engobe's probabilities of each text."""
    engobe("eval", "--model", base, "--adapter", adapter, "--task", "seq-cls", "--data", data, "--predictions", said)
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    return torch.tensor([[line["scores"][name] for name in NAMES] for line in lines])


def engobes(report, work, kind, base, data, batch, tokens):
    """What engobe trained, in the package's hands."""
    out, said = work / f"out-{tokens}", work / "said.jsonl"
    task = "token-cls" if tokens else "seq-cls"
    engobe("train", "--model", base, "--task", task, "--data", data, "--out", out, "--method", "bottleneck", "--reduction-factor", "4", "--max-steps", 6,
           "--batch-size", 3, "--learning-rate", "1e-2")
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    for what, load in {"class": lambda: auto.from_pretrained(base, num_labels=len(NAMES)), "own model": lambda: adapters.AutoAdapterModel.from_pretrained(base)}.items():
        for name in [None, "other"]:
            model = load()
            adapters.init(model)
            model.set_active_adapters(model.load_adapter(str(out), load_as=name, use_safetensors=True))
            found = logits(model, batch)
            if not tokens:
                report(f"{kind}: engobe's in AdapterHub's {what}, as {name}", (found.softmax(-1) - scores(base, out, data, said)).abs().max().item(), 1e-5)
                continue
            engobe("eval", "--model", base, "--adapter", out, "--data", data, "--predictions", said)
            mine = [json.loads(line)["tags"] for line in said.read_text().splitlines()]
            # the first token of the first word stands behind [CLS]
            theirs = [NAMES[z[1].argmax()] for z in found]
            report.true(f"{kind}: engobe's tags in AdapterHub's {what}, as {name}", [tags[0] for tags in mine] == theirs)


def hubs(report, work, kind, base, data, batch, activation):
    """What the package wrote over its own model, in engobe's hands."""
    model = adapters.AutoAdapterModel.from_pretrained(base)
    model.add_adapter("task", config=adapters.DoubleSeqBnConfig(reduction_factor=8))
    model.add_classification_head("task", num_labels=len(NAMES), activation_function=activation, id2label=dict(enumerate(NAMES)))
    model.train_adapter("task")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    out = work / "hub"
    model.save_adapter(str(out), "task", use_safetensors=True)
    found = scores(base, out, data, work / "said.jsonl")
    report(f"{kind}: AdapterHub's own head in engobe", (logits(model, batch).softmax(-1) - found).abs().max().item(), 1e-5)


def main():
    report = Report()
    for kind, (tokenizer, settings, activation) in MODELS.items():
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            base, data, words = work / "base", work / "rows.jsonl", work / "words.jsonl"
            shutil.copytree(TOKENIZERS / tokenizer, base)
            read = tokenizer_of(base)
            torch.manual_seed(0)
            model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=len(read), **settings))
            randomize(model)
            model.save_pretrained(base)
            data.write_text("".join(json.dumps({"text": t, "label": NAMES[i % 3]}) + "\n" for i, t in enumerate(TEXTS)))
            rows = [t.split() for t in TEXTS]
            words.write_text("".join(json.dumps({"tokens": r, "tags": [NAMES[(i + j) % 3] for j in range(len(r))]}) + "\n" for i, r in enumerate(rows)))
            more = {"return_token_type_ids": kind in ("bert", "electra")}
            engobes(report, work, kind, base, data, read(TEXTS, padding=True, return_tensors="pt", **more), False)
            # RoBERTa's tokenizer is used with add_prefix_space=True for words
            rows = [[" " + word for word in row] for row in rows] if tokenizer == "roberta" else rows
            engobes(report, work, kind, base, words, read(rows, is_split_into_words=True, padding=True, return_tensors="pt", **more), True)
            hubs(report, work, kind, base, data, read(TEXTS, padding=True, return_tensors="pt", **more), activation)
    report.exit()


if __name__ == "__main__":
    main()
