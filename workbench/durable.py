"""Files that survive a kill: written whole or not at all, and read with suspicion.

JSON files appear by write, fsync, rename. An events file only grows, a line at a time; a kill may leave half a line at
its end, and a later writer closes that line first, so a reader meets it as a damaged line and counts it.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.events import Event, TrainingStarted, from_json, to_json
from workbench.errors import StoreError

FORMAT = 1


def now() -> str:
    """Return the time in UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and durably."""
    write_with(path, lambda temporary: _write_and_sync(temporary, text.encode()))


def write_json(path: Path, payload: dict[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON object with its `format`, whole or not at all; on one line without `indent`, which is faster."""
    write_text(path, json.dumps({"format": FORMAT, **payload}, indent=indent) + "\n")


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_json(path: Path, payload: dict[str, Any]) -> bool:
    """Create a JSON file whole, unless it exists; return whether this call created it. Safe between processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        _write_and_sync(temporary, (json.dumps({"format": FORMAT, **payload}, indent=1) + "\n").encode())
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no file or a damaged one.

    Raises:
        StoreError: a later version of the workbench wrote it.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(plain, dict) or not isinstance(plain.get("format"), int):
        return None
    if plain["format"] > FORMAT:
        raise StoreError(
            f"{path}: format {plain['format']} was written by a later version; this one reads {FORMAT}: upgrade it"
        )
    return plain


UNUSABLE = (KeyError, TypeError, ValueError, AttributeError)
"""What the use of a JSON file of ours raises whose values are not what they should be: it counts as damaged."""


def stamp(path: str | Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced; None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path for each of a thousand files would take longer than the files
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_and_sync(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)  # mkstemp keeps files private; a record is for everybody who may see the folder


@dataclass(frozen=True, kw_only=True, slots=True)
class StampedEvent:
    """An event as it was recorded: when (UTC, ISO 8601) and in which attempt."""

    time: str
    attempt: int
    event: Event


class EventWriter:
    """Appends events to a trial's events.jsonl, each visible to readers at once."""

    def __init__(self, path: Path, *, attempt: int) -> None:
        self._attempt = attempt
        self._file = path.open("a+b")
        if self._file.tell() and not _ends_with_newline(path):
            self._file.write(b"\n")

    def append(self, event: Event) -> None:
        """Write one line and hand it to the operating system."""
        line = json.dumps({"time": now(), "attempt": self._attempt, **to_json(event)}, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Make all lines durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class EventReader:
    """Reads an events file that may still grow; each `poll` reads only what is new.

    `events` are those that count: when an attempt resumes from a checkpoint, what was recorded beyond its step is
    dropped, because those steps happen again. `damaged` counts lines that could not be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._lock = threading.Lock()
        self.events: list[StampedEvent] = []
        self.damaged = 0

    def poll(self) -> list[StampedEvent]:
        """Read the new whole lines and return their events, also those that a later resume will drop."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    return self._read(file.fileno())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _read(self, handle: int) -> list[StampedEvent]:
        status = os.fstat(handle)
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._offset, self._inode, self.events, self.damaged = 0, status.st_ino, [], 0
        chunk = os.pread(handle, status.st_size - self._offset, self._offset)
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(whole)
        fresh = [stamped for line in whole.splitlines() if (stamped := self._parse(line))]
        for stamped in fresh:
            if isinstance(stamped.event, TrainingStarted):
                resumed = stamped.event.step
                self.events = [kept for kept in self.events if kept.event.step <= resumed]
            self.events.append(stamped)
        return fresh

    def _parse(self, line: bytes) -> StampedEvent | None:
        try:
            plain = json.loads(line)
            event = from_json(plain)
            return event and StampedEvent(time=plain["time"], attempt=plain["attempt"], event=event)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged += 1
            return None
