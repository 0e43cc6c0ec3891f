"""The command line of bench/compare."""

import argparse
import os
import subprocess
import time
from pathlib import Path

from . import peers, report
from .context import Context
from .machine import commit, machine
from .proc import Failed, locked
from .workload import run_workload
from .workloads import WORKLOADS


def arguments():
    keys = ", ".join(w.key for w in WORKLOADS)
    parser = argparse.ArgumentParser(prog="bench/compare", description="engobe beside its peers, interleaved in one run.")
    parser.add_argument("--only", metavar="A,B", help=f"these workloads: {keys}")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds [5]")
    parser.add_argument("--threads", type=int, metavar="N", default=os.cpu_count(), help="threads of both sides [all cores]")
    parser.add_argument("--quick", action="store_true", help="2 rounds, fewer steps, PEFT with sdpa untried")
    parser.add_argument("--engobe", type=Path, metavar="PATH", help="measure this binary [build one]")
    parser.add_argument("--python", metavar="PATH", help="a Python that has the peers [bench/.venv, made when missing]")
    parser.add_argument("--alpaca", type=Path, metavar="FILE", help="Alpaca rows for W4 (JSON)")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="hold this lock (flock) during each round: for machines where others measure too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go [bench/results]")
    args = parser.parse_args()
    wanted = [k.strip().upper() for k in args.only.split(",")] if args.only else [w.key for w in WORKLOADS]
    if unknown := [k for k in wanted if k not in [w.key for w in WORKLOADS]]:
        parser.error(f"--only {','.join(unknown)}: expected some of {keys}")
    for name in ("repeats", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1")
    return args, [w for w in WORKLOADS if w.key in wanted]


def main():
    args, workloads = arguments()
    started = time.monotonic()
    try:
        python = peers.python(args.python)
        with locked(args.lock):
            engobe, rate = peers.build(args.engobe, rated=any(w.rated for w in workloads))
        versions = peers.versions(python)
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        return f"bench/compare: {error}"
    work = peers.target_dir() / "bench"
    work.mkdir(parents=True, exist_ok=True)
    ctx = Context(
        engobe=engobe,
        rate=rate,
        python=python,
        threads=args.threads,
        repeats=args.repeats or (2 if args.quick else 5),
        quick=args.quick,
        work=work,
        lock=args.lock,
        alpaca=args.alpaca,
    )
    version = subprocess.run([engobe, "--version"], capture_output=True, text=True).stdout.split()[-1:]
    given = [f"--{k} {getattr(args, k)}" for k in ("only", "repeats") if getattr(args, k)] + ["--quick"] * args.quick
    result = {
        "date": report.today(),
        "arguments": " ".join(given),
        "commit": commit(),
        "machine": machine(),
        "threads": args.threads,
        "versions": {"engobe": "".join(version), **versions},
        "failures": {},
        "peft_attention": ctx.choices,
        "peft_attention_trials": ctx.trials,
        "measurements": [],
    }
    sections, path = [], report.place(result, args.out)
    for workload in workloads:
        try:
            measured = run_workload(workload, ctx, result["measurements"].append)
            sections.append(workload.section(ctx, measured))
            print(f"\n{sections[-1].title}\n{report.table(sections[-1].header, sections[-1].rows)}", flush=True)
        except Failed as error:
            result["failures"][workload.key] = ctx.plain(str(error))
            peers.say(f"{workload.key} failed: {error}")
        # as far as it is: what was measured is not lost when the rest is called off
        result["seconds"] = time.monotonic() - started
        report.write(path, result, sections)
    peers.say(f"results: {path}, {path.parent / 'latest.md'}")
    return 1 if result["failures"] else 0
