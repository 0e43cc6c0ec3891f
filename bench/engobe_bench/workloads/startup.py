"""W6: from the command to the first training step, and to the first generated token, seen from outside."""

from .. import sides, stats
from ..workload import Entrant, Section, Workload, values
from .generation import STORY


class Startup(Workload):
    key = "W6"
    title = "start-up, from the command on"

    def prepare(self, ctx):
        self.model, self.data, self.gguf = ctx.model("float32"), ctx.rows(24, 512), ctx.gguf()

    def entrants(self, ctx):
        return [
            Entrant("engobe train", self.engobe_step),
            Entrant("PEFT train", self.peft_step),
            Entrant("engobe generate", self.engobe_token),
            Entrant("llama.cpp generate", self.llama_token),
        ]

    def engobe_step(self, ctx):
        """The first line of metrics.jsonl is written when the first step is done."""
        out = ctx.scratch("startup")
        command = [ctx.engobe, "train", "--model", self.model, "--data", self.data, "--out", out, "--max-steps", 1]
        command += ["--batch-size", 1, "--max-seq-len", 512, *sides.LORA, "--threads", ctx.threads, "--json", "--quiet"]

        def watch(process, started):
            return {"first_step_done": sides.appears(out / "metrics.jsonl", process, started)}

        text, cost = ctx.measured(command, watch=watch)
        said = sides.json.loads(text.strip().splitlines()[-1])
        done = cost.pop("first_step_done")
        return {**cost, "values": {"begun_seconds": said["startup_seconds"], "done_seconds": done}}

    def peft_step(self, ctx):
        one = sides.peft_train(ctx, self.model, self.data, 1, steps=1, warmup=0)
        v = one["values"]
        return {**one, "values": {"begun_seconds": v["startup_seconds"], "done_seconds": v["first_step_done_seconds"]}}

    def engobe_token(self, ctx):
        """Tokens are printed as they come."""
        command = [ctx.engobe, "generate", "--model", self.gguf, "--prompt-ids", ",".join(map(str, STORY))]
        command += ["--max-new-tokens", 1, "--threads", ctx.threads, "--quiet"]

        _, cost = ctx.measured(command)
        return {**cost, "values": {"done_seconds": cost["first_output_seconds"]}}

    def llama_token(self, ctx):
        one = sides.llama_generate(ctx, self.gguf, STORY, 1)
        return {**one, "values": {"done_seconds": one["values"]["first_token_seconds"]}}

    def section(self, ctx, measured):
        header = ["", "engobe", "peer", "goal"]
        lines = [
            ("first training step begins (W1)", "engobe train", "PEFT train", "begun_seconds", "–"),
            ("first training step done (W1)", "engobe train", "PEFT train", "done_seconds", "1.5 s"),
            ("first generated token (GGUF)", "engobe generate", "llama.cpp generate", "done_seconds", "–"),
        ]
        rows = [
            [f"W6 {label}", *(stats.shown(values(measured, who, key), 2) + " s" for who in (ours, theirs)), goal]
            for label, ours, theirs, key, goal in lines
        ]
        notes = ["Files are in the system's cache. llama.cpp starts inside Python; importing xllamacpp is part of it."]
        return Section(f"{self.key}: {self.title}", header, rows, notes)


