"""What the time of a run went into."""

import time
from datetime import UTC, datetime

import pytest

from core.events import CheckpointSaved, EpochFinished, StepsTaken, TrainingStarted
from workbench import attempts
from workbench.durable import EventWriter, StampedEvent, write_json
from workbench.processes import Process
from workbench.spending import Spending, own_seconds, spent

STARTED = TrainingStarted(
    step=0, total_steps=4, total_epochs=2, num_parameters=7, threads=1, device="cpu", process_id=1
)
STEPS = StepsTaken(step=1, epoch=0.5, losses={}, grad_norm=1.0, learning_rate=0.1, pictures_per_s=1.0, seconds=1.0)
EPOCH = EpochFinished(
    step=2,
    epoch=1,
    losses={},
    grad_norm=1.0,
    learning_rate=0.1,
    pictures_per_s=1.0,
    peak_memory_bytes=1,
    seconds=9.0,
    metrics={},
)
SAVED = CheckpointSaved(step=2, path="2.pt")


def at(second, event):
    """Return an event of a second of the epoch."""
    return StampedEvent(time=datetime.fromtimestamp(second, UTC).isoformat(), attempt=1, event=event)


def test_checkpoints_after_epochs_and_gaps_between_attempts_are_not_the_trials_own():
    """10 s of an epoch, then 3 s for its checkpoint; steps up to a checkpoint within the epoch; a gap of 100 s; 5 s."""
    first = [at(0, STARTED), at(4, STEPS), at(10, EPOCH), at(13, SAVED), at(17, STEPS), at(19, SAVED)]
    assert own_seconds(first) == 16
    assert own_seconds([*first, at(119, STARTED), at(124, EPOCH)]) == 21
    assert own_seconds([]) == 0


def test_only_what_this_driver_ran_counts(store):
    """Attempts of other drivers are not its own, nor trials that never began; the start is of the earliest trial."""
    mine, other = Process.current(), Process(host="elsewhere", boot="", pid=1, started=1)
    began_at = time.time() - 100
    for trial_id, driver in (("one", mine), ("two", mine), ("three", other)):
        folder = store.trial_dir(trial_id)
        attempts.begin(folder, driver=driver)
        write_json(folder / "evaluations" / "raw" / "metrics.json", {"seconds": 7.0})
        writer = EventWriter(folder / "events.jsonl", attempt=1)
        writer.append(STARTED)
        writer.append(STEPS)
        writer.close()
    found = spent(
        store, ["one", "two", "three", "four"], driver=mine, began_at=began_at, ended_at=began_at + 120, slots=4
    )
    assert found is not None
    assert (found.wall, found.trials, found.slots) == (120, 2, 2)
    assert found.own == pytest.approx(14, abs=0.5)
    assert found.start == pytest.approx(100, abs=5)
    none = spent(store, ["three"], driver=mine, began_at=began_at, ended_at=began_at + 120, slots=4)
    assert none is None


def test_the_line_says_what_is_not_training():
    """After the start, two slots of 54 s, of which 84 s in all were the trials' own and 6 s idle: 9 s are the rest."""
    line = str(Spending(wall=60.0, start=6.0, own=84.0, trials=4, slots=2, idle=3.0))
    assert line == (
        "Time: 1 min 00 s for 4 trials: 6 s until the first one trained, 1 min 24 s of training and scoring, "
        "2 at once, 5.0% with no trial left to begin, and 15.0% of the time for all else"
    )


def test_a_slot_is_idle_from_its_last_trial_on(store, monkeypatch):
    """Of three trials in two slots the last runs alone for 20 s: 10 s a slot."""
    mine = Process.current()
    for trial_id, seconds in (("one", (0, 30)), ("two", (0, 30)), ("three", (30, 50))):
        folder = store.trial_dir(trial_id)
        attempts.begin(folder, driver=mine)
        writer = EventWriter(folder / "events.jsonl", attempt=1)
        for second, event in zip(seconds, (STARTED, EPOCH), strict=True):
            stamp = at(second, event).time
            monkeypatch.setattr("workbench.durable.now", lambda stamp=stamp: stamp)
            writer.append(event)
        writer.close()
    found = spent(store, ["one", "two", "three"], driver=mine, began_at=-5.0, ended_at=52.0, slots=2)
    assert found is not None
    assert (found.start, found.own, found.idle, found.rest) == (5.0, 80.0, 10.0, 2.0)
