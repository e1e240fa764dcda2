"""The attempts of a trial: who works on it, since when, and how each attempt ended.

One file for each attempt, `attempts/<number>.json`. Creating the file claims the trial: of two workers only one can
create it. A worker whose successor exists has been replaced and must not write any more.
"""

import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from workbench import checks, durable
from workbench.errors import BusyError
from workbench.processes import Process

HEARTBEAT_SECONDS = 15 * 60
"""Silence after which a worker on another host counts as dead; longer than a full evaluation, which emits no event."""

Outcome = Literal["finished", "diverged", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One process's work on a trial. `outcome` is None until it ends; `seconds` are wall, `cpu_seconds` CPU time."""

    number: int
    worker: Process
    driver: Process | None
    began_at: str
    outcome: Outcome | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def running(self, folder: Path) -> bool:
        """Tell whether the attempt still goes on, as far as can be known from here."""
        if self.outcome is not None:
            return False
        if self.worker.is_here():
            return self.worker.alive()
        return time.time() - _last_sign(folder, self.number) < HEARTBEAT_SECONDS


def read(folder: Path) -> tuple[Attempt, ...]:
    """Return the attempts recorded in a trial's folder, oldest first; a damaged file counts as an attempt that died."""
    paths = sorted((folder / "attempts").glob("[0-9]*.json"))
    return tuple(_from_json(int(path.stem), checks.attempt(durable.read_json(path))) for path in paths)


def begin(folder: Path, *, driver: Process | None) -> Attempt:
    """Claim the trial for this process.

    Raises:
        BusyError: another process works on it.
    """
    earlier = read(folder)
    if earlier and earlier[-1].running(folder):
        raise BusyError(f"{folder.name}: {earlier[-1].worker} works on this trial since {earlier[-1].began_at}")
    if earlier and earlier[-1].outcome is None:
        _close_for_dead(folder, earlier[-1])
    number = earlier[-1].number + 1 if earlier else 1
    attempt = Attempt(number=number, worker=Process.current(), driver=driver, began_at=durable.now())
    if not durable.create_json(_path(folder, number), asdict(attempt)):
        raise BusyError(f"{folder.name}: another process has just begun this trial")
    return attempt


def end(folder: Path, attempt: Attempt, *, outcome: Outcome, seconds: float, cpu_seconds: float) -> None:
    """Record how an attempt ended."""
    ended = replace(attempt, outcome=outcome, seconds=seconds, cpu_seconds=cpu_seconds)
    durable.write_json(_path(folder, attempt.number), asdict(ended))


def superseded(folder: Path, attempt: Attempt) -> bool:
    """Tell whether another process has taken the trial over."""
    return _path(folder, attempt.number + 1).exists()


def _close_for_dead(folder: Path, attempt: Attempt) -> None:
    began = datetime.fromisoformat(attempt.began_at).timestamp()
    seconds = max(0.0, _last_sign(folder, attempt.number) - began)
    end(folder, attempt, outcome="interrupted", seconds=seconds, cpu_seconds=0.0)


def _last_sign(folder: Path, number: int) -> float:
    """When the worker last wrote something that we know of, in seconds since the epoch."""
    signs = [path.stat().st_mtime for path in (_path(folder, number), folder / "events.jsonl") if path.exists()]
    return max(signs, default=0.0)


def _path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:04d}.json"


def _from_json(number: int, plain: dict[str, Any] | None) -> Attempt:
    try:
        if plain is None:
            raise KeyError
        driver = plain["driver"]
        return Attempt(
            number=number,
            worker=Process(**plain["worker"]),
            driver=Process(**driver) if driver else None,
            began_at=plain["began_at"],
            outcome=plain["outcome"],
            seconds=plain["seconds"],
            cpu_seconds=plain["cpu_seconds"],
        )
    except (KeyError, TypeError):
        nobody = Process(host="", boot="", pid=0, started=None)
        return Attempt(number=number, worker=nobody, driver=None, began_at=durable.now(), outcome="interrupted")
