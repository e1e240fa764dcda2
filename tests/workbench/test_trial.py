"""One trial from its spec to its result, whatever happens on the way."""

import errno
import json
from dataclasses import replace

import pandas as pd
import pytest

from core.data.fingerprint import DataProblem
from core.model.backbone import WeightsProblem
from workbench import attempts, durable
from workbench.errors import DataError, StoreError
from workbench.processes import Process
from workbench.ranks import WorkerLost
from workbench.trial import execute


@pytest.fixture
def spec(toy_plan):
    """Return the first trial of the toy study."""
    return next(iter(toy_plan.specs.values()))


def _caused(error, cause):
    """Return an error as `raise error from cause` leaves it."""
    error.__cause__ = cause
    return error


def run(spec, store, trainer, *, should_stop=lambda: False, driver=None):
    """Execute a trial with the toy trainer."""
    return execute(spec, store.root, should_stop=should_stop, driver=driver, trainer=trainer)


def test_a_trial_leaves_a_whole_record(spec, store, toy_trainer):
    """A finished trial has its spec, events, every evaluation, predictions and a result with costs and provenance."""
    assert run(spec, store, toy_trainer()) == "finished"
    record = store.record(spec.trial_id)
    assert (record.state, record.attempts, record.step, record.total_steps) == ("finished", 1, 6, 6)
    assert [epoch.epoch for epoch in record.epochs] == [1, 2, 3]
    assert record.metrics.keys() == spec.evaluations.keys()
    assert {metrics.ap for metrics in record.metrics.values()} == {0.25}
    result = record.result
    assert result is not None
    assert result["weights_hash"] == "weights-6"
    assert result["seconds"] == 12.0
    assert result["total_seconds"] > 0
    assert result["cpu_seconds"] > 0
    assert result["data_report"] == {"train.boxes": 3}
    assert result["provenance"]["threads"] == 1
    assert result["provenance"]["code_hash"]
    assert "kernel" in result["provenance"]
    frame = pd.read_parquet(store.predictions(spec.trial_id, next(iter(spec.evaluations))))
    assert frame["image_id"].tolist() == [0, 1, 2]
    written = json.loads((store.trial_dir(spec.trial_id) / "spec.json").read_text())
    assert written["config"] == spec.config.model_dump(mode="json")


def test_a_finished_trial_is_not_run_again(spec, store, toy_trainer):
    """Asking again costs nothing and changes nothing."""
    run(spec, store, toy_trainer())
    again = toy_trainer()
    assert run(spec, store, again) == "finished"
    assert again.calls == []
    assert store.record(spec.trial_id).attempts == 1


def test_an_interrupted_trial_goes_on_from_its_checkpoint(spec, store, toy_trainer):
    """Stopping writes a checkpoint; the next attempt resumes there, and times add up."""
    asked = []
    first = toy_trainer(before_step=lambda step: asked.append(step) if step == 1 else None)
    assert run(spec, store, first, should_stop=lambda: bool(asked)) == "interrupted"
    assert store.record(spec.trial_id).state == "interrupted"
    second = toy_trainer()
    assert run(spec, store, second) == "finished"
    assert second.calls[1] == "train from 1"
    result = store.result(spec.trial_id)
    assert result["attempts"] == 2
    first_attempt, second_attempt = attempts.read(store.trial_dir(spec.trial_id))
    assert result["total_seconds"] == pytest.approx(first_attempt.seconds + second_attempt.seconds, abs=0.5)


def test_only_the_missing_evaluation_is_done(spec, store, toy_trainer):
    """A new or damaged evaluation of a finished trial is scored from its checkpoint; the others stay."""
    run(spec, store, toy_trainer())
    result = store.result(spec.trial_id)
    lost, kept = spec.evaluations
    (store.evaluation_dir(spec.trial_id, lost) / "metrics.json").write_text('{"format": 1, "met')
    trainer = toy_trainer()
    assert run(spec, store, trainer) == "finished"
    assert trainer.calls == ["open_data", "train from 6", f"evaluate {spec.evaluations[lost].parameters}"]
    assert store.record(spec.trial_id).metrics.keys() == {lost, kept}
    assert store.result(spec.trial_id) == result


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("a shape"), "error"),
        (OSError(28, "No space left on device"), "io"),
        (MemoryError(), "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "out_of_memory"),
        (DataError("no pictures"), "bad_config"),
        (DataProblem("a.jpg: could be read before"), "bad_config"),
        (_caused(StoreError("spec.json: cannot be read"), OSError(5, "Input/output error")), "io"),
        (WorkerLost("process 1 of the 2 was killed"), "worker_lost"),
        (WeightsProblem("w.pth: no such weights file"), "bad_config"),
        (SystemExit(0), "exited"),
    ],
)
def test_an_error_becomes_the_record(spec, store, toy_trainer, error, kind):
    """Whatever a trial raises, even a way out, is recorded with class, step and traceback, and can be tried again."""

    def fail(step):
        if step == 3:
            raise error

    assert run(spec, store, toy_trainer(before_step=fail)) == "failed"
    record = store.record(spec.trial_id)
    assert record.state == "failed"
    assert record.error["class"] == kind
    assert record.error["type"] == type(error).__name__
    assert record.error["message"] == (str(error) or "MemoryError")
    assert (record.error["step"], record.error["attempt"]) == (2, 1)
    assert "before_step" in record.error["traceback"]
    trainer = toy_trainer()
    assert run(spec, store, trainer) == "finished"
    assert trainer.calls[1] == "train from 2"
    assert store.record(spec.trial_id).error is None


def test_what_fails_before_the_first_step_is_on_record_too(spec, store, toy_trainer, monkeypatch):
    """A disk that is full when a trial begins is its failure, which may pass, and not a process that died."""
    write = durable.write_json

    def full(path, payload):
        if path.name == "spec.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, payload)

    monkeypatch.setattr(durable, "write_json", full)
    assert run(spec, store, toy_trainer()) == "failed"
    assert store.record(spec.trial_id).error["class"] == "io"
    assert attempts.read(store.trial_dir(spec.trial_id))[-1].failure == "io"


def test_a_diverged_trial_is_an_outcome(spec, store, toy_trainer):
    """Divergence is recorded with its reason, is not scored, and is not run again."""
    trainer = toy_trainer(outcome="diverged")
    assert run(spec, store, trainer) == "diverged"
    assert not any(call.startswith("evaluate") for call in trainer.calls)
    assert store.result(spec.trial_id)["reason"] == "the loss is nan"
    again = toy_trainer()
    assert run(spec, store, again) == "diverged"
    assert again.calls == []


@pytest.mark.parametrize("raised", [None, OSError("Stale file handle")])
def test_a_replaced_worker_stops_writing(spec, store, toy_trainer, raised):
    """A worker whose trial another process has taken over adds no event, result or error, whatever it then meets."""
    folder = store.trial_dir(spec.trial_id)

    def take_over(step):
        if step == 3:
            (mine,) = attempts.read(folder)
            attempts.end(folder, mine, outcome="interrupted", seconds=0.0, cpu_seconds=0.0)
            attempts.begin(folder, driver=None)
            if raised:
                raise raised

    assert run(spec, store, toy_trainer(before_step=take_over)) == "busy"
    assert max(item.event.step for item in store.events(spec.trial_id)) == 2
    assert store.record(spec.trial_id).state == "running"
    assert store.result(spec.trial_id) is None
    assert not (folder / "error.json").exists()
    assert attempts.read(folder)[0].outcome == "interrupted"


def test_an_order_to_stop_at_once_leaves_no_trial_that_seems_to_run(spec, store, toy_trainer):
    """A second Ctrl-C ends an inline trial, but not the process where that is a notebook's: the trial goes on later."""

    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec, store, toy_trainer(before_step=interrupt))
    assert store.record(spec.trial_id).state == "interrupted"
    assert run(spec, store, toy_trainer()) == "finished"


def test_files_that_cannot_be_prepared_fail_the_trial_as_what_they_are(spec, store, toy_trainer):
    """A record of a later version is a matter for the user, told in words and not tried again as a lost process."""
    path = store.trial_dir(spec.trial_id) / "spec.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 99}')
    assert run(spec, store, toy_trainer()) == "failed"
    error = store.record(spec.trial_id).error
    assert (error["class"], error["attempt"]) == ("bad_config", 1)
    assert "format 99 was written by a later version" in error["message"]


def test_a_worker_ends_when_its_driver_is_dead(spec, store, toy_trainer):
    """Nobody asked it to stop, but nobody waits for it either: it writes a checkpoint and ends."""
    dead = replace(Process.current(), started=1)
    assert run(spec, store, toy_trainer(), driver=dead) == "interrupted"


def test_a_damaged_result_is_set_aside(spec, store, toy_trainer):
    """A truncated result.json never counts as finished; the trial ends anew and the broken file is kept."""
    run(spec, store, toy_trainer())
    path = store.trial_dir(spec.trial_id) / "result.json"
    path.write_text(path.read_text()[:-30])
    assert store.record(spec.trial_id).state == "interrupted"
    assert run(spec, store, toy_trainer()) == "finished"
    assert store.result(spec.trial_id)["attempts"] == 2
    assert (path.parent / "result.json.damaged").exists()
    assert store.result(spec.trial_id)["damaged"] == ["result.json.damaged"]
