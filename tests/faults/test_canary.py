"""The first trial goes first: where it cannot take a step, the others are not begun. And a pause is not an end."""

import threading
import time
from dataclasses import replace
from unittest import mock

import pytest
from drivers import steps_of, wait_for
from toys import Poison, ToyTrainer, run_toy, toy_plan

from workbench import attempts
from workbench.errors import WorkbenchError
from workbench.steering import steer
from workbench.store import Store


@pytest.mark.parametrize("inline", [True, False])
def test_what_fails_before_its_first_step_is_not_tried_with_every_trial(tmp_path, inline):
    """Code that cannot be imported fails once, in the first trial, and the message says why the others wait."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    code, _, err = run_toy(plan, store, ToyTrainer(poisons=(Poison(kind="import", step=1),)), inline=inline)
    assert code == 1
    assert [store.state(trial.trial_id) for trial in plan.trials] == ["failed", "pending", "pending", "pending"]
    assert store.record(plan.trials[0].trial_id).error["class"] == "import_error"
    assert "The first trial could not take a single step, so the others were not begun." in err


def test_a_first_trial_that_fails_later_holds_nobody_up(tmp_path):
    """A step was taken, so the failure may be of that trial alone."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    poison = Poison(kind="import", step=3, seed=0)
    code, _, _ = run_toy(plan, store, ToyTrainer(poisons=(poison,)))
    assert code == 1
    states = [store.state(trial.trial_id) for trial in plan.trials]
    assert states == ["failed", "failed", "finished", "finished"]


def test_the_study_says_how_often_a_trial_is_tried_again(tmp_path):
    """`execution.retries` counts: with none, a failure that may pass is not tried again."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    execution = replace(plan.study.execution, retries=0)
    plan = replace(plan, study=replace(plan.study, execution=execution))
    code, _, _ = run_toy(plan, store, ToyTrainer(poisons=(Poison(kind="io", step=3, seed=0),)), inline=True)
    assert code == 1
    assert [store.record(trial.trial_id).attempts for trial in plan.trials] == [1, 1, 1, 1]


def test_a_paused_study_waits_and_goes_on(tmp_path):
    """After `pause` no trial is at work; after `resume` all end, and no step is taken twice."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    seen = {}

    def pause():
        wait_for(lambda: sum(map(len, steps_of(plan, store))) >= 2)
        seen["pause"] = steer(plan, store, "pause")
        wait_for(lambda: all(store.state(trial.trial_id) != "running" for trial in plan.trials))
        seen["states"] = [store.state(trial.trial_id) for trial in plan.trials]
        time.sleep(1)  # the driver says that it waits
        steer(plan, store, None)

    shell = threading.Thread(target=pause)
    shell.start()
    code, _, err = run_toy(plan, store, ToyTrainer(seconds=0.05))
    shell.join()
    assert code == 0
    assert "finishes its step and writes a checkpoint; then the run waits" in seen["pause"]
    assert seen["states"][0] in ("interrupted", "finished")
    assert seen["states"][-1] == "pending"
    assert "Paused, with no trial at work. To go on: python -m workbench resume" in err
    assert all(sorted(steps) == list(range(1, 13)) for steps in steps_of(plan, store))


def test_a_stop_from_another_shell_ends_the_run_in_good_order(tmp_path):
    """`stop` is what SIGTERM is: exit code 143, a checkpoint, and the line that goes on."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")

    def stop():
        wait_for(lambda: sum(map(len, steps_of(plan, store))) >= 2)
        steer(plan, store, "stop")

    shell = threading.Thread(target=stop)
    shell.start()
    code, _, err = run_toy(plan, store, ToyTrainer(seconds=0.05))
    shell.join()
    assert code == 143
    assert "To go on" in err
    assert attempts.read(store.trial_dir(plan.trials[0].trial_id))[0].outcome == "interrupted"


def test_a_study_that_nobody_runs_cannot_be_steered(tmp_path):
    """`stop`, `pause` and `resume` say so rather than leave a wish for a later run."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    with pytest.raises(WorkbenchError, match="is not being run"):
        steer(plan, store, "stop")
    ref = store.register(plan, source="")
    with store.lock(ref), pytest.raises(WorkbenchError, match="is not paused"):
        steer(plan, store, None)
    assert not (ref.path / "stop").exists()


def test_a_driver_that_lost_its_study_stops(tmp_path):
    """One whose machine had been asleep learns that another has taken over, and leaves its trials alone."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")

    def take_over():
        wait_for(lambda: sum(map(len, steps_of(plan, store))) >= 2)
        with mock.patch.object(attempts, "_await_end"):
            attempts.begin(store.study_dir(plan), driver=None)

    other = threading.Thread(target=take_over)
    other.start()
    with mock.patch("workbench.lease.BEAT_SECONDS", 0.1):
        code, _, err = run_toy(plan, store, ToyTrainer(seconds=0.1))
    other.join()
    assert code == 143
    assert "Another driver has taken this study over" in err
