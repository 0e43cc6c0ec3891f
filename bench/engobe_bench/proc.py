"""Runs one measured process and says what it used."""

import fcntl
import os
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager

TICK = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A measured command failed."""


def cpu_seconds():
    """(busy, stolen) CPU seconds of the whole machine since it started; None where there is no /proc."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    except OSError:
        return None
    return (user + nice + system + irq + softirq) / TICK, steal / TICK


@contextmanager
def locked(path):
    """Holds a lock file, as `flock` does: for machines on which others measure too."""
    if path is None:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command, env=None, watch=None):
    """Runs `command` to its end. `watch(process)` may look on from the moment that it has started.

    Returns standard output and what it cost: wall seconds, CPU seconds, peak memory and page faults from the
    child's own rusage, and which share of the machine's CPU time went to others meanwhile.
    """
    before = cpu_seconds()
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **(env or {})}
        )
        seen = {}
        watcher = threading.Thread(target=lambda: seen.update(watch(child, started)), daemon=True) if watch else None
        if watcher:
            watcher.start()
        parts, first_output = [], None
        while part := os.read(child.stdout.fileno(), 1 << 16):
            first_output = first_output or time.monotonic() - started
            parts.append(part)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if watcher:
            watcher.join(timeout=1)
        if child.returncode != 0:
            errors.seek(0)
            tail = errors.read().decode(errors="replace").strip().splitlines()[-5:]
            raise Failed(f"{' '.join(map(str, command))[:500]}\nstatus {child.returncode}: " + "\n".join(tail))
    used = usage.ru_utime + usage.ru_stime
    cost = {
        "started": started,
        "wall_seconds": wall,
        "first_output_seconds": first_output,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024),
        "minor_faults": usage.ru_minflt,
        "major_faults": usage.ru_majflt,
        "context_switches": usage.ru_nvcsw + usage.ru_nivcsw,
        **seen,
    }
    after = cpu_seconds()
    if before and after:
        room = wall * (os.cpu_count() or 1)
        cost["others_cpu_share"] = max(0.0, after[0] - before[0] - used) / room
        cost["stolen_cpu_share"] = (after[1] - before[1]) / room
    return b"".join(parts).decode(errors="replace"), cost
