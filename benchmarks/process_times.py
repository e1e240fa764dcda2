"""CPU time of a command and of everything that it starts, by kind of process, sampled from Linux's /proc."""

import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_SECONDS = 0.5
TICK = os.sysconf("SC_CLK_TCK")
KINDS = {  # what a process's command line contains -> what it is; the first that fits: raylet's names what it starts
    "raylet/raylet": "Ray: raylet",
    "workbench.template": "templates and their trials",
    "ray::DashboardAgent": "Ray: helpers",
    "ray::RuntimeEnvAgent": "Ray: helpers",
    "ray::": "Ray: the slots",
    "default_worker.py": "Ray: the slots",
    "gcs_server": "Ray: gcs_server",
    "ray/dashboard": "Ray: helpers",
    "ray/autoscaler": "Ray: helpers",
    "ray/_private": "Ray: helpers",
    "workbench run": "driver",
}


@dataclass
class ProcessTimes:
    """CPU seconds by kind, and when the first process of a kind was seen, in seconds after the start."""

    cpu: Counter[str] = field(default_factory=Counter)
    first: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    code: int = 0
    err: str = ""


def measured(command: Sequence[str], *, env: dict[str, str]) -> ProcessTimes:
    """Run a command to its end; its standard output is dropped."""
    found = ProcessTimes()
    seen: dict[tuple[int, int], tuple[str, float]] = {}
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for key, kind, cpu in _family(process.pid):
                found.first.setdefault(kind, time.monotonic() - began)
                seen[key] = (kind, cpu)

    thread = threading.Thread(target=sample)
    thread.start()
    _, found.err = process.communicate()
    done.set()
    thread.join()
    found.wall, found.code = time.monotonic() - began, process.returncode
    for kind, cpu in seen.values():
        found.cpu[kind] += cpu
    return found


def _family(root: int) -> list[tuple[tuple[int, int], str, float]]:
    """Return (process, kind, CPU seconds) of a process and all its descendants; trials count with their template."""
    stats = {pid: stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(pid := int(path.name)))}
    found, members, kinds = [], {root}, {}
    for pid in sorted(stats, key=lambda pid: stats[pid][1]):  # parents started before their children
        parent, started, own, reaped = stats[pid]
        if pid != root and parent not in members:
            continue
        members.add(pid)
        kind = kinds[pid] = _kind(pid)
        if kind is None:
            continue
        if kinds.get(parent) == kind == "templates and their trials":
            continue  # a trial: the template has its time once it has ended
        found.append(((pid, started), kind, (own + (reaped if kind.startswith("templates") else 0)) / TICK))
    return found


def _stat(pid: int) -> tuple[int, int, int, int] | None:
    """Return parent, start, own CPU ticks and those of children that were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    user, system, child_user, child_system = map(int, fields[11:15])
    return int(fields[1]), int(fields[19]), user + system, child_user + child_system


def _kind(pid: int) -> str | None:
    """Return what a process is; None where it has just ended."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return None if not line else next((kind for part, kind in KINDS.items() if part in line), "other")
