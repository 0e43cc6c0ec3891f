"""W5: prompt processing and greedy decoding of SmolLM2 from its GGUF file, beside llama.cpp."""

import random

from .. import sides, stats
from ..workload import Entrant, Section, Workload, values

PROMPT, NEW = 512, 128
# "Once upon a time, in a village by the sea," in SmolLM2's tokens: its greedy continuation does not end early
STORY = [6403, 1980, 253, 655, 28, 281, 253, 6560, 411, 260, 3426, 28]


class Generation(Workload):
    key = "W5"
    title = "SmolLM2-135M-Instruct (Q4_1, head Q8_0) from GGUF"

    def prepare(self, ctx):
        self.model = ctx.gguf()
        rng = random.Random(0)
        # what the tokens are makes no difference to the work
        self.prompt = [rng.randrange(100, 40000) for _ in range(PROMPT)]

    def entrants(self, ctx):
        new = 32 if ctx.quick else NEW
        return [
            Entrant("engobe prompt", lambda ctx: sides.engobe_generate(ctx, self.model, self.prompt, 2)),
            Entrant("llama.cpp prompt", lambda ctx: sides.llama_generate(ctx, self.model, self.prompt, 2)),
            Entrant("engobe decode", lambda ctx: sides.engobe_generate(ctx, self.model, STORY, new)),
            Entrant("llama.cpp decode", lambda ctx: sides.llama_generate(ctx, self.model, STORY, new)),
        ]

    def section(self, ctx, measured):
        header = ["", "engobe tok/s", "llama.cpp tok/s", "ratio", "goal", "engobe peak RSS", "llama.cpp peak RSS"]
        rows = []
        for what, label, key in (
            ("prompt", f"W5 prompt of {PROMPT} tokens", "prompt_tokens_per_second"),
            ("decode", "W5 greedy decoding", "decode_tokens_per_second"),
        ):
            ours, theirs = (values(measured, f"{who} {what}", key) for who in ("engobe", "llama.cpp"))
            compared = stats.ratio(ours, theirs)
            memory = [f"{max(m['peak_rss_bytes'] for m in measured[f'{who} {what}']) / 1e9:.2f} GB" for who in ("engobe", "llama.cpp")]
            rows.append([label, stats.shown(ours), stats.shown(theirs), f"**{compared['of_medians']:.2f}** [{compared['min']:.2f}–{compared['max']:.2f}]", "0.90", *memory])
        system = measured["llama.cpp prompt"][0]["system"].strip(" |")
        tokens = {name: int(m[0]["values"]["new_tokens"]) for name, m in measured.items() if name.endswith("decode")}
        notes = [
            f"llama.cpp as xllamacpp's wheel builds it ({system}), with its defaults: warm-up run, 16-bit keys and values. "
            "Rates are each program's own, loading not included; llama.cpp's decoding rate counts the first token, which favours it by 1/n.",
            "New tokens when decoding: " + ", ".join(f"{name.removesuffix(' decode')} {n}" for name, n in tokens.items()) + ".",
        ]
        return Section(f"{self.key}: {self.title}", header, rows, notes)
