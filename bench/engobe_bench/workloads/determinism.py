"""The same bits from run to run, and what other numbers of threads change: engobe alone."""

import hashlib
import shutil

from .. import sides
from ..workload import Entrant, Section, Workload

STEPS = 5


class Determinism(Workload):
    key = "THREADS"
    title = "the same run twice, and with other numbers of threads"

    def rounds(self, ctx):
        return 1

    def prepare(self, ctx):
        self.model, self.data = ctx.model("float32"), ctx.rows(96, 128)

    def entrants(self, ctx):
        def entrant(name, threads):
            def run(ctx):
                flags = ["--batch-size", 4, "--max-seq-len", 128, "--lora-dropout", "0.1"]
                one = sides.engobe_train(ctx, "threads", self.model, self.data, STEPS, 0, flags, keep=True, threads=threads)
                out = ctx.work / "runs" / "threads"
                digest = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
                shutil.rmtree(out)
                return {**one, "adapter_sha256": digest, "threads": threads}

            return Entrant(name, run)

        counts = sorted({1, ctx.threads, 2 * ctx.threads})
        return [entrant("again", ctx.threads), *(entrant(f"{n} threads", n) for n in counts)]

    def section(self, ctx, measured):
        base = measured["again"][0]
        rows = []
        for name, (one,) in measured.items():
            if name == "again":
                continue
            apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(one["steps"], base["steps"]))
            same = "the same bits" if one["adapter_sha256"] == base["adapter_sha256"] else "other bits"
            rows.append([name, same, f"{apart:.2g}"])
        header = [f"beside {base['threads']} threads", f"adapter after {STEPS} steps with dropout", "largest difference of losses"]
        return Section(f"Threads: {self.title}", header, rows)
