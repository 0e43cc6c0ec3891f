"""A workload: entrants that take turns, round after round, and what their measurements amount to."""

import time
from dataclasses import dataclass, field
from typing import Callable

from .peers import say
from .proc import Failed, locked
from .stats import median


@dataclass
class Entrant:
    """One side of a comparison. `run(ctx)` measures it once, in a fresh process, and returns at least `values`."""

    name: str
    run: Callable


@dataclass
class Section:
    """What the report says of a workload: a table, remarks, a plot."""

    title: str
    header: list
    rows: list
    notes: list = field(default_factory=list)
    # (name of the file, SVG)
    plot: tuple | None = None


class Workload:
    """To add one: give it a key, entrants and a section, and list it in workloads/__init__.py."""

    key = ""
    title = ""
    # the machine's rate is measured beside it
    rated = False

    def prepare(self, ctx):
        """Makes what the entrants need, before anything is measured."""

    def entrants(self, ctx):
        """Those who take turns."""
        raise NotImplementedError

    def rounds(self, ctx):
        """How often each is measured."""
        return ctx.repeats

    def section(self, ctx, measured):
        """The report's section; `measured` maps entrants' names to their measurements, in order."""
        raise NotImplementedError


def run_workload(workload, ctx, record):
    """All rounds of a workload. Each measurement goes to `record` as it comes, with nothing left out."""
    measured, entrants = {}, []
    for turn in range(workload.rounds(ctx)):
        with locked(ctx.lock):
            if turn == 0:
                workload.prepare(ctx)
                entrants = workload.entrants(ctx)
            for entrant in entrants:
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                one = entrant.run(ctx)
                one = {"workload": workload.key, "entrant": entrant.name, "round": turn + 1, "at": at, **one}
                record(one)
                measured.setdefault(entrant.name, []).append(one)
                values = ", ".join(f"{k} {v:.4g}" for k, v in one["values"].items() if isinstance(v, (int, float)))
                say(f"{workload.key} round {turn + 1}: {entrant.name}: {values}")
    return measured


def values(measured, entrant, key):
    """All values of one kind of an entrant, in order of rounds."""
    return [m["values"][key] for m in measured.get(entrant, [])]


def middle(measured, entrant, key):
    """Their median, or None."""
    found = values(measured, entrant, key)
    return median(found) if found else None


__all__ = ["Entrant", "Failed", "Section", "Workload", "middle", "run_workload", "values"]
