"""What the time of a run went into: until the first trial trained, the trials' own seconds, and the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from core.events import CheckpointSaved, EpochFinished, TrainingStarted
from workbench import attempts
from workbench.durable import StampedEvent
from workbench.labels import duration
from workbench.processes import Process
from workbench.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """Seconds of one command. `own` sums over trials: training, and scoring while training and after."""

    wall: float
    start: float  # until the first trial began to train
    own: float
    trials: int
    slots: int  # trials that ran at once
    idle: float = 0.0  # in which slots had no trial left while the last ones ran, the mean over slots

    @property
    def rest(self) -> float:
        """Return the wall seconds after the start in which the slots did not train or score: what the workbench costs.

        Data sets and models that are opened, checkpoints, records, gaps between trials, verdicts and report.
        """
        return self.wall - self.start - self.own / self.slots - self.idle

    def __str__(self) -> str:
        at_once = f", {self.slots} at once" if self.slots > 1 else ""
        idle = f", {self.idle / self.wall:.1%} with no trial left to begin" if self.slots > 1 else ""
        return (
            f"Time: {duration(self.wall)} for {self.trials} trial{'s' if self.trials > 1 else ''}: {self.start:.0f} s "
            f"until the first one trained, {duration(self.own)} of training and scoring{at_once}{idle}, and "
            f"{max(0.0, self.rest) / self.wall:.1%} of the time for all else"
        )


def spent(
    store: Store, trial_ids: Iterable[str], *, driver: Process, began_at: float, ended_at: float, slots: int
) -> Spending | None:
    """Return what a driver's time from `began_at` to `ended_at` (seconds since the epoch) went into.

    None when it trained nothing. Its trials are among `trial_ids`; up to `slots` of them ran at once.
    """
    starts: list[float] = []
    ends: list[float] = []
    own = 0.0
    for trial_id in trial_ids:
        tried = {item.number for item in attempts.read(store.trial_dir(trial_id)) if item.driver == driver}
        events = [item for item in store.reader(trial_id).poll() if item.attempt in tried]
        started = [_seconds(item) for item in events if isinstance(item.event, TrainingStarted)]
        if started:
            starts.append(min(started))
            ends.append(_seconds(events[-1]) + store.scoring_seconds(trial_id, since=began_at))
            own += own_seconds(events) + ends[-1] - _seconds(events[-1])
    if not starts:
        return None
    slots = min(slots, len(starts))
    last = sorted(ends)[-slots:]  # of each slot: it takes trial after trial until none is left
    idle = sum(last[-1] - end for end in last) / slots
    start = min(starts) - began_at
    return Spending(wall=ended_at - began_at, start=start, own=own, trials=len(starts), slots=slots, idle=idle)


def own_seconds(events: Sequence[StampedEvent]) -> float:
    """Return how long a trial trained, and scored while it did: all between its events but checkpoints after epochs."""
    total = 0.0
    for before, item in pairwise(events):
        idle = isinstance(item.event, TrainingStarted)  # another attempt
        saved = isinstance(item.event, CheckpointSaved) and isinstance(before.event, EpochFinished)
        total += 0.0 if idle or saved else _seconds(item) - _seconds(before)
    return total


def _seconds(item: StampedEvent) -> float:
    return datetime.fromisoformat(item.time).timestamp()
