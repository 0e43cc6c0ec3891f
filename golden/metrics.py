"""Scores of scikit-learn, scipy, seqeval, sacrebleu and rouge_score on many small cases, odd ones among them.

    pip install -r golden/requirements.txt && python golden/metrics.py

Writes crates/metrics/tests/golden/metrics.json.
"""

import json
import math
import random
import warnings
from pathlib import Path

import sacrebleu
from rouge_score import rouge_scorer
from scipy import stats
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from sklearn import metrics as sk

OUT = Path(__file__).resolve().parent.parent / "crates/metrics/tests/golden/metrics.json"
warnings.simplefilter("ignore")
rng = random.Random(0)


def number(x):
    x = float(x)
    return None if math.isnan(x) else x


def averages(labels, predicted):
    score = lambda average: [float(x) for x in sk.precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)[:3]]
    p, r, f, s = sk.precision_recall_fscore_support(labels, predicted, average=None, zero_division=0)
    return {"micro": score("micro"), "macro": score("macro"), "per_class": [[float(a), float(b), float(c), int(d)] for a, b, c, d in zip(p, r, f, s)]}


def classes():
    cases = [([1], [1]), ([0], [1]), ([0, 0, 0], [0, 0, 0]), ([0, 1], [1, 0]), ([2, 2, 2], [0, 1, 2]), ([0, 1, 2], [1, 1, 1])]
    for _ in range(30):
        n, k = rng.randint(1, 40), rng.randint(1, 6)
        cases.append(([rng.randrange(k) for _ in range(n)], [rng.randrange(k) for _ in range(n)]))
    return [{"labels": a, "predicted": b, "accuracy": sk.accuracy_score(a, b), "matthews": float(sk.matthews_corrcoef(a, b)),
             "f1": averages(a, b)} for a, b in cases]


def multi():
    cases = []
    for i in range(15):
        n, k = rng.randint(2, 20), rng.randint(2, 5)
        draw = lambda: [[int(rng.random() < (0.0 if i == 0 else 0.4)) for _ in range(k)] for _ in range(n)]
        a, b = draw(), draw()
        sets = lambda rows: [[j for j, x in enumerate(row) if x] for row in rows]
        cases.append({"labels": sets(a), "predicted": sets(b), "classes": k, "f1": averages(a, b), "accuracy": float(sk.accuracy_score(a, b))})
    return cases


def numbers():
    cases = [([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]), ([1.0, 2.0], [2.0, 1.0]), ([1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 4.0])]
    for i in range(25):
        n = rng.randint(2, 40)
        value = (lambda: float(rng.randint(0, 5))) if i % 2 else (lambda: rng.gauss(3, 2))
        a = [value() for _ in range(n)]
        cases.append((a, [0.5 * x + value() if i % 3 else value() for x in a]))
    # far from zero, of all sizes, ties across signs of zero, all but equal
    cases += [([1e6 + x for x in a], [1e6 - 0.1 * x for x in a]) for a, _ in cases[4:6]]
    cases += [([10.0**e for e in range(-8, 9)], [float(e % 5) for e in range(17)]), ([0.0, -0.0, 1.0, -1.0], [1.0, 1.0, 2.0, 0.0]),
              ([2.0, 1.0, 0.0], [5.0, 5.0 + 1e-9, 5.0 + 2e-9]), ([3.0, 1.0, 2.0, 2.0, 1.0, 3.0], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0])]
    return [{"labels": a, "predicted": b, "pearson": number(stats.pearsonr(a, b)[0]), "spearman": number(stats.spearmanr(a, b)[0]),
             "mse": float(sk.mean_squared_error(a, b))} for a, b in cases]


def tags():
    alphabet = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-PER", "S-LOC", "B-x-y", "I-x-y", "B", "I", "."]
    cases = []
    for i in range(40):
        k = 5 if i % 2 else len(alphabet)
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
        a = [[rng.choice(alphabet[:k]) for _ in range(n)] for n in lengths]
        b = [[t if rng.random() < 0.7 else rng.choice(alphabet[:k]) for t in row] for row in a]
        if i == 0:
            a, b = [["O", "O"]], [["O", "O"]]
        if i == 2:
            a, b = [["O", "O"]], [["B-PER", "I-PER"]]
        entry = {"labels": a, "predicted": b, "accuracy": float(seqeval.accuracy_score(a, b))}
        for average in ["micro", "macro"]:
            f = lambda score: float(score(a, b, average=average, zero_division=0))
            try:
                entry[average] = [f(seqeval.precision_score), f(seqeval.recall_score), f(seqeval.f1_score)]
            except ValueError:  # seqeval fails without any span
                entry[average] = [0.0, 0.0, 0.0]
            # the mean of no types
            entry[average] = [0.0 if math.isnan(x) else x for x in entry[average]]
        types = sorted({span[0] for row in a + b for span in get_entities(row)})
        each = zip(*precision_recall_fscore_support(a, b, average=None, zero_division=0)) if types else []
        entry["per_type"] = [[t, *map(float, scores)] for t, scores in zip(types, each, strict=True)]
        cases.append(entry)
    return cases


WORDS = "the cat sat on mat , . 3.14 1,000 don't well-known 10-20 &quot;hi&quot; a&amp;b (x) Ünïcode 日本 İ é\u00a0z x\x1fy $5 end. ... a.b,c 'q' \t tab <skipped> line-\nbreak \n".split(" ")


def texts():
    pairs = [([""], [""]), (["a"], [""]), ([""], ["a"]), (["the cat sat on the mat"], ["the cat sat on the mat"]),
             (["a b c"], ["a b c"]), (["x y z w"], ["a b c d"]), (["The Cat"], ["the cat"]),
             # a text much shorter, much longer, the same word over and over, a row of nothing among others
             ([" ".join("a b c d e f g h i j".split() * 4)], ["a b c d e f"]), (["a b c d e f"], [" ".join("a b c d e f g h i j".split() * 4)]),
             (["the cat the dog the end"], ["the the the the the the"]), (["one two three four five", "six seven eight nine ten"], ["one two three four five", ""]),
             (["x" * 40 + " y z"], ["x" * 40 + " y z w"]), (["It's 5 o'clock: \u201cnow\u201d\u2014he said\u2026 (100%)!"], ["It's 5 o'clock: \"now\"-- he said... (100 %)!"]),
             (["\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd"], ["\u6771\u4eac\u306f\u9996\u90fd"]), (["a.b 1.5 1,5 a,b 1. .5 -3"], ["a.b 1.5 1 , 5 a , b 1 . .5 - 3"])]
    for _ in range(40):
        rows = rng.randint(1, 6)
        refs = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 15))) for _ in range(rows)]
        hyps = []
        for ref in refs:
            words = [w if rng.random() < 0.8 else rng.choice(WORDS) for w in ref.split(" ")]
            if rng.random() < 0.3:
                words = words[: rng.randint(0, len(words))]
            hyps.append(" ".join(words))
        pairs.append((refs, hyps))
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return [{"references": r, "texts": h, "bleu": sacrebleu.corpus_bleu(h, [r]).score,
             "rouge_l": sum(scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(r, h)) / len(r)} for r, h in pairs]


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    cases = {"classes": classes(), "multi": multi(), "numbers": numbers(), "tags": tags(), "texts": texts()}
    OUT.write_text(json.dumps(cases, separators=(",", ":")))
