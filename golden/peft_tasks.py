"""Training curves of PEFT's LoRA for tasks with a head (SEQ_CLS, TOKEN_CLS), over the tiny encoders of golden/encoders.

    pip install -r golden/requirements.txt && python golden/peft_tasks.py [NAME ...]

Writes golden/peft_tasks/NAME/: the adapter that training starts from, and expected.json with rows, logits before the first
step, losses and gradient norms. Dropout is off: its random numbers are torch's own.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from shared import save_adapter, write_rounded
from tiny import padded, token_rows
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "checks"))
from parity import perturb  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

STEPS, BATCH, LR = 10, 4, 1e-3
OFF = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"], "roberta": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
       "distilbert": ["dropout", "attention_dropout", "seq_classif_dropout"], "modernbert": ["classifier_dropout"],
       "deberta-v2": ["hidden_dropout_prob", "attention_probs_dropout_prob"]}
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# PEFT saves the classifier alone: ModernBERT's head.dense must be the base's own
# name -> base, problem, classes (0: of tokens), LoRA's settings
CASES = {
    "bert_single": ("bert", SINGLE, 3, {}),
    "bert_multi": ("bert", MULTI, 4, {"target_modules": "all-linear"}),
    "bert_regression": ("bert_relu_task", REGRESSION, 1, {"target_modules": ["query", "key", "dense"]}),
    "bert_tokens": ("bert", "tokens", 5, {"target_modules": ["query", "value", "intermediate.dense"]}),
    "roberta_single": ("roberta", SINGLE, 2, {"target_modules": ["query", "value"]}),
    "distilbert_single": ("distilbert", SINGLE, 2, {"target_modules": ["q_lin", "v_lin"]}),
    "distilbert_tokens": ("distilbert", "tokens", 3, {"target_modules": ["q_lin", "lin1"]}),
    "deberta_single": ("deberta_v2_conv_task", SINGLE, 3, {"target_modules": ["query_proj", "key_proj", "value_proj", "dense"]}),
    "deberta_tokens": ("deberta_v3", "tokens", 4, {"target_modules": ["query_proj", "key_proj", "value_proj", "dense"]}),
    "modernbert_single": ("modernbert_bias_task", SINGLE, 3, {"target_modules": ["Wqkv", "Wo"]}),
    "modernbert_tokens": ("modernbert_bias_task", "tokens", 3, {"target_modules": ["Wqkv", "Wi"]}),
}


def labels_of(problem, n, rows, rng):
    if problem == "tokens":
        return [[rng.randrange(n) if rng.random() < 0.7 else -100 for _ in row] for row in rows]
    one = {SINGLE: lambda: rng.randrange(n), REGRESSION: lambda: round(rng.gauss(0, 2), 3), MULTI: lambda: [rng.randrange(2) for _ in range(n)]}
    return [one[problem]() for _ in rows]


def forward(model, problem, rows, labels, types):
    ids, mask = padded(rows, 1)
    if problem == "tokens":
        labels = [l + [-100] * (ids.shape[1] - len(l)) for l in labels]
    target = torch.tensor(labels, dtype=torch.float32 if problem in (MULTI, REGRESSION) else torch.int64)
    more = {"token_type_ids": padded(types, 0)[0]} if types else {}
    return model(input_ids=ids, attention_mask=mask, labels=target, **more)


def main(wanted):
    out = HERE / "peft_tasks"
    for seed, (name, (base, problem, classes, lora)) in enumerate(CASES.items()):
        if wanted and name not in wanted:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        tokens = problem == "tokens"
        config = json.loads((HERE / "encoders" / base / "config.json").read_text())
        off = {key: 0.0 for key in OFF[config["model_type"]]}
        auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
        more = {} if tokens else {"problem_type": problem}
        model = auto.from_pretrained(HERE / "encoders" / base, dtype=torch.float32, num_labels=classes, ignore_mismatched_sizes=True, **off, **more)
        peft = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS" if tokens else "SEQ_CLS", r=4, lora_alpha=8, **lora))
        perturb(peft, seed)
        save_adapter(peft, out / name, f"golden/encoders/{base}")
        rows = token_rows(seed, [rng.randrange(3, 20) for _ in range(12)], config["vocab_size"])
        labels = labels_of(problem, classes, rows, rng)
        # the second half of each row is another text
        types = [[int(i >= len(r) // 2) for i in range(len(r))] for r in rows] if config["model_type"] == "bert" and not tokens else None
        peft.eval()
        with torch.no_grad():
            logits = forward(peft, problem, rows, labels, types).logits
        first = [logits[i, 0].tolist() if tokens else logits[i].tolist() for i in range(len(rows))]
        peft.train()
        params = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=LR)
        losses, norms = [], []
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = LR * (STEPS - step) / STEPS
            at = (step * BATCH) % len(rows)
            part = slice(at, at + BATCH)
            optimizer.zero_grad()
            loss = forward(peft, problem, rows[part], labels[part], types and types[part]).loss
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
            optimizer.step()
            losses.append(loss.item())
        trainable, total = peft.get_nb_trainable_parameters()
        write_rounded(out / name / "expected.json", {"base": base, "problem": problem, "classes": classes, "off": list(off), "rows": rows, "labels": labels,
              "types": types, "logits": first, "losses": losses, "grad_norms": norms, "trainable_parameters": trainable})


if __name__ == "__main__":
    main(sys.argv[1:])
