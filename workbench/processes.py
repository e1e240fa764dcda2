"""Who does something: a process that can be told from a later one with the same number."""

import os
import socket
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process on a host. `started` is its start in clock ticks after `boot`, None where there is no /proc."""

    host: str
    boot: str
    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        return cls(host=socket.gethostname(), boot=_boot(), pid=os.getpid(), started=_started(os.getpid()))

    def is_here(self) -> bool:
        """Tell whether the process was started on this host, so that `alive` can know."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Tell whether the process still lives; a zombie, and a recycled number, do not count."""
        if not self.is_here() or self.boot != _boot():
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
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])
