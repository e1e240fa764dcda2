"""The attempts of a trial, or of a study: who works on it, since when, and how each attempt ended.

One file for each attempt, `attempts/<number>.json`, with its beat beside it (`workbench.lease`). Creating the file
claims the trial: of two workers only one can create it, on any POSIX file system. A worker whose successor exists has
been replaced and must not write any more.
"""

import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from workbench import checks, durable, lease
from workbench.errors import BusyError
from workbench.failures import FailureClass
from workbench.processes import Process

Outcome = Literal["finished", "diverged", "interrupted", "failed"]

_POLL_SECONDS = 0.5  # between looks at a holder that may be dead


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One process's work. `outcome` is None until it ends; `seconds` are wall, `cpu_seconds` CPU time.

    `failure` says why an attempt failed or was cut off; `gpus` how many it held, a share of one included.
    """

    number: int
    worker: Process
    driver: Process | None
    began_at: str
    outcome: Outcome | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    failure: FailureClass | None = None
    gpus: float = 0.0

    def ended_well(self) -> bool:
        """Tell whether the process put the end on record itself, and nothing had failed."""
        return self.outcome is not None and self.failure is None

    def running(self, folder: Path) -> bool:
        """Tell whether the attempt still goes on, as far as one look can tell."""
        if self.outcome is not None:
            return False
        if self.worker.is_here():
            return self.worker.alive()
        return not lease.expired(beat_file(folder, self.number), last_sign=last_sign(folder, self.number))


def read(folder: Path) -> tuple[Attempt, ...]:
    """Return the attempts recorded in a trial's folder, oldest first; a damaged file counts as an attempt that died."""
    paths = sorted((folder / "attempts").glob("[0-9]*.json"))
    return tuple(_from_json(int(path.stem), checks.attempt(durable.read_json(path))) for path in paths)


def begin(folder: Path, *, driver: Process | None, gpus: float = 0.0) -> Attempt:
    """Claim the trial or study for this process; of a holder elsewhere that seems dead, wait until that is certain.

    Raises:
        BusyError: another process works on it.
        StoreError: there are links in the folder, by which it would write elsewhere.
    """
    durable.refuse_links(folder)
    earlier = read(folder)
    if earlier and earlier[-1].outcome is None:
        _await_end(folder, earlier[-1])
        earlier = read(folder)
        if earlier[-1].outcome is None:
            end_for_dead(folder, earlier[-1], outcome="interrupted", failure="worker_lost")
    number = earlier[-1].number + 1 if earlier else 1
    attempt = Attempt(number=number, worker=Process.current(), driver=driver, began_at=durable.now(), gpus=gpus)
    if not durable.create_json(_path(folder, number), asdict(attempt)):
        raise BusyError(f"{folder.name}: another process has just begun to work on this")
    return attempt


def _await_end(folder: Path, holder: Attempt) -> None:
    """Return when the holder has ended or is certain to be dead.

    Raises:
        BusyError: it is alive.
    """
    busy = BusyError(f"{folder.name}: {holder.worker} works on this since {holder.began_at}")
    if holder.worker.is_here():
        if holder.worker.alive():
            raise busy
        return
    path = beat_file(folder, holder.number)
    beats = lease.beats(path)
    while lease.silent_for(path) < lease.EXPIRY_SECONDS:
        if lease.beats(path) != beats:
            raise busy
        if superseded(folder, holder) or read(folder)[-1].outcome is not None:
            return
        time.sleep(_POLL_SECONDS)


def end(
    folder: Path,
    attempt: Attempt,
    *,
    outcome: Outcome,
    seconds: float,
    cpu_seconds: float,
    failure: FailureClass | None = None,
) -> None:
    """Record how an attempt ended."""
    ended = replace(attempt, outcome=outcome, seconds=seconds, cpu_seconds=cpu_seconds, failure=failure)
    durable.write_json(_path(folder, attempt.number), asdict(ended))


def end_for_dead(folder: Path, attempt: Attempt, *, outcome: Outcome, failure: FailureClass) -> None:
    """Record the end of an attempt whose process is dead: it lasted until its last sign of life."""
    began = datetime.fromisoformat(attempt.began_at).timestamp()
    seconds = max(0.0, last_sign(folder, attempt.number) - began)
    end(folder, attempt, outcome=outcome, seconds=seconds, cpu_seconds=0.0, failure=failure)


def superseded(folder: Path, attempt: Attempt) -> bool:
    """Tell whether another process has taken the trial over."""
    return _path(folder, attempt.number + 1).exists()


def beat_file(folder: Path, number: int) -> Path:
    """Return where the worker of an attempt shows that it lives."""
    return folder / "attempts" / f"{number:04d}.beat"


def wish_file(folder: Path, number: int) -> Path:
    """Return where the worker of an attempt, a driver, is asked to stop or to pause: nobody else is meant."""
    return folder / "attempts" / f"{number:04d}.wish"


def last_sign(folder: Path, number: int) -> float:
    """When the worker last wrote something that we know of, in seconds since the epoch."""
    signs = [_path(folder, number), beat_file(folder, number), folder / "events.jsonl"]
    return max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)


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
            failure=plain.get("failure"),
            gpus=plain.get("gpus", 0.0),
        )
    except (KeyError, TypeError):
        nobody = Process(host="", boot="", pid=0, started=None)
        return Attempt(number=number, worker=nobody, driver=None, began_at=durable.now(), outcome="interrupted")
