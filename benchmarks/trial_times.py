"""What the seconds of single trials went into, from their records."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from core.events import CheckpointSaved, EpochFinished, TrainingStarted
from workbench import attempts
from workbench.spending import own_seconds
from workbench.store import Store

TICKS = 100  # of Process.started, a second


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialTimes:
    """Seconds of a trial, in order of what comes first; None where it cannot be known."""

    waiting_for_its_process: float | None  # since the trial before it in the slot
    process_to_claim: float  # Python, the records of the trial
    opening_data_and_model: float
    training: float
    scoring_after_epochs: float
    checkpoints_after_epochs: float
    scoring_at_the_end: float
    predictions_and_records: float


def trial_times(store: Store, trial_ids: Sequence[str]) -> list[TrialTimes]:
    """Return the times of trials that were run in one attempt by one driver, in order of their begin."""
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    found: list[tuple[float, float, float, TrialTimes]] = []
    for trial_id in trial_ids:
        (attempt,) = attempts.read(store.trial_dir(trial_id))
        events = store.events(trial_id)
        times = [_seconds(item.time) for item in events]
        (started,) = (at for at, item in zip(times, events, strict=True) if isinstance(item.event, TrainingStarted))
        born = boot + (attempt.worker.started or 0) / TICKS
        began, record = _seconds(attempt.began_at), store.record(trial_id)
        saving = sum(
            after - before
            for (before, one), (after, two) in pairwise(zip(times, events, strict=True))
            if isinstance(one.event, EpochFinished) and isinstance(two.event, CheckpointSaved)
        )
        own, scoring = own_seconds(events), store.scoring_seconds(trial_id, since=0.0)
        parts = TrialTimes(
            waiting_for_its_process=None,
            process_to_claim=began - born,
            opening_data_and_model=started - began,
            training=record.seconds,
            scoring_after_epochs=own - record.seconds,
            checkpoints_after_epochs=saving,
            scoring_at_the_end=scoring,
            predictions_and_records=began + attempt.seconds - times[-1] - scoring,
        )
        found.append((began, born, began + attempt.seconds, parts))
    return _with_gaps(sorted(found, key=lambda item: item[0]))


def _with_gaps(found: list[tuple[float, float, float, TrialTimes]]) -> list[TrialTimes]:
    """Give each trial the slot that has been free for longest; the first of a slot has waited for nobody."""
    from dataclasses import replace

    ends: list[float] = []
    told: list[TrialTimes] = []
    for _, born, ended, parts in found:
        free = [end for end in ends if end <= born + 0.05]
        if free:
            ends.remove(min(free))
        told.append(replace(parts, waiting_for_its_process=born - min(free) if free else None))
        ends.append(ended)
    return told


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
