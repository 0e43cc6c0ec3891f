"""W1 to W4, G1 to G3, M1, M2 and T1: LoRA steps beside PyTorch + PEFT."""

import json
from dataclasses import dataclass

from .. import sides, stats
from ..flops import DEBERTA_SMALL, GPT2, MINILM, SMOLLM2, T5_SMALL, step_flops, total
from ..workload import Entrant, Section, Workload, middle, values

# what a side's weights are stored in, and what they are called
F32, BF16 = "float32", "bfloat16"
# not made here: SmolLM2's own file
GGUF = "gguf"


@dataclass(frozen=True)
class Engobe:
    """engobe with more flags."""

    name: str = "engobe"
    stored: str = F32
    flags: tuple = ()


@dataclass(frozen=True)
class Peft:
    """PyTorch + PEFT."""

    name: str = "PEFT"
    stored: str = F32
    flags: tuple = ()


@dataclass(frozen=True)
class Pair:
    """A line of the table."""

    ours: str
    theirs: str | None
    label: str
    goal: float | None = None


class Training(Workload):
    """A kind of training step: rows, and those who take it."""

    # what all peers are told
    peft_flags = ()

    def __init__(self, key, title, rows, batch, engobe_flags, sides, pairs, steps=6, warmup=2, unit="tokens_per_second", epoch=False, shape="smollm2", rated=True):
        self.key, self.title, self.rows, self.batch = key, title, rows, batch
        self.engobe_flags, self.sides, self.pairs = engobe_flags, sides, pairs
        self.steps, self.warmup, self.unit, self.epoch, self.shape = steps, warmup, unit, epoch, shape
        # the machine's rate on SmolLM2's shapes is of interest
        self.rated = rated

    def prepare(self, ctx):
        self.data = self.rows(ctx)
        self.read = self.lengths()
        for side in self.sides:
            self.model(ctx, side)
            if isinstance(side, Peft):
                self.attention(ctx, side)

    def lengths(self):
        """The rows: what matters are their numbers of tokens and labels."""
        return [json.loads(line) for line in self.data.read_text().splitlines()]

    def model(self, ctx, side):
        return ctx.gguf() if side.stored == GGUF else ctx.model(side.stored, self.shape)

    def attention(self, ctx, side):
        if self.shape == "deberta":
            # transformers has no other one
            return "eager"
        if ctx.quick:
            return "sdpa"
        shape = f"batch {self.batch} of {self.data.stem.split('-')[0]} rows of up to {max(len(r['input_ids']) for r in self.read)}, {self.shape} in {side.stored}"
        return sides.fastest_attention(ctx, shape, self.model(ctx, side), self.data, self.batch, side.stored, self.peft_flags)

    def entrants(self, ctx):
        if not self.rated:
            return [Entrant(s.name, self.our_run(s) if isinstance(s, Engobe) else self.their_run(s)) for s in self.sides]
        # the machine's rate is taken between ours and theirs, as disturbed or undisturbed as they are
        ours = [Entrant(s.name, self.our_run(s)) for s in self.sides if isinstance(s, Engobe)]
        theirs = [Entrant(s.name, self.their_run(s)) for s in self.sides if isinstance(s, Peft)]
        tokens, labels = self.step_size()
        rate = Entrant("machine", lambda ctx: sides.machine_rate(ctx, tokens, labels))
        mixed = [e for pair in zip(ours, theirs) for e in pair]
        rest = [e for e in (*ours, *theirs) if e not in mixed]
        return [mixed[0], rate, *mixed[1:], *rest]

    def count(self, ctx):
        """Steps of a run."""
        return self.warmup + (max(2, self.steps // 2) if ctx.quick else self.steps)

    def our_run(self, side):
        def run(ctx):
            steps = None if self.epoch else self.count(ctx)
            flags = [*self.engobe_flags, *side.flags]
            return sides.engobe_train(ctx, self.key, self.model(ctx, side), self.data, steps, self.warmup, flags)

        return run

    def their_run(self, side):
        def run(ctx):
            steps = -(-len(self.read) // self.batch) if self.epoch else self.count(ctx)
            return sides.peft_train(
                ctx, self.model(ctx, side), self.data, self.batch, steps, self.warmup, side.stored, self.attention(ctx, side), (*self.peft_flags, *side.flags)
            )

        return run

    def step_size(self):
        """Tokens and labels of a step, on average."""
        share = self.batch / len(self.read)
        return round(sum(len(r["input_ids"]) for r in self.read) * share), round(self.labels() * share)

    def labels(self):
        # the first position of a decoder's row is nobody's target
        first = 0 if self.shape == "t5" else 1
        return sum(sum(label != -100 for label in r["labels"][first:]) for r in self.read)

    def gflop_per_unit(self):
        """GFLOP that the mathematics needs for one token, or one label token."""
        shape = {"smollm2": SMOLLM2, "gpt2": GPT2, "minilm": MINILM, "deberta": DEBERTA_SMALL, "t5": T5_SMALL}[self.shape]
        flops = total(step_flops([len(r["input_ids"]) for r in self.read], self.labels(), shape=shape)) / 1e9
        labels = self.unit == "label_tokens_per_second"
        return flops / (self.labels() if labels else sum(len(r["input_ids"]) for r in self.read))

    def section(self, ctx, measured):
        unit = "label tok/s" if self.unit.startswith("label") else "tok/s"
        header = ["", f"engobe {unit}", f"peer {unit}", "ratio", "goal", "engobe peak RSS", "peer peak RSS", "engobe start-up", "peer start-up", "GFLOP/s", "of gemm", "of FMA peak"]
        gemm, peak = middle(measured, "machine", "gemm_gflops"), middle(measured, "machine", "fma_gflops_all")
        rows = []
        for pair in self.pairs:
            ours = values(measured, pair.ours, self.unit)
            if not ours:
                continue
            theirs = values(measured, pair.theirs, self.unit) if pair.theirs else []
            done = stats.median(ours) * self.gflop_per_unit()
            compared = stats.ratio(ours, theirs) if theirs else None
            rows.append(
                [
                    f"{self.key}{pair.label}",
                    stats.shown(ours),
                    stats.shown(theirs),
                    f"**{compared['of_medians']:.2f}** [{compared['min']:.2f}–{compared['max']:.2f}]" if compared else "–",
                    f"{pair.goal:.2f}" if pair.goal else "–",
                    self.memory(measured, pair.ours),
                    self.memory(measured, pair.theirs),
                    self.startup(measured, pair.ours),
                    self.startup(measured, pair.theirs),
                    f"{done:.0f}",
                    f"{done / gemm:.0%}" if gemm else "–",
                    f"{done / peak:.0%}" if peak else "–",
                ]
            )
        return Section(f"{self.key}: {self.title}", header, rows, self.notes(measured, gemm, peak))

    def memory(self, measured, name):
        found = [m["peak_rss_bytes"] / 1e9 for m in measured.get(name, [])]
        return f"{max(found):.2f} GB" if found else "–"

    def startup(self, measured, name):
        found = middle(measured, name, "startup_seconds")
        return "–" if found is None else f"{found:.2f} s"

    def notes(self, measured, gemm, peak):
        notes = []
        if gemm:
            shares = f"gemm crate on this step's shapes {gemm:.0f} GFLOP/s, FMA peak {peak:.0f} GFLOP/s"
            notes.append(f"In the same rounds: {shares}. The step needs {self.gflop_per_unit():.3f} GFLOP a {'label ' if self.unit.startswith('label') else ''}token.")
        for pair in self.pairs:
            if not self.epoch and pair.theirs and measured.get(pair.ours) and measured.get(pair.theirs):
                a, b = middle(measured, pair.ours, "first_loss"), middle(measured, pair.theirs, "first_loss")
                notes.append(f"Loss of the first step{pair.label}: engobe {a:.5f}, PEFT {b:.5f}.")
        plain, kept = middle(measured, "engobe", "step_seconds"), middle(measured, "engobe, checkpointing", "step_seconds")
        if plain and kept:
            notes.append(f"Activation checkpointing takes {kept / plain:.2f}x the time (goal: at most 1.35x).")
        if self.epoch or self.unit == "all_tokens_per_second":
            padded = [sum(s["padded_tokens"] for s in m["steps"]) / sum(s["tokens"] for s in m["steps"]) for m in measured.get("PEFT", [])]
            if padded:
                notes.append(f"PEFT's padded batches hold {padded[0]:.2f}x the tokens of their rows.")
        return notes


class Classification(Training):
    """Labels of texts, which both sides tokenize before the first step."""

    peft_flags = ("--seq-cls",)

    def lengths(self):
        # a token a word, [CLS] and [SEP]
        texts = [line.split("\t")[0] for line in self.data.read_text().splitlines()[1:]]
        return [{"input_ids": [0] * (len(text.split()) + 2), "labels": [-100, 0]} for text in texts]


BOTH = (Engobe(), Peft(), Engobe("engobe bf16", BF16), Peft("PEFT bf16", BF16))
CHECKPOINTED = (
    Engobe("engobe, checkpointing", flags=("--activation-checkpointing",)),
    Peft("PEFT, checkpointing", flags=("--gradient-checkpointing",)),
)


def pairs(goal, *more):
    return (Pair("engobe", "PEFT", "", goal), Pair("engobe bf16", "PEFT bf16", ", weights in bf16"), *more)


TRAINING = [
    Training(
        "W1",
        "LoRA r=16 on all linear layers, B=1 T=512, all labels",
        rows=lambda ctx: ctx.rows(24, 512),
        batch=1,
        engobe_flags=["--batch-size", 1, "--max-seq-len", 512, "--no-shuffle"],
        sides=BOTH + CHECKPOINTED,
        pairs=pairs(1.7, Pair("engobe, checkpointing", "PEFT, checkpointing", ", checkpointing")),
    ),
    Training(
        "W2",
        "the same, B=4 T=128",
        rows=lambda ctx: ctx.rows(96, 128),
        batch=4,
        engobe_flags=["--batch-size", 4, "--max-seq-len", 128, "--no-shuffle"],
        sides=BOTH,
        pairs=pairs(1.45),
    ),
    Training(
        "W3",
        "as W1, labels on the last 30 %",
        rows=lambda ctx: ctx.rows(24, 512, 0.3),
        batch=1,
        engobe_flags=["--batch-size", 1, "--max-seq-len", 512, "--no-shuffle"],
        sides=BOTH,
        pairs=pairs(2.0),
    ),
    # an epoch over the same rows: three bins of 512 tokens hold about as many rows as a padded batch of 8
    Training(
        "W4",
        "Alpaca rows of uneven length: packed by engobe, padded in batches of 8 by PEFT",
        rows=lambda ctx: ctx.alpaca_rows(32 if ctx.quick else 48, 512),
        batch=8,
        engobe_flags=["--batch-size", 3, "--max-seq-len", 512],
        sides=BOTH,
        pairs=pairs(2.5),
        warmup=1,
        unit="label_tokens_per_second",
        epoch=True,
    ),
    Training(
        "G1",
        "LoRA r=16 on all linear layers of the GPT-2 (124M) shape, B=4 T=128, all labels",
        rows=lambda ctx: ctx.rows(96, 128),
        batch=4,
        engobe_flags=["--batch-size", 4, "--max-seq-len", 128, "--no-shuffle"],
        sides=(Engobe(), Peft()),
        pairs=(Pair("engobe", "PEFT", "", 1.8),),
        shape="gpt2",
    ),
    *(
        Training(
            key,
            f"the same, B={batch} T=512, all labels",
            rows=lambda ctx: ctx.rows(24, 512),
            batch=batch,
            engobe_flags=["--batch-size", batch, "--max-seq-len", 512, "--no-shuffle"],
            sides=(Engobe(), Peft()),
            pairs=(Pair("engobe", "PEFT", "", 1.8),),
            shape="gpt2",
            steps=3,
            warmup=1,
            rated=False,
        )
        for key, batch in (("G2", 1), ("G3", 4))
    ),
    *(
        Classification(
            key,
            f"LoRA r=16 on all linear layers of the {name} shape, two classes, 16 texts as long as SST-2's",
            rows=lambda ctx: ctx.sst2_rows(256),
            batch=16,
            engobe_flags=["--batch-size", 16, "--max-seq-len", 128, "--no-shuffle", "--task", "seq-cls"],
            sides=(Engobe(), Peft()),
            pairs=(Pair("engobe", "PEFT", "", 1.8),),
            steps=14,
            warmup=2,
            unit="all_tokens_per_second",
            shape=shape,
            rated=False,
        )
        for key, name, shape in (("M1", "MiniLM-L6", "minilm"), ("M2", "DeBERTa-v3-small", "deberta"))
    ),
    # sources and targets of 128 tokens; what is counted are the sources' tokens
    Training(
        "T1",
        "LoRA r=16 on all linear layers of the T5-small shape, B=8, sources and targets of T=128",
        rows=lambda ctx: ctx.rows(96, 128, vocab=32128),
        batch=8,
        engobe_flags=["--batch-size", 8, "--max-seq-len", 128, "--no-shuffle"],
        sides=(Engobe(), Peft()),
        pairs=(Pair("engobe", "PEFT", "", 1.8),),
        shape="t5",
        rated=False,
    ),
]
