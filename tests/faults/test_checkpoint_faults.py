"""Faults of checkpoints: damaged or missing ones. Without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Seen, cases
from toys import STUDY, TINY, CheckpointToy, Poison, executed, toy_plan

from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import _Work, execute


def _damaged_checkpoint(how: str) -> Callable[..., Seen]:
    def scenario(place: Path, *, protected: bool) -> Seen:
        from core import checkpoint as own

        plan, store = toy_plan(place, seeds=1), Store(place / "runs")
        spec, other = plan.specs.values()
        folder = store.trial_dir(spec.trial_id)
        execute(
            spec, store.root, should_stop=lambda: False, trainer=CheckpointToy(poisons=(Poison(kind="raise", step=10),))
        )
        newest = max((folder / "checkpoints").glob("step_*.pt"))
        _damage(newest, how)
        with pytest.MonkeyPatch.context() as patch:
            if not protected:
                patch.setattr(own, "is_intact", lambda path: path.exists())
                patch.setattr(_Work, "_check_start", lambda *_: None)
            ended = execute(spec, store.root, should_stop=lambda: False, trainer=CheckpointToy())
        execute(other, store.root, should_stop=lambda: False, trainer=CheckpointToy())  # the same seed: as if unbroken
        results = [store.result(name) or {} for name in plan.specs]
        lines = (folder / "events.jsonl").read_text().splitlines()
        return {
            "ended": ended,
            "went on at": executed(folder)[9:10],
            "told": [line.split('"reason":"')[1].split('"')[0] for line in lines if "passed_over" in line],
            "set aside": [name for name in results[0].get("damaged", []) if "checkpoints" in name],
            "same weights": results[0].get("weights_hash") == results[1].get("weights_hash"),
        }

    return scenario


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[content.index(b"weights") + 12] ^= 1  # in what is restored
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
        path.with_name(path.name + ".sha256").unlink()


def _verify_damaged_checkpoint(reason: str, *, aside: bool) -> Callable[[Seen], None]:
    def verify(seen: Seen) -> None:
        assert seen["ended"] == "finished"
        assert seen["went on at"] == [5]  # one interval of four steps, and those since the damaged one, are lost
        assert seen["told"] == [reason]
        assert seen["set aside"] == (["checkpoints/step_000000008.pt.damaged"] if aside else [])
        assert seen["same weights"]

    return verify


def _damaged_checkpoint_of_the_real_trainer(place: Path, *, protected: bool) -> Seen:
    """Flipped bytes in the newest checkpoint of a detector that was interrupted, against one that was not."""
    from core import checkpoint as own
    from workbench.trainers import CoreTrainer

    (place / "toy.yaml").write_text(STUDY.format(name="toy"))
    sets = (*(item for item in TINY if "epochs" not in item), "training.epochs=3")
    plan = make_plan(load_study(place / "toy.yaml", Selection(profile="smoke", seeds=1, sets=sets)))
    spec = next(iter(plan.specs.values()))
    whole, broken = Store(place / "whole"), Store(place / "broken")
    execute(spec, whole.root, should_stop=lambda: False)
    checkpoints = broken.trial_dir(spec.trial_id) / "checkpoints"

    class Stopping(CoreTrainer):
        """Asks after every step, which a trial does a few times a second only."""

        def train(self, config: Any, **rest: Any) -> Any:
            enough = {"should_stop": lambda: len(list(checkpoints.glob("step_*.pt"))) >= 2}
            return super().train(config, **{**rest, **enough})

    assert execute(spec, broken.root, should_stop=lambda: False, trainer=Stopping("cpu")) == "interrupted"
    newest = max(checkpoints.glob("step_*.pt"))
    content = bytearray(newest.read_bytes())
    for place_in_file in range(2000, len(content), 5000):  # some of them in weights
        content[place_in_file] ^= 64
    newest.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        if not protected:
            patch.setattr(own, "is_intact", lambda path: path.exists())
        ended = execute(spec, broken.root, should_stop=lambda: False)
    results = [store.result(spec.trial_id) or {} for store in (whole, broken)]
    return {
        "ended": ended,
        "same weights": results[0]["weights_hash"] == results[1].get("weights_hash"),
        "set aside": results[1].get("damaged", []) == [f"checkpoints/{newest.name}.damaged"],
    }


def _verify_damaged_checkpoint_of_the_real_trainer(seen: Seen) -> None:
    assert seen == {"ended": "finished", "same weights": True, "set aside": True}


test_fault, test_control = cases(
    Fault(
        number="F13",
        title="flipped byte in the newest checkpoint",
        expected="the one before, told and set aside, the same weights",
        scenario=_damaged_checkpoint("flip"),
        verify=_verify_damaged_checkpoint("damaged", aside=True),
    ),
    Fault(
        number="F13b",
        title="newest checkpoint truncated",
        expected="the one before, told and set aside, the same weights",
        scenario=_damaged_checkpoint("truncate"),
        verify=_verify_damaged_checkpoint("damaged", aside=True),
    ),
    Fault(
        number="F13c",
        title="newest checkpoint deleted",
        expected="the one before, told, the same weights",
        scenario=_damaged_checkpoint("delete"),
        verify=_verify_damaged_checkpoint("missing", aside=False),
    ),
    Fault(
        number="F13d",
        title="flipped bytes in a detector's newest checkpoint",
        expected="the one before, set aside, weights equal to an unbroken run's",
        scenario=_damaged_checkpoint_of_the_real_trainer,
        verify=_verify_damaged_checkpoint_of_the_real_trainer,
        marks=(pytest.mark.slow,),
    ),
)
