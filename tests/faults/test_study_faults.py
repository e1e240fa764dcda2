"""Study files that are edited between a run and the next. Without Ray."""

from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Seen, cases
from toys import STUDY, Poison, ToyTrainer, executed, run_toy, toy_plan

from workbench.store import Store


def _edited_study(place: Path, *, protected: bool) -> Seen:
    """One variant changes after half of the trials, of which one of each variant had failed."""
    from workbench import plan as planning

    first, store = toy_plan(place), Store(place / "runs")
    run_toy(first, store, ToyTrainer(poisons=(Poison(kind="raise", step=6, seed=1),)), inline=True)
    scientific = planning.scientific
    with pytest.MonkeyPatch.context() as patch:
        if not protected:  # identity that does not see the key that is edited
            patch.setattr(planning, "scientific", lambda part: _blind(scientific(part)))
            first = toy_plan(place)
            for trial in first.trials:
                store.trial_dir(trial.trial_id).mkdir(parents=True, exist_ok=True)
            run_toy(first, store, ToyTrainer(), inline=True)
        second = toy_plan(place, text=STUDY.replace("loss.weight_giou: 4.0", "loss.weight_giou: 6.0"))
        code, _, _ = run_toy(second, Store(store.root), ToyTrainer(), inline=True)
    after = Store(store.root)
    ids = {
        variant: [trial.trial_id for trial in second.trials if trial.variant == variant]
        for variant in ("plain", "sharp")
    }
    changed = set(ids["sharp"]) - set(first.specs)
    return {
        "exit": code,
        "plans": len(after.studies()),
        "unchanged reused": set(ids["plain"]) <= set(first.specs),
        "attempts of unchanged": [after.record(name).attempts for name in ids["plain"]],
        "steps of the finished": len(executed(after.trial_dir(ids["plain"][0]))),
        "the other went on at": min(executed(after.trial_dir(ids["plain"][1]))[5:]),
        "changed run": sorted(len(executed(after.trial_dir(name))) for name in changed),
    }


def _blind(computed: Any) -> Any:
    loss = computed.get("loss") if isinstance(computed, dict) else None
    if isinstance(loss, dict) and loss.get("weight_giou") == 6.0:
        loss["weight_giou"] = 4.0
    return computed


def _verify_edited_study(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["plans"] == 2
    assert seen["unchanged reused"]
    assert seen["attempts of unchanged"][0] == 1
    assert seen["steps of the finished"] == 12
    assert seen["the other went on at"] == 5
    assert seen["changed run"] == [12, 12]


test_fault, test_control = cases(
    Fault(
        number="F21",
        title="one variant edited between two runs",
        expected="a new plan; the unchanged reused, the changed run",
        scenario=_edited_study,
        verify=_verify_edited_study,
    ),
)
