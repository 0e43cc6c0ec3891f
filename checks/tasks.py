"""Adapters with a head that engobe trained, read by PEFT, and models that engobe merged them into, read by transformers:
what all say of the same texts. The other way is in golden/peft_tasks, whose adapters PEFT wrote.

    python checks/tasks.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from common import ROOT, Report, engobe, randomize
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

TOKENIZERS = ROOT / "crates/data/tests/golden/tasks"
TEXTS = ["the cat sat on the mat", "a stirring , funny and finally transporting re-imagining", "nothing new under the sun !", "no",
         "jim henson was a puppeteer", "one long string of cliches"]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
# what PEFT has; names are those that a run is asked for with
METHODS = {
    "lora": ["--r", "4"],
    "adalora": ["--init-r", "4", "--target-r", "2"],
    "vera": ["--r", "8"],
    "ia3": [],
    "ln-tuning": [],
    "prompt-tuning": ["--num-virtual-tokens", "4"],
    "p-tuning": ["--num-virtual-tokens", "4"],
    "prefix-tuning": ["--num-virtual-tokens", "4"],
}
# those that stay beside the model
UNMERGED = ["prompt-tuning", "p-tuning", "prefix-tuning"]


def make(kind, directory):
    """A bare model beside a tokenizer: the head is new."""
    torch.manual_seed(0)
    shutil.copytree(TOKENIZERS / ("bert" if kind == "bert" else "roberta"), directory)
    vocab = len(AutoTokenizer.from_pretrained(directory))
    if kind == "bert":
        model = BertModel(BertConfig(vocab_size=vocab, **SIZES))
    else:
        model = LlamaModel(LlamaConfig(vocab_size=vocab, num_key_value_heads=2, pad_token_id=1, **SIZES))
    randomize(model)
    if kind == "bert":
        return model.save_pretrained(directory)
    # decoders are known by the names of the model with a head
    headed = AutoModelForSequenceClassification.from_config(model.config)
    headed.model.load_state_dict(model.state_dict())
    headed.save_pretrained(directory)


def theirs(base, adapter):
    """Probabilities by PEFT."""
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=2, ignore_mismatched_sizes=True)
    return probabilities(base, PeftModel.from_pretrained(model, adapter).eval())


def probabilities(directory, model):
    """Of each text by itself: a decoder under a prompt reads padding in PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return [model(**tokenizer([text], return_tensors="pt")).logits[0].softmax(-1).tolist() for text in TEXTS]


def apart(mine, theirs):
    return max(abs(a - b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


def main():
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = work / "rows.jsonl"
        data.write_text("".join(json.dumps({"text": t, "label": ["bad", "good"][i % 2]}) + "\n" for i, t in enumerate(TEXTS)))
        for kind in ["bert", "llama"]:
            base = work / kind
            make(kind, base)
            for method, settings in METHODS.items():
                out, said = work / f"{kind}-{method}", work / f"{kind}-{method}.jsonl"
                engobe("train", "--model", base, "--task", "seq-cls", "--data", data, "--out", out, "--method", method, "--max-steps", 4,
                       "--batch-size", 3, "--learning-rate", "1e-2", *settings)
                engobe("eval", "--model", base, "--adapter", out, "--data", data, "--predictions", said)
                mine = [list(json.loads(line)["scores"].values()) for line in said.read_text().splitlines()]
                expected = theirs(base, out)
                report(f"{kind} {method}", apart(mine, expected), 1e-5)
                if method in UNMERGED:
                    continue
                merged = work / f"{kind}-{method}-merged"
                engobe("merge", "--model", base, "--adapter", out, "--out", merged)
                model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval()
                report(f"{kind} {method}, merged", apart(mine, probabilities(merged, model)), 1e-5)
                report.true(f"{kind} {method}, names of classes", model.config.id2label == {0: "bad", 1: "good"}, str(model.config.id2label))
    report.exit()


if __name__ == "__main__":
    main()
