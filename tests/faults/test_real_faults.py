"""The faults whose proof needs the detector itself: its weights after failures, kills and retries, bit for bit."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from drivers import below, curve_of, wait_for
from faults import Fault, Seen, cases
from toys import NOWHERE, STUDY, Kind, Poison, run_toy

from core.events import Event, TrainingStarted
from workbench import attempts, retrying
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study import Plan
from workbench.study_file import Selection, load_study
from workbench.trainers import CoreTrainer

SETS = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=30")
STEPS, EVERY = 60, 2  # a checkpoint ends each epoch, of two steps
STRUCK_AT = 21  # the second step of an epoch: the first has to be done again


class Poisoned(CoreTrainer):
    """The detector, in whose training something goes wrong."""

    def __init__(self, *poisons: Poison) -> None:
        super().__init__("cpu")
        self._poisons = poisons

    def train(self, config: Any, *, seed: int, on_event: Any, should_stop: Any, **rest: Any) -> Any:
        """Strike when a step has been taken, before anything is recorded of it."""
        step = 0

        def told(event: Event) -> None:
            nonlocal step
            step = event.step if isinstance(event, TrainingStarted) else step
            on_event(event)

        def stepped() -> bool:
            nonlocal step
            step += 1
            for poison in self._poisons:
                poison.strike(step, seed)
            return should_stop()

        return super().train(config, seed=seed, on_event=told, should_stop=stepped, **rest)


def _plan(place: Path) -> Plan:
    path = place / "toy.yaml"
    path.write_text(STUDY.format(name="toy"))
    return make_plan(load_study(path, Selection(profile="smoke", seeds=1, sets=SETS)))


def _outcome(plan: Plan, store: Store) -> list[Any]:
    """Return what a verdict would be made of: the weights and the scores of every trial."""
    results = [store.result(trial_id) for trial_id in plan.specs]
    scores = [store.record(trial_id).metrics for trial_id in plan.specs]
    return [[result and result["weights_hash"] for result in results], scores]


def _struck_once(kind: Kind) -> Callable[..., Seen]:
    def scenario(place: Path, *, protected: bool) -> Seen:
        """The control begins again without its checkpoints' contents: their seed is another."""
        plan, store, calm = _plan(place), Store(place / "runs"), Store(place / "calm")
        poison = Poison(kind=kind, step=STRUCK_AT, marker=place / "struck")
        unprotected = mock.patch.object(retrying, "may_pass", return_value=False)
        with mock.MagicMock() if protected else unprotected:
            code, _, err = run_toy(plan, store, Poisoned(poison))
        run_toy(plan, calm, CoreTrainer("cpu"))
        tried = attempts.read(store.trial_dir(plan.trials[0].trial_id))
        return {
            "exit": code,
            "attempts": [item.failure for item in tried],
            "same weights and scores": _outcome(plan, store) == _outcome(plan, calm),
            "said": err.splitlines()[-1],
        }

    return scenario


def _verify(failure: str) -> Callable[[Seen], None]:
    def verify(seen: Seen) -> None:
        assert (seen["exit"], seen["attempts"]) == (0, [failure, None])
        assert seen["same weights and scores"]

    return verify


def _command(place: Path, runs: Path) -> list[str]:
    sets = [word for item in SETS for word in ("--set", item)]
    options = ["--profile", "smoke", "--seeds", "1", *sets, "--runs", str(runs), "--tracking-uri", NOWHERE]
    return [sys.executable, "-m", "workbench", "run", str(place / "toy.yaml"), *options]


def _started(place: Path, runs: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        _command(place, runs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _driver_killed(place: Path, *, protected: bool) -> Seen:
    """Under Ray, the driver is killed while trials train, five times; the control loses the checkpoints each time."""
    plan, store, calm = _plan(place), Store(place / "runs"), Store(place / "calm")
    first, left, of_ray, killed_at = plan.trials[0].trial_id, [], [], 0.0
    for turn in range(5 if protected else 2):
        target = 10 * (turn + 1) if protected else 30
        with _started(place, store.root) as driver:
            wait_for(lambda turn=turn, step=target: _reached(store, first, turn + 1) >= step, patience=150)
            of_ray = below(driver.pid)
            driver.kill()
            driver.communicate()
            killed_at = time.monotonic()
        left.append(_gone_after(plan, store))
        if not protected:
            for path in store.root.glob("trials/*/checkpoints/*"):
                path.unlink()
    wait_for(lambda: not any(process.alive() for process in of_ray), patience=150)
    ray_left = round(time.monotonic() - killed_at)
    with _started(place, store.root) as driver:
        _, err = driver.communicate(timeout=200)
    run_toy(plan, calm, CoreTrainer("cpu"))
    again = [_taken_again(store, trial_id) for trial_id in plan.specs]
    return {
        "exit": driver.returncode,
        "said": err.splitlines()[-1],
        "trial processes gone after s": max(left),
        "processes of Ray": len(of_ray),
        "gone after s": ray_left,
        "same weights and scores": _outcome(plan, store) == _outcome(plan, calm),
        "steps again": again,
        "attempts": [store.record(trial_id).attempts for trial_id in plan.specs],
        "curves": all(curve_of(store, trial_id) == sorted(set(curve_of(store, trial_id))) for trial_id in plan.specs),
    }


def _reached(store: Store, trial_id: str, attempt: int) -> int:
    """Return the step that an attempt has put on record, 0 before."""
    return max((item.event.step for item in store.reader(trial_id).poll() if item.attempt == attempt), default=0)


def _gone_after(plan: Plan, store: Store) -> int:
    """Wait until no process of a trial is left; return the seconds that it took."""
    began = time.monotonic()
    workers = [item.worker for trial_id in plan.specs for item in attempts.read(store.trial_dir(trial_id))]
    wait_for(lambda: not any(worker.alive() for worker in workers))
    return round(time.monotonic() - began)


def _taken_again(store: Store, trial_id: str) -> int:
    """Return the steps that were recorded before a resumption and lie beyond it."""
    reached, again = 0, 0
    for item in store.reader(trial_id).poll():
        if isinstance(item.event, TrainingStarted):
            again += max(0, reached - item.event.step)
        reached = item.event.step
    return again


def _verify_driver(seen: Seen) -> None:
    assert seen["exit"] == 0, seen["said"]
    assert seen["trial processes gone after s"] <= 15
    assert seen["processes of Ray"] >= 4
    assert seen["gone after s"] <= 120
    assert seen["same weights and scores"]
    assert seen["curves"]
    assert max(seen["steps again"]) <= EVERY * max(seen["attempts"])


real = partial(Fault, marks=(pytest.mark.slow,))

test_fault, test_control = cases(
    real(
        number="F1r",
        title="the detector raises once",
        expected="resumed; weights and scores bit-equal to an undisturbed run",
        scenario=_struck_once("raise"),
        verify=_verify("error"),
    ),
    real(
        number="F2r",
        title="kill -9 of the detector's process (F28: a pair after a retry)",
        expected="as F1r",
        scenario=_struck_once("kill"),
        verify=_verify("worker_lost"),
    ),
    real(
        number="F8r",
        title="kill -9 of the driver under Ray, five times",
        expected="same weights and scores; a kill costs one interval; no trial process after 15 s, no Ray after 120",
        scenario=_driver_killed,
        verify=_verify_driver,
    ),
)
