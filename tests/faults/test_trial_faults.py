"""Faults inside a trial, without Ray."""

import io
from pathlib import Path

from faults import Fault, Seen, cases
from toys import Poison, ToyTrainer, toy_plan

from workbench.runner import Options, run_study
from workbench.store import Store


def _diverging(place: Path, *, protected: bool) -> Seen:
    """A loss that is not finite from some step on, in one seed."""
    plan, store = toy_plan(place), Store(place / "runs")
    poison = Poison(kind="nan" if protected else "raise", step=6, seed=1)
    out, err = io.StringIO(), io.StringIO()
    trainer = ToyTrainer(poisons=(poison,))
    options = Options(executor="inline", trainer=trainer, tracking_uri="http://127.0.0.1:9")
    code = run_study(plan, store, options, out=out, err=err)
    states = sorted(store.state(item.trial_id) for item in plan.trials)
    attempts = [store.record(item.trial_id).attempts for item in plan.trials]
    return {"exit": code, "states": states, "attempts": attempts, "reported": "diverged" in out.getvalue()}


def _verify_diverging(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["states"] == ["diverged", "diverged", "finished", "finished"]
    assert set(seen["attempts"]) == {1}
    assert seen["reported"]


test_fault, test_control = cases(
    Fault(
        number="F5",
        title="loss not finite",
        expected="outcome diverged, one attempt, named in the report",
        scenario=_diverging,
        verify=_verify_diverging,
    )
)
