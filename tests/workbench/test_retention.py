"""What a quota takes from finished trials, and what it never takes."""

import errno
import shutil

import pytest

from core.config import EvaluationConfig
from workbench import attempts, durable, retention
from workbench.trial import complete, execute


@pytest.fixture
def finished(store, toy_plan, toy_trainer):
    """Return the folders of three finished trials, oldest first, each with a checkpoint of 1000 bytes, and a fourth."""
    folders = []
    for number, spec in enumerate(toy_plan.specs.values()):
        stop = number == 3
        execute(spec, store.root, should_stop=lambda stop=stop: stop, trainer=toy_trainer(), driver=None)
        folder = store.trial_dir(spec.trial_id)
        folder.joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "toy.json").write_bytes(b"6".ljust(1000))
        for path in folder.glob("evaluations/*/predictions.parquet"):
            path.write_bytes(bytes(100))
        folders.append(folder)
    return folders


def _keep(store, plan, quota):
    return retention.keep_within(store.root, quota, plan=plan)


def _holds(folder):
    return (
        (folder / "checkpoints" / "toy.json").exists(),
        len(list(folder.glob("evaluations/*/predictions.parquet"))),
    )


def test_nothing_goes_below_the_quota(store, toy_plan, finished):
    """Three finished trials of 1200 bytes and an unfinished one of 1000 fit 4600."""
    assert _keep(store, toy_plan, 4600) == retention.Kept(trials=0, freed=0, over=0)
    assert [_holds(folder) for folder in finished[:3]] == [(True, 2)] * 3


def test_the_oldest_checkpoint_goes_first_then_predictions(store, toy_plan, finished):
    """Checkpoints of finished trials go by age, predictions after all of them; the record of what went stays."""
    assert _keep(store, toy_plan, 4599) == retention.Kept(trials=1, freed=1000, over=0)
    assert [_holds(folder) for folder in finished[:3]] == [(False, 2), (True, 2), (True, 2)]
    assert _keep(store, toy_plan, 1500) == retention.Kept(trials=3, freed=2200, over=0)
    assert [_holds(folder) for folder in finished[:3]] == [(False, 0), (False, 2), (False, 2)]
    said = durable.read_json(finished[0] / "removed.json")
    assert {key: said[key]["bytes"] for key in ("checkpoint", "predictions")} == {
        "checkpoint": 1000,
        "predictions": 200,
    }
    assert retention.was_removed(finished[1])


def test_room_is_made_on_a_full_disk(store, toy_plan, finished, monkeypatch):
    """What goes is put on record when it has gone: before, a disk that is full has no room for the record."""
    write = durable.write_json

    def full(path, payload):
        if (finished[0] / "checkpoints").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, payload)

    monkeypatch.setattr(durable, "write_json", full)
    assert _keep(store, toy_plan, 4599).trials == 1
    assert retention.was_removed(finished[0])


def test_results_and_unfinished_trials_lose_nothing(store, toy_plan, finished):
    """A quota of nothing leaves every record, and the checkpoint of the trial that is to go on."""
    before = {path for folder in finished for path in folder.rglob("*.json") if "checkpoints" not in path.parts}
    events = [(folder / "events.jsonl").read_bytes() for folder in finished[:3]]
    assert _keep(store, toy_plan, 0).over == 1000
    assert _holds(finished[3]) == (True, 0)
    assert all(path.exists() for path in before)
    assert [(folder / "events.jsonl").read_bytes() for folder in finished[:3]] == events
    assert all(complete(store.record(folder.name), toy_plan.specs[folder.name]) for folder in finished[:3])


def test_a_trial_that_is_still_asked_for_or_worked_on_loses_nothing(store, toy_plan, finished):
    """A missing evaluation, or a worker on the trial, keeps its checkpoint."""
    attempts.begin(finished[0], driver=None)
    shutil.rmtree(next(finished[1].glob("evaluations/*")))
    _keep(store, toy_plan, 0)
    assert [_holds(folder)[0] for folder in finished[:3]] == [True, True, False]


def test_a_further_evaluation_of_what_went_trains_again_and_says_so(store, toy_plan, toy_trainer, finished):
    """The trial is named before, is unfinished while it trains, tells why, and ends with one record of one training."""
    spec = toy_plan.specs[finished[0].name]
    _keep(store, toy_plan, 3600)
    spec.evaluations["another"] = EvaluationConfig(top_k=7)
    records = [store.record(trial_id) for trial_id in toy_plan.specs]
    assert retention.without_checkpoint(store.root, records) == [finished[0].name]
    states = []
    trainer = toy_trainer(before_step=lambda _step: states.append(store.state(spec.trial_id)))
    assert execute(spec, store.root, should_stop=lambda: False, trainer=trainer) == "finished"
    assert set(states) == {"running"}
    assert (finished[0] / "result.before_attempt_2.json").exists()
    told = [item.event for item in store.events(spec.trial_id) if hasattr(item.event, "reason")]
    assert [(event.step, event.reason) for event in told] == [(0, "removed for the quota")]
    assert store.record(spec.trial_id).metrics.keys() == spec.evaluations.keys()
    assert not retention.was_removed(finished[0])
