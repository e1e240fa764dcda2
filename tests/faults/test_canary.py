"""The first trial goes first: where it cannot take a step, the others are not begun."""

from dataclasses import replace

import pytest
from toys import Poison, ToyTrainer, run_toy, toy_plan

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
