"""W7: the step of W1 over 4-bit weights, beside engobe's own over f32 and beside PEFT over bitsandbytes."""

from .. import stats
from ..workload import Section, middle, values
from .training import GGUF, Engobe, Peft, Training

OWN, PEER = "engobe", "PEFT NF4+dq"
# what random rows lack, and a file with a tokenizer is asked for
RANDOM_ROWS = ("--allow", "eot-never-label")
# entrant, label, its own goals: of our f32 step, of the peer's step, GB
LINES = [
    (OWN, "f32 weights", None, None, None),
    ("engobe NF4+dq", "NF4 with double quantization", 0.85, 1.5, None),
    ("engobe Q4_1", "SmolLM2's GGUF in place (Q4_1, head Q8_0)", 0.85, 1.5, None),
    ("engobe Q4_1, checkpointing", "the same, checkpointing", None, None, 0.45),
]


class Quantized(Training):
    """Compared with itself and the peer alone: the machine's rate is W1's matter."""

    def section(self, ctx, measured):
        header = ["", "engobe tok/s", "of own f32", "goal", "PEFT + bitsandbytes tok/s", "ratio", "goal", "engobe peak RSS", "goal", "peer peak RSS"]
        own, peer = (values(measured, name, self.unit) for name in (OWN, PEER))
        rows = []
        for name, label, of_own, of_peer, memory in LINES:
            ours = values(measured, name, self.unit)
            compared = [self.ratio(ours, beside) for beside in (own, peer)]
            rows.append(
                [
                    f"{self.key} {label}",
                    stats.shown(ours),
                    compared[0] if name != OWN else "–",
                    f"{of_own:.2f}" if of_own else "–",
                    stats.shown(peer),
                    compared[1],
                    f"{of_peer:.2f}" if of_peer else "–",
                    self.memory(measured, name),
                    f"{memory:.2f} GB" if memory else "–",
                    self.memory(measured, PEER),
                ]
            )
        ours, theirs = middle(measured, "engobe NF4+dq", "first_loss"), middle(measured, PEER, "first_loss")
        notes = [
            f"Loss of the first step over NF4: engobe {ours:.5f}, PEFT {theirs:.5f}. Both quantize the same f32 weights while "
            "they load; PEFT computes in f32, as engobe does."
        ]
        return Section(f"{self.key}: {self.title}", header, rows, notes)

    def ratio(self, ours, beside):
        compared = stats.ratio(ours, beside)
        return f"**{compared['of_medians']:.2f}** [{compared['min']:.2f}–{compared['max']:.2f}]"


QUANTIZED = Quantized(
    "W7",
    "the step of W1 over 4-bit weights",
    rows=lambda ctx: ctx.rows(24, 512),
    batch=1,
    engobe_flags=["--batch-size", 1, "--max-seq-len", 512, "--no-shuffle", *RANDOM_ROWS],
    sides=(
        Engobe(OWN),
        Peft(PEER, flags=("--nf4",)),
        Engobe("engobe NF4+dq", flags=("--quantize", "nf4", "--double-quant")),
        Engobe("engobe Q4_1", GGUF),
        Engobe("engobe Q4_1, checkpointing", GGUF, ("--activation-checkpointing",)),
    ),
    pairs=(),
    steps=4,
    warmup=1,
    rated=False,
)
