"""Files that survive a kill: written whole or not at all, and read with suspicion.

JSON files appear by write, fsync, rename, and begin with their format and the SHA-256 of all their bytes, taken with 64
zeros in its own place; those of earlier versions have no checksum and are believed. An events file only grows, a line
at a time, each with its format and checksum; a kill may leave half a line at its end, and a later writer closes that
line first, so a reader meets it as a damaged line and counts it.
"""

import hashlib
import json
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.events import Event, TrainingStarted, from_json, to_json
from workbench.errors import StoreError

FORMAT = 1
DAMAGED = "damaged"

_STEPS = b'"kind":"steps_taken"'
_NO_SHA256 = b"0" * 64
_SHA256 = re.compile(rb'\A\{\s*"format": \d+,\s*"sha256": "([0-9a-f]{64})"')


def now() -> str:
    """Return the time in UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def check_time(text: str) -> str:
    """Return a time as `now` writes it.

    Raises:
        ValueError: it is none, or of no zone.
    """
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return text


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and durably."""
    write_with(path, lambda temporary: _write_and_sync(temporary, text.encode()))


def write_json(path: Path, payload: dict[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON object with its `format`, whole or not at all; on one line without `indent`, which is faster."""
    content = _signed(payload, indent)
    write_with(path, lambda temporary: _write_and_sync(temporary, content))


def write_derived(path: Path, payload: dict[str, Any]) -> None:
    """Write a JSON object that can be made again: whole or not at all, but not durably, which takes milliseconds."""
    with _draft(path) as draft:
        draft.write_bytes(_signed(payload, None))
        draft.replace(path)


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it there."""
    with _draft(path) as draft:
        write(draft)
        draft.replace(path)
    sync_folder(path.parent)


def create_json(path: Path, payload: dict[str, Any]) -> bool:
    """Create a JSON file whole, unless it exists; return whether this call created it. Safe between processes."""
    with _draft(path) as draft:
        _write_and_sync(draft, _signed(payload, 1))
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            if draft.stat().st_nlink == 1:
                return False
            # On NFS this call may have made the link, and its answer been lost: the second try finds the file there.
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object without its `sha256`; None where there is no file or a damaged one (`damaged` tells which).

    Raises:
        StoreError: a later version of the workbench wrote it, or it is there and the file system does not give it.
    """
    try:
        content = path.read_bytes()
        plain = json.loads(content)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read ({error.strerror}): mend that, then give the command again"
        ) from error
    if not isinstance(plain, dict) or type(plain.get("format")) is not int or plain["format"] < 1:
        return None
    if plain.pop("sha256", None) is not None and not _holds(content):
        return None
    if plain["format"] > FORMAT:
        raise StoreError(
            f"{path}: format {plain['format']} was written by a later version; this one reads {FORMAT}: upgrade it"
        )
    return plain


def damaged(path: Path) -> bool:
    """Tell whether something is in a JSON file's place that is none of ours, or no longer.

    Raises:
        StoreError: as `read_json`.
    """
    return os.path.lexists(path) and read_json(path) is None


def set_aside(path: Path) -> Path:
    """Give a damaged file, or what lies in its place, another name, by which nobody reads it; return that."""
    number = 1
    while os.path.lexists(free := path.with_name(f"{path.name}.{DAMAGED}{f'-{number}' if number > 1 else ''}")):
        number += 1
    path.rename(free)
    sync_folder(path.parent)
    return free


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Give an empty file beside `path`; what is still under its name when the block ends goes, as on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.fchmod(handle, 0o644)  # mkstemp keeps files private; a record is for everybody who may see the folder
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """Refuse to write into a folder of records that is a link or holds one: records may be a stranger's.

    Raises:
        StoreError: what is written there would land elsewhere.
    """
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise StoreError(
                f"{path}: is a link to {path.readlink()}, and records are written into folders of their own alone: put "
                "the files themselves there"
            )


def _signed(payload: dict[str, Any], indent: int | None) -> bytes:
    """Return the bytes of a JSON file: its format, its checksum, then the payload."""
    rest = {key: value for key, value in payload.items() if key not in ("format", "sha256")}
    text = json.dumps({"format": FORMAT, "sha256": _NO_SHA256.decode(), **rest}, indent=indent) + "\n"
    unsigned = text.encode()
    return unsigned.replace(_NO_SHA256, hashlib.sha256(unsigned).hexdigest().encode(), 1)


def _holds(content: bytes) -> bool:
    found = _SHA256.match(content)
    if found is None:
        return False
    unsigned = content[: found.start(1)] + _NO_SHA256 + content[found.end(1) :]
    return hashlib.sha256(unsigned).hexdigest().encode() == found[1]


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
        self._file = path.open("a+b", buffering=0)
        if self._file.tell() and not _ends_with_newline(path):
            self._file.write(b"\n")

    def append(self, event: Event) -> None:
        """Write one line and hand it to the operating system."""
        plain = {"format": FORMAT, "time": now(), "attempt": self._attempt, **to_json(event)}
        text = json.dumps(plain, separators=(",", ":")).encode()
        line = text[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(text)
        while line:
            line = line[self._file.write(line) :]  # a disk that is nearly full takes a part, and the next call raises

    def sync(self) -> None:
        """Make all lines durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make all lines durable as far as the disk still can, and end: whoever relies on them has called `sync`."""
        with suppress(OSError):
            self.sync()
        self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class EventReader:
    """Reads an events file that may still grow; each `poll` reads only what is new.

    `events` are those that count: when an attempt resumes from a checkpoint, what was recorded beyond its step is
    dropped, because those steps happen again. `damaged` counts lines that could not be read. Without `steps`, lines of
    `StepsTaken` are passed over unread.
    """

    def __init__(self, path: Path, *, steps: bool = True) -> None:
        self._path, self._steps = path, steps
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
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return []
            except OSError as error:
                raise StoreError(f"{self._path}: cannot be read ({error.strerror}): mend that first") from error

    def _read(self, handle: int) -> list[StampedEvent]:
        status = os.fstat(handle)
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._offset, self._inode, self.events, self.damaged = 0, status.st_ino, [], 0
        chunk = os.pread(handle, status.st_size - self._offset, self._offset)
        whole = chunk[: chunk.rfind(b"\n") + 1]
        lines = [line for line in whole.splitlines() if self._steps or _STEPS not in line]
        fresh = [stamped for line in lines if (stamped := self._parse(line))]
        self._offset += len(whole)
        for stamped in fresh:
            if isinstance(stamped.event, TrainingStarted):
                resumed = stamped.event.step
                self.events = [kept for kept in self.events if kept.event.step <= resumed]
            self.events.append(stamped)
        return fresh

    def _parse(self, line: bytes) -> StampedEvent | None:
        try:
            plain = _checked(line)
            written = plain.get("format", 1)
            if isinstance(written, int) and written > FORMAT:
                raise StoreError(
                    f"{self._path}: an event of format {written} was written by a later version; this one reads "
                    f"{FORMAT}: upgrade it"
                )
            check_time(plain["time"])
            event = from_json(plain)
            return event and StampedEvent(time=plain["time"], attempt=int(plain["attempt"]), event=event)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            self.damaged += 1
            return None


def _checked(line: bytes) -> dict[str, Any]:
    """Read a line, also one of before lines had a checksum.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    text, mark, rest = line.rpartition(b',"crc":"')
    if mark and rest[:8] != b"%08x" % zlib.crc32(text + b"}"):
        raise ValueError("the checksum is another one")
    return json.loads(line)
