"""One driver at a time runs a study."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench import attempts
from workbench.errors import BusyError
from workbench.lease import Heart
from workbench.records import StudyRef

_WAIT_SECONDS = 2.0  # between looks at a driver that is waited for


class Hold:
    """A driver's hold of a study, which it shows to be alive until `end`."""

    def __init__(self, folder: Path, attempt: attempts.Attempt) -> None:
        self._folder, self._attempt = folder, attempt
        self.wish_file = attempts.wish_file(folder, attempt.number)
        self._began, self._cpu_began = time.monotonic(), time.process_time()
        self._told: Callable[[], None] | None = None
        self._heart = Heart(attempts.beat_file(folder, attempt.number), on_beat=self._tell_of_loss)

    def on_loss(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, once and in another thread, when another driver has taken the study over."""
        self._told = tell

    def end(self) -> None:
        """Let go."""
        self._heart.stop()
        if not self._lost():
            attempts.end(
                self._folder,
                self._attempt,
                outcome="finished",
                seconds=time.monotonic() - self._began,
                cpu_seconds=time.process_time() - self._cpu_began,
            )

    def _lost(self) -> bool:
        return attempts.superseded(self._folder, self._attempt)

    def _tell_of_loss(self) -> None:
        if self._told is not None and self._lost():
            tell, self._told = self._told, None
            tell()


@contextmanager
def held(ref: StudyRef, *, wait: Callable[[str], None] | None) -> Iterator[Hold]:
    """Hold a study within the block; see `Store.lock`."""
    hold = Hold(ref.path, _claim(ref, wait))
    try:
        yield hold
    finally:
        hold.end()


def _claim(ref: StudyRef, wait: Callable[[str], None] | None) -> attempts.Attempt:
    while True:
        try:
            return attempts.begin(ref.path, driver=None)
        except BusyError:
            holder = attempts.read(ref.path)[-1]
        who = f"{ref.study} ({ref.profile}) is being run by {holder.worker} since {holder.began_at}"
        if wait is None:
            raise BusyError(f"{who}; wait for it with --wait, or see it with `python -m workbench status`")
        wait(f"{who}; waiting for it")
        while attempts.read(ref.path)[-1].running(ref.path):
            time.sleep(_WAIT_SECONDS)
