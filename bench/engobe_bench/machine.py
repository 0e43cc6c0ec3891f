"""What was measured on, and with which versions."""

import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _first(pattern, text):
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine():
    """CPU, memory and system; nothing that names the host."""
    cpu = _read("/proc/cpuinfo")
    flags = (_first(r"^(?:flags|Features)\s*:(.*)$", cpu) or "").split()
    family = " ".join(f"{k} {v}" for k in ("cpu family", "model", "stepping") if (v := _first(rf"^{k}\s*:(.*)$", cpu)))
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "asimd", "sve")
    memory = _first(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return {
        "cpu": _first(r"^model name\s*:(.*)$", cpu) or _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor(),
        "cpu_family": family,
        "cpu_features": [f for f in wanted if f in flags],
        "cores": os.cpu_count(),
        "caches": _output("lscpu", "-C=NAME,ALL-SIZE") or "",
        "memory_bytes": int(memory) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "huge_pages": _first(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
    }


def commit():
    """The commit, with `+` if the work tree differs from it (results and reports of the bench aside)."""
    name = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return name and name + ("+" if changed else "")


def slug(machine):
    """`amd-epyc-2c`: a name for the machine that says nothing about whose it is."""
    words = re.sub(r"\((R|TM)\)|@.*|CPU|Processor", "", machine["cpu"] or "cpu", flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f"-{machine['cores']}c"
