"""The peers' Python environment, and the programs that are built here."""

import json
import subprocess
import sys
from pathlib import Path

from .machine import ROOT
from .proc import Failed

BENCH = ROOT / "bench"
SCRIPTS = BENCH / "engobe_bench" / "scripts"
VENV = BENCH / ".venv"
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "xllamacpp", "gguf", "numpy"]


def say(text):
    print(text, file=sys.stderr, flush=True)


def python(given=None):
    """A Python that has the peers: the given one, or that of bench/.venv, which is made when it is missing."""
    if given:
        return str(given)
    own, wanted = VENV / "bin" / "python", (BENCH / "requirements.txt").read_text()
    stamp = VENV / "requirements.txt"
    if not (stamp.exists() and stamp.read_text() == wanted):
        say(f"installing the peers into {VENV} (some GB, once)")
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([own, "-m", "pip", "install", "-q", "-r", BENCH / "requirements.txt"], check=True)
        stamp.write_text(wanted)
    return str(own)


def versions(python):
    """Versions of the peers that are installed there."""
    code = (
        "import json, sys, importlib.metadata as m\n"
        f"names = {PACKAGES!r}\n"
        "out = {'python': sys.version.split()[0]}\n"
        "for n in names:\n"
        "    try: out[n] = m.version(n)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(out))"
    )
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def cargo(*args):
    """Runs cargo in the repository."""
    done = subprocess.run(["cargo", *args], cwd=ROOT)
    if done.returncode != 0:
        raise Failed(f"cargo {' '.join(args)} failed")


def target_dir():
    """Where cargo builds."""
    out = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return Path(json.loads(out.stdout)["target_directory"])


def build(given=None, engobe=True, rated=True):
    """(engobe, machine_rate): the given binary or the one built here, and the program that measures the machine."""
    if rated:
        cargo("build", "--release", "--quiet", "-p", "engobe-kernels", "--example", "machine_rate")
    target = target_dir() / "release"
    rate = target / "examples" / "machine_rate"
    if not engobe:
        return None, rate
    if given is None:
        cargo("build", "--release", "--quiet", "-p", "engobe")
        given = target / "engobe"
    if not Path(given).is_file():
        raise Failed(f"--engobe {given}: no such file")
    return Path(given).resolve(), rate
