"""Stopping and pausing in good order, by a signal, from another shell, or because a limit is reached."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Literal

from workbench import durable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


Wish = Literal["stop", "pause"]


class StopNow(KeyboardInterrupt):
    """The driver ends at once."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """A wish to stop or pause, passed on to the workers as a file: they finish their step, write a checkpoint and end.

    It comes as Ctrl-C or SIGTERM, from another shell (`ask`), or from this driver itself (`stop`). A second signal ends
    the driver at once, and so does the first one where no trial is at work.
    """

    def __init__(self, path: Path, *, announce: Callable[[str], None]) -> None:
        self.path = path
        self.signal: int | None = None  # that the exit code is to tell of
        self.reason: str | None = None  # of a stop that no signal asked for
        self._announce = announce
        self._gentle = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block; only a main thread can, and in others they keep their meaning."""
        main = threading.current_thread() is threading.main_thread()
        earlier = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS} if main else {}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            self.path.unlink(missing_ok=True)

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Let the first signal within the block be a wish; whoever enters it looks at `requested` all the time."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def requested(self) -> bool:
        """Tell whether the driver is to stop."""
        if self.signal is None and self.reason is None and wish(self.path) == "stop":
            self.signal = signal.SIGTERM
        return self.signal is not None or self.reason is not None

    def limit(self, reason: str) -> None:
        """Ask for a stop in good order because a limit of the run is reached; the first reason counts."""
        if not self.requested():
            self.reason = reason
            self._pass_on()
            self._announce("Stopping: a limit of this run is reached; each trial writes a checkpoint.")

    def paused(self) -> bool:
        """Tell whether the driver is to wait, with no trial at work, until the wish is withdrawn."""
        return self.signal is None and self.reason is None and wish(self.path) == "pause"

    def wanted(self) -> bool:
        """Tell whether trials are to end, for a stop or a pause."""
        return self.requested() or self.paused()

    def stop(self) -> None:
        """Stop in good order, as SIGTERM does."""
        self.signal = self.signal or signal.SIGTERM
        self._pass_on()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None or not self._gentle:
            raise StopNow(number)
        self.signal = number
        self._pass_on()
        with suppress(OSError, RuntimeError):  # the terminal went away, or is in the midst of another line
            self._announce("Stopping: each trial finishes its step and writes a checkpoint. Once more to stop at once.")

    def _pass_on(self) -> None:
        """Tell the workers."""
        with suppress(OSError):  # of a full disk: they then end with the driver, without a last checkpoint
            ask(self.path, "stop")


def ask(path: Path, wanted: Wish | None) -> None:
    """Ask the driver whose file this is to stop or pause; None withdraws the wish."""
    if wanted is None:
        path.unlink(missing_ok=True)
    elif wanted == "stop":
        path.write_bytes(b"")  # which needs no room on a full disk
    else:
        durable.write_text(path, wanted)  # whole, since half of it would ask to stop


def wish(path: Path) -> Wish | None:
    """Return what a driver is asked for by its file; one that says nothing asks to stop."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    return "pause" if text == "pause" else "stop"
