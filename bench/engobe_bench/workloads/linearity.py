"""How a step's time and memory grow with its tokens: engobe alone, one row of T tokens."""

from .. import sides
from ..flops import step_flops, total
from ..plot import lines
from ..stats import shown
from ..workload import Entrant, Section, Workload, middle, values

LENGTHS = (128, 256, 512, 1024, 2048, 4096)


class Linearity(Workload):
    key = "LINEAR"
    title = "a step of one row of T tokens, all labelled"

    def lengths(self, ctx):
        return LENGTHS[:4] if ctx.quick else LENGTHS

    def rounds(self, ctx):
        return min(ctx.repeats, 3)

    def prepare(self, ctx):
        self.model = ctx.model("float32")
        self.data = {t: ctx.rows(6, t) for t in self.lengths(ctx)}

    def entrants(self, ctx):
        def entrant(t):
            flags = ["--batch-size", 1, "--max-seq-len", t, "--no-shuffle"]
            # short steps are repeated for longer
            steps = 1 + max(2, min(5, 2048 // t))
            return Entrant(f"T={t}", lambda ctx: sides.engobe_train(ctx, "linear", self.model, self.data[t], steps, 1, flags))

        return [entrant(t) for t in self.lengths(ctx)]

    def section(self, ctx, measured):
        header = ["T", "seconds a step", "ms a token", "GFLOP a token", "GFLOP/s", "peak RSS", "RSS over T=128, KB a token"]
        points, rows = [], []
        for t in self.lengths(ctx):
            name = f"T={t}"
            seconds = middle(measured, name, "step_seconds")
            memory = max(m["peak_rss_bytes"] for m in measured[name])
            flops = total(step_flops([t], t - 1)) / 1e9
            points.append((t, seconds, memory))
            more = (memory - points[0][2]) / (t - points[0][0]) / 1e3 if len(points) > 1 else None
            rows.append(
                [
                    str(t),
                    shown(values(measured, name, "step_seconds"), 3),
                    f"{1e3 * seconds / t:.2f}",
                    f"{flops / t:.2f}",
                    f"{flops / seconds:.0f}",
                    f"{memory / 1e9:.2f} GB",
                    f"{more:.0f}" if more else "–",
                ]
            )
        # what the rate of the best row would give: all growth beyond it is overhead, not mathematics
        rate = max(total(step_flops([t], t - 1)) / s for t, s, _ in points)
        ideal = [(t, total(step_flops([t], t - 1)) / rate) for t, _, _ in points]
        plot = lines(
            "Time and memory of a step against its tokens",
            "tokens",
            [
                ("seconds a step", [(t, s) for t, s, _ in points], False),
                ("seconds at the best row's GFLOP/s (attention's square included)", ideal, True),
                ("peak RSS, GB", [(t, m / 1e9) for t, _, m in points], False),
            ],
        )
        return Section(f"Growth: {self.title}", header, rows, [], ("linear.svg", plot))
