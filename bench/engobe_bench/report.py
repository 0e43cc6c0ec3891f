"""bench/results/: every measurement as JSON, and the tables as Markdown."""

import json
import time
from pathlib import Path

from .machine import ROOT, slug

RESULTS = ROOT / "bench" / "results"


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def disturbance(measurements):
    """How much of the machine others took, over all measurements."""
    out = []
    for key, what in (("others_cpu_share", "other programs"), ("stolen_cpu_share", "the hypervisor")):
        found = sorted(m[key] for m in measurements if key in m)
        if found:
            out.append(f"{what} took {found[len(found) // 2]:.1%} of the CPU time in the median measurement and {found[-1]:.1%} in the worst")
    return "; ".join(out)


def markdown(result, sections):
    """The report."""
    m, v = result["machine"], result["versions"]
    versions = ", ".join(f"{k} {x}" for k, x in v.items())
    head = [
        "# engobe beside its peers",
        f"`bench/compare{' ' + result['arguments'] if result['arguments'] else ''}` on {result['date']}, commit {result['commit']}, {result['seconds'] / 60:.0f} minutes.",
        f"{m['cpu']} ({m['cpu_family']}; {', '.join(m['cpu_features'])}), {m['cores']} cores, {(m['memory_bytes'] or 0) / 2**30:.0f} GiB, {m['system']}. Threads on both sides: {result['threads']}. {versions}.",
        "Medians [lowest–highest] of all rounds; the sides took turns, each time in a fresh process. Ratios are of medians [lowest–highest of the rounds]. Nothing was left out. "
        + disturbance(result["measurements"]).capitalize()
        + ".",
    ]
    for name, why in result["failures"].items():
        head.append(f"**{name} failed:** {why}")
    body = []
    for section in sections:
        body += [f"## {section.title}", table(section.header, section.rows)]
        if section.plot:
            body.append(f"![{section.title}]({section.plot[0]})")
        body += section.notes
    tail = []
    if result["peft_attention"]:
        found = "; ".join(f"{k}: {x}" for k, x in result["peft_attention"].items())
        tail = ["## How PEFT was run", f"`engobe_bench/scripts/peft_train.py`, with the faster of transformers' attentions ({found})."]
    return "\n\n".join([*head, *body, *tail]) + "\n"


def write(result, sections, out=None):
    """Writes a result and the report; returns where."""
    folder = Path(out) if out else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    base = f"{result['date']}-{slug(result['machine'])}"
    path, n = folder / f"{base}.json", 1
    while path.exists():
        n += 1
        path = folder / f"{base}-{n}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for section in sections:
        if section.plot:
            (folder / section.plot[0]).write_text(section.plot[1])
    (folder / "latest.md").write_text(markdown(result, sections))
    return path


def today():
    return time.strftime("%Y-%m-%d")
