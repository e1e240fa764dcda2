"""The live table of a run: redrawn in place in a terminal, short lines in a log file."""

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from core.events import StepsTaken
from core.metrics import Metrics
from workbench.durable import StampedEvent
from workbench.labels import POINTS
from workbench.records import TrialRecord
from workbench.repeating import repeating
from workbench.store import Store
from workbench.study import PlannedTrial
from workbench.terminal import visible

REDRAW_SECONDS = 1.0
LOG_SECONDS = 15.0
BAR = 12
OVER = ("finished", "diverged", "failed")
ORDER = ("running", "failed", "interrupted", "diverged", "pending", "finished")


class Progress:
    """Watches the records of some trials and says on a stream how far they are."""

    def __init__(self, store: Store, trials: tuple[PlannedTrial, ...], *, concurrency: int, stream: TextIO) -> None:
        self._store, self._trials, self._concurrency = store, trials, concurrency
        self._stream, self._terminal = stream, is_terminal(stream)
        self._records: dict[str, TrialRecord] = {}
        self._drawn = 0  # lines on the screen
        self._said_at = 0.0
        self._before = self._read()
        self._lock = threading.RLock()  # a signal may come while a line is said, and has one to say itself

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Update the display within the block, and once more at its end."""
        try:
            with repeating(self.update, every=REDRAW_SECONDS, name="progress", on_error=self._skip):
                yield
        finally:
            self.update(last=True)

    def say(self, line: str) -> None:
        """Print a line above the table."""
        with self._lock:
            self._erase()
            self._stream.write(line + "\n")
            self._stream.flush()

    def update(self, *, last: bool = False) -> None:
        """Read the records and show what has changed."""
        records = self._read()
        with self._lock:
            if self._terminal:
                self._erase()
                lines = table(self._rows(records), width=shutil.get_terminal_size().columns)
                rows = shutil.get_terminal_size().lines - 3
                lines = [*lines[: max(4, rows)], self._summary(records)]
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._drawn = 0 if last else len(lines)
            else:
                self._log(records, last=last)
            self._stream.flush()
        self._before = records

    def _skip(self, error: Exception) -> None:
        """Leave a drawing out: what stays wrong is met by the last one, which raises it where the driver sees it."""

    def _read(self) -> dict[str, TrialRecord]:
        for trial in self._trials:
            known = self._records.get(trial.trial_id)
            if known is None or known.state not in ("finished", "diverged"):
                self._records[trial.trial_id] = self._store.record(trial.trial_id)
        return dict(self._records)

    def _log(self, records: dict[str, TrialRecord], *, last: bool) -> None:
        changed = False
        for trial in self._trials:
            record, before = records[trial.trial_id], self._before[trial.trial_id]
            if record.state != before.state:
                changed = True
                self._stream.write(f"{_clock()}  {trial.variant} seed {trial.seed}: {_ending(record)}\n")
        if changed or last or time.monotonic() - self._said_at >= LOG_SECONDS:
            self._said_at = time.monotonic()
            going = [
                f"{trial.variant}/{trial.seed} {share(record):.0%}"
                for trial in self._trials
                if (record := records[trial.trial_id]).state == "running"
            ]
            self._stream.write(f"{_clock()}  {self._summary(records)}{': ' if going else ''}{', '.join(going)}\n")

    def _rows(self, records: dict[str, TrialRecord]) -> list[tuple[str, ...]]:
        ordered = sorted(self._trials, key=lambda trial: ORDER.index(records[trial.trial_id].state))
        return [self._row(trial, records[trial.trial_id]) for trial in ordered]

    def _row(self, trial: PlannedTrial, record: TrialRecord) -> tuple[str, ...]:
        best, running = best_ap(record), record.state == "running"
        speed = last_speed(self._store.events(trial.trial_id)) if running else None
        filled = round(share(record) * BAR)
        return (
            trial.variant,
            str(trial.seed),
            record.state,
            f"{'█' * filled}{'·' * (BAR - filled)} {share(record):4.0%}",
            "" if best is None else f"{POINTS * best:.1f}",
            f"{speed:.0f}" if speed else "",
            duration(_left(record)) if running and record.step else "",
        )

    def _summary(self, records: dict[str, TrialRecord]) -> str:
        counts = Counter(record.state for record in records.values())
        over = sum(counts[state] for state in OVER)
        parts = [f"{over} of {len(records)} trials done"]
        parts += [f"{counts[state]} {state}" for state in ("running", "failed", "diverged") if counts[state]]
        seconds = left_altogether(list(records.values()), self._concurrency)
        if seconds:
            parts.append(f"about {duration(seconds)} left")
        return ", ".join(parts)

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")  # to the first line drawn, and clear below
            self._drawn = 0


def table(rows: list[tuple[str, ...]], *, width: int) -> list[str]:
    """Align rows under their headings, numbers to the right, cut at `width` characters."""
    heading = ("variant", "seed", "state", "progress", "best AP", "pictures/s", "left")
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    left = {0, 2, 3}
    return [
        "  ".join(
            cell.ljust(size) if column in left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        )[:width]
        for row in (heading, *rows)
    ]


def best_ap(record: TrialRecord) -> float | None:
    """Return the best AP so far, of final and running evaluations, as a fraction."""
    scored: list[Metrics] = [*record.metrics.values()]
    scored += [metrics for epoch in record.epochs for metrics in epoch.metrics.values()]
    return max((metrics.ap for metrics in scored if metrics.ap is not None), default=None)


def share(record: TrialRecord) -> float:
    """Return how much of a trial's training is done, from 0 to 1."""
    if record.state == "finished":
        return 1.0
    return record.step / record.total_steps if record.total_steps else 0.0


def last_speed(events: list[StampedEvent]) -> float | None:
    """Return the pictures per second last reported."""
    speeds = [item.event.pictures_per_s for item in events if isinstance(item.event, StepsTaken)]
    return speeds[-1] if speeds else None


def left_altogether(records: list[TrialRecord], concurrency: int) -> float | None:
    """Return the wall seconds that unfinished trials still need, or None while nothing is known of their length."""
    ended = [record.total_seconds for record in records if record.state == "finished" and record.total_seconds]
    guessed = [record.seconds / share(record) for record in records if record.seconds and share(record)]
    lengths = ended or guessed
    if not lengths:
        return None
    typical = sum(lengths) / len(lengths)
    remaining = [typical * (1 - share(record)) for record in records if record.state not in OVER]
    return max(sum(remaining) / max(1, concurrency), max(remaining, default=0.0))


def duration(seconds: float) -> str:
    """Write seconds as 0:42, 12:05 or 3:10:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a stream can be redrawn in place."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _left(record: TrialRecord) -> float:
    return record.seconds / record.step * ((record.total_steps or record.step) - record.step)


def _ending(record: TrialRecord) -> str:
    best = best_ap(record)
    if record.state == "finished" and best is not None:
        return f"finished, AP {POINTS * best:.1f}, {duration(record.total_seconds)}"
    if record.error is not None and record.state == "failed":
        first, _, _ = record.error["message"].partition("\n")
        return f"failed: {visible(first)}"
    return record.state


def _clock() -> str:
    return time.strftime("%H:%M:%S")
