"""Who does something: a process that can be told from a later one with the same number."""

import os
import socket
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process on a host. `started` is its start in clock ticks after the boot, None where there is no /proc.

    `boot` names the boot of the machine and the set of processes that its number belongs to: a container has its own.
    """

    host: str
    boot: str
    pid: int
    started: int | None
    command: str = ""  # of a driver, when the command began: a notebook's process gives several

    @classmethod
    def current(cls, *, command: str = "") -> Self:
        """Return this process."""
        return replace(cls.of(os.getpid()), command=command)

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the process of this machine that has the number now."""
        return cls(host=socket.gethostname(), boot=_boot(), pid=pid, started=_started(pid))

    def is_here(self) -> bool:
        """Tell whether the process belongs to this machine as it is now, so that `alive` can know.

        Two machines may have one name, and a machine may have been started anew: neither is here.
        """
        return self.host == socket.gethostname() and self.boot == _boot()

    def alive(self) -> bool:
        """Tell whether the process still lives; a zombie, and a recycled number, do not count."""
        if not self.is_here():
            return False
        if self.started is not None:
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])
