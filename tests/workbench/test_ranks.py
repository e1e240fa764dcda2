"""A trial in several processes of one machine: together they train, stop, resume and die."""

import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from sharing import Sharing

from core.data.splits import open_data
from core.events import EpochFinished, TrainingStarted
from core.training import train
from workbench import ranks
from workbench.failures import classify
from workbench.placement import Demand
from workbench.plan import make_plan
from workbench.ranks import Ranked, SharedGpu, WorkerLost, trainer_on_one_machine
from workbench.study_file import Selection, load_study
from workbench.trainers import CoreTrainer
from workbench.trial import execute

SETS = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=8")


def share(trainer, tmp_path, toy_plan, *, should_stop=lambda: False, events=None):
    """Train in two processes with the first trial's configuration."""
    spec = next(iter(toy_plan.specs.values()))
    ranked = Ranked(Demand(device="cpu", threads=1, processes=2), trainer=trainer)
    data = ranked.open_data(spec.config, root=None, cache=tmp_path / "cache")
    return ranked.train(
        spec.config,
        seed=0,
        data=data,
        checkpoints=tmp_path / "trial" / "checkpoints",
        on_event=([] if events is None else events).append,
        should_stop=should_stop,
    )


@pytest.fixture
def started(monkeypatch):
    """Return the processes that are started."""
    found = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **rest):
            super().__init__(*arguments, **rest)
            found.append(self)

    monkeypatch.setattr(ranks, "subprocess", SimpleNamespace(Popen=Popen, DEVNULL=subprocess.DEVNULL))
    return found


@pytest.mark.ci
def test_a_detector_trains_stops_and_goes_on_with_another_number_of_processes(toy_study, tmp_path):
    """Two processes stop after the step in which the trial is asked to; one alone ends what they began.

    The losses are those of one process from the start, up to rounding.
    """
    plan = make_plan(load_study(toy_study, Selection(profile="smoke", sets=SETS)))
    spec = next(iter(plan.specs.values()))
    events = []
    stopped = share(None, tmp_path, plan, should_stop=lambda: True, events=events)
    assert (stopped.outcome, stopped.checkpoint.parent) == ("interrupted", tmp_path / "trial" / "checkpoints")
    assert 1 <= stopped.step < 16
    assert isinstance(events[0], TrainingStarted)
    finished = {}
    for place in ("trial", "alone"):
        told = []
        result = train(
            spec.config,
            seed=0,
            data=open_data(spec.config.data, root=None, cache=None),
            checkpoints=tmp_path / place / "checkpoints",
            on_event=told.append,
            should_stop=lambda: False,
            device=torch.device("cpu"),
        )
        assert result.outcome == "finished"
        finished[place] = told
    assert finished["trial"][0].step == stopped.step
    epoch = next(event for event in finished["trial"] if isinstance(event, EpochFinished))
    same = next(event for event in finished["alone"] if isinstance(event, EpochFinished) and event.step == epoch.step)
    assert epoch.losses["total"] == pytest.approx(same.losses["total"], rel=1e-3)


@pytest.mark.ci
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_all(victim, toy_plan, tmp_path, started):
    """A killed process is named as the reason, not the broken connection that the others see; none is left."""
    began = time.monotonic()
    with pytest.raises(WorkerLost, match=rf"process {victim} of the 2 .* killed by signal 9 \(SIGKILL\)") as caught:
        share(Sharing(victim=victim), tmp_path, toy_plan)
    assert time.monotonic() - began < 60
    assert classify(caught.value) == "worker_lost"
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


@pytest.mark.ci
def test_what_one_process_raises_is_what_the_trial_fails_with(toy_plan, tmp_path, started):
    """The error of process 1 reaches the trial's process as it is, with the place where it was raised."""
    with pytest.raises(MemoryError, match="no room for process 1") as caught:
        share(Sharing(victim=1, fate="memory"), tmp_path, toy_plan)
    assert classify(caught.value) == "out_of_memory"
    assert "in _suffer" in "".join(caught.value.__notes__)
    assert all(process.returncode is not None for process in started)


@pytest.mark.ci
def test_the_record_of_a_shared_trial_is_one_trials(toy_plan, store):
    """The trial's own process keeps the record: one claim, one story, how many they were."""
    spec = next(iter(toy_plan.specs.values()))
    demand = Demand(device="cpu", threads=1, processes=2)
    outcome = execute(
        spec,
        store.root,
        should_stop=lambda: False,
        trainer=trainer_on_one_machine(demand, Sharing()),
        placement=demand.to_json(),
    )
    record = store.record(spec.trial_id)
    assert (outcome, record.state, record.attempts, record.step) == ("finished", "finished", 1, 5)
    assert record.result["provenance"]["world_size"] == 2
    assert record.result["provenance"]["gpu_share"] is None


def test_a_trial_takes_the_trainer_that_its_place_asks_for(monkeypatch):
    """One process keeps the trainer as it is; a share of a GPU limits its memory before anything is put there."""
    toy = Sharing()
    assert trainer_on_one_machine(Demand(device="cpu", threads=1), toy) is toy
    whole = Demand(device="cuda", threads=1, gpus=1.0)
    assert trainer_on_one_machine(whole, None) is None
    assert isinstance(trainer_on_one_machine(Demand(device="cuda", threads=1, processes=4, gpus=1.0), None), Ranked)
    limits, done = [], []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for name in ("train", "evaluate"):
        monkeypatch.setattr(CoreTrainer, name, lambda *_, **__: done.append(list(limits)))
    shared = trainer_on_one_machine(Demand(device="cuda", threads=1, gpus=0.5), None)
    assert isinstance(shared, SharedGpu)
    shared.train(None)
    shared.evaluate(None, None)
    assert done == [[0.5], [0.5, 0.5]]


def test_an_error_of_any_make_can_be_told():
    """An error that cannot be sent is told in words."""

    class OddError(Exception):
        """Of a class that no other process can import."""

    told = ranks.portable(OddError("strange"))
    assert type(told) is RuntimeError
    assert str(told) == "OddError: strange"
    assert "OddError: strange" in "".join(told.__notes__)
