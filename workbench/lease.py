"""Signs of life, by which a holder on another machine can be told to be dead.

A holder writes a beat, a number that grows, into a small file every few seconds. Whoever waits compares what it reads
with what it read before and measures the silence by its own monotonic clock: no time of one machine is ever compared
with that of another, and no lock of the file system is needed, so this holds on NFS and Lustre. What is held, and by
whom, is said by numbered files that only one process can create (`workbench.attempts`); a beat belongs to one of them.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 120.0
"""Silence after which a holder counts as dead: longer than NFS keeps what it knows of a file (60 s) and some beats."""
CLOCKS_DIFFER_SECONDS = 300.0
"""By how much the clocks of machines may differ where one look must do, as for `status`."""

_SIZE = 40  # bytes of a beat file, always: it is written in place, which needs no room on a full disk

_seen: dict[Path, tuple[bytes, float, float]] = {}  # a beat file -> what it said, for how long, when we last looked


class Heart:
    """Beats in a thread until `stop`. `pulse` says that the work itself goes on; see `on_stall`."""

    def __init__(
        self,
        path: Path,
        *,
        stall_seconds: float | None = None,
        on_stall: Callable[[], None] | None = None,
        on_beat: Callable[[], None] | None = None,
    ) -> None:
        """Begin to beat into `path`.

        Args:
            path: the beat file.
            stall_seconds: without a pulse, after which `on_stall` is called once, in the heart's thread.
            on_stall: what to do then.
            on_beat: called before each beat, in the heart's thread; it may raise OSError.
        """
        self._path, self._stall_seconds, self._on_stall, self._on_beat = path, stall_seconds, on_stall, on_beat
        self._beats, self._pulses = 0, 0
        self._ended = threading.Event()
        self._hurry = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._loop, name="heart", daemon=True)
        self._thread.start()

    def pulse(self) -> None:
        """Say that the work has gone a step further; the first time, the file says so at once."""
        self._pulses += 1
        if self._pulses == 1:
            self._hurry.set()

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()
        self._hurry.set()
        self._thread.join()

    def _loop(self) -> None:
        seen, still, looked = 0, 0.0, time.monotonic()
        while not self._ended.is_set():
            self._hurry.wait(BEAT_SECONDS)
            self._hurry.clear()
            if self._ended.is_set():
                return
            self._beat()
            now = time.monotonic()
            still = still + _awake(looked, now) if self._pulses == seen else 0.0
            seen, looked = self._pulses, now
            if self._stall_seconds is not None and still > self._stall_seconds:
                self._stall_seconds = None
                assert self._on_stall is not None  # given with the seconds
                self._on_stall()

    def _beat(self) -> None:
        self._beats += 1
        content = f"{self._beats} {self._pulses}".ljust(_SIZE - 1) + "\n"
        # A file system that is away for a while must not end the work; silence is what others then see.
        with contextlib.suppress(OSError):
            if self._on_beat is not None:
                self._on_beat()
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(handle, content.encode(), 0)
            finally:
                os.close(handle)


def beats(path: Path) -> int:
    """Return how often the holder has beaten; 0 where there is no beat yet."""
    return _numbers(path)[0]


def pulses(path: Path) -> int:
    """Return how far the work had gone at the last beat; 0 where there is none."""
    return _numbers(path)[1]


def _numbers(path: Path) -> tuple[int, int]:
    words = _read(path).split()
    return (int(words[0]), int(words[1])) if len(words) == 2 and all(word.isdigit() for word in words) else (0, 0)


def silent_for(path: Path) -> float:
    """Return for how many seconds this process has seen no new beat, by its own clock; 0 at the first look."""
    content, now = _read(path), time.monotonic()
    said, silence, looked = _seen.get(path, (None, 0.0, now))
    silence = silence + _awake(looked, now) if said == content else 0.0
    _seen[path] = content, silence, now
    return silence


def _awake(before: float, now: float) -> float:
    """Return how much of the time between two looks counts: no more than two beats, since this process may have slept.

    When it was suspended, as by Slurm or with its container, so were others, which will go on in a moment.
    """
    return min(now - before, 2 * BEAT_SECONDS)


def expired(path: Path, *, last_sign: float) -> bool:
    """Tell whether the holder counts as dead: silent for too long, or so old that no difference of clocks explains it.

    The second goes by file times (`last_sign`, seconds since the epoch), good enough to show; who takes something over
    waits for silence.
    """
    return silent_for(path) >= EXPIRY_SECONDS or time.time() - last_sign > EXPIRY_SECONDS + CLOCKS_DIFFER_SECONDS


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
