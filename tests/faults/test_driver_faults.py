"""Faults of the driver: signals, kills, two at once, clocks; its trials run in a slot, without Ray."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from drivers import curve_of, start, steps_of, wait_for
from faults import Fault, Seen, cases
from toys import ToyTrainer, run_toy, toy_plan

from workbench import attempts
from workbench.errors import BusyError
from workbench.store import Store
from workbench.study import Plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that MLflow imports

STEPS, EVERY = 12, 4
KILLS = 20


def _signalled(number: int, *, twice: bool = False):
    def scenario(place: Path, *, protected: bool) -> Seen:
        """The control is a driver that has no handler, or none for the second signal, which never comes."""
        plan, store = toy_plan(place), Store(place / "runs")
        with start(place, "--seconds", "1.5" if twice else "0.2") as driver:
            wait_for(lambda: _executed(plan, store) >= 2)
            driver.send_signal(number if protected or twice else signal.SIGKILL)
            if twice and protected:
                wait_for(lambda: list(store.root.glob("studies/*/*/*/attempts/*.wish")))
                driver.send_signal(number)
            began = time.monotonic()
            _, err = driver.communicate(timeout=60)
            seconds = time.monotonic() - began
        first = attempts.read(store.trial_dir(plan.trials[0].trial_id))
        code, _, _ = run_toy(plan, store, ToyTrainer(steps=STEPS))
        steps = steps_of(plan, store)
        return {
            "exit": driver.returncode,
            "seconds": round(seconds),
            "outcome": first[0].outcome,
            "line": "python -m workbench" in err or "To go on" in err,
            "then": code,
            "executed twice": sum(map(len, steps)) - STEPS * len(steps),
        }

    return scenario


def _verify_interrupted(number: int):
    def verify(seen: Seen) -> None:
        assert (seen["exit"], seen["outcome"], seen["line"]) == (128 + number, "interrupted", True)
        assert (seen["then"], seen["executed twice"]) == (0, 0)

    return verify


def _verify_at_once(seen: Seen) -> None:
    assert (seen["exit"], seen["outcome"]) == (128 + signal.SIGINT, None)  # cut off in the midst of its step
    assert seen["then"] == 0
    assert seen["executed twice"] <= EVERY


def _killed(place: Path, *, protected: bool) -> Seen:
    """Twenty kills at random moments. The control: what had been reached is lost."""
    plan, store = toy_plan(place), Store(place / "runs")
    chance, turns, kills = random.Random(5), KILLS if protected else 3, 0
    for turn in range(turns):
        slowly = "0.4" if protected else "0.1"  # so slowly that it is not over before the last kill
        with start(place, "--seconds", slowly, "--tracking-uri", "embedded") as driver:
            if protected:
                time.sleep(chance.uniform(0.8, 3.0))
            else:
                wait_for(lambda turn=turn: _executed(plan, store) >= (turn + 1) * STEPS)
            kills += driver.poll() is None
            driver.kill()
            driver.communicate()
        if not protected:
            for path in [*store.root.glob("trials/*/checkpoints/*"), *store.root.glob("trials/*/result.json")]:
                path.unlink()
    assert kills == turns  # none came too late
    workers = [item.worker for trial in plan.trials for item in attempts.read(store.trial_dir(trial.trial_id))]
    wait_for(lambda: not any(worker.alive() for worker in workers), patience=15)
    with start(place, "--seconds", "0", "--tracking-uri", "embedded") as driver:
        _, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    return {
        "kills": kills,
        "states": {store.state(trial.trial_id) for trial in plan.trials},
        "curves": all(curve_of(store, trial.trial_id) == list(range(1, STEPS + 1)) for trial in plan.trials),
        "executed twice": _executed(plan, store) - STEPS * len(plan.trials),
        "mlflow": _mlflow_differs(store),
    }


def _executed(plan: Plan, store: Store) -> int:
    return sum(map(len, steps_of(plan, store)))


def _mlflow_differs(store: Store) -> list[str]:
    """Return what MLflow holds of the trials that the records do not, and what it misses, in words."""
    from mlflow import MlflowClient

    client, wrong = MlflowClient(f"sqlite:///{store.mlflow_database}"), []
    (ref,) = store.studies()
    results = store.results(ref)
    assert results.mlflow is not None
    for trial_id, run_id in results.mlflow["runs"].items():
        run = client.get_run(run_id)
        points = [point.step for point in client.get_metric_history(run_id, "loss/total")]
        if run.info.status != "FINISHED" or sorted(points) != curve_of(store, trial_id):
            wrong.append(f"{trial_id}: {run.info.status}, steps {points}")
    return wrong


def _verify_killed(seen: Seen) -> None:
    assert (seen["states"], seen["curves"], seen["mlflow"]) == ({"finished"}, True, [])
    assert seen["executed twice"] <= EVERY * seen["kills"]


def _two_drivers(place: Path, *, protected: bool) -> Seen:
    """Two drivers on one study; the control claims nothing."""
    return _together(place, [("toy", ()), ("toy", ("--wait",)), ("toy", ())], protected=protected)


def _two_studies(place: Path, *, protected: bool) -> Seen:
    """Two studies that ask for the same trials."""
    return _together(place, [("toy", ()), ("other", ())], protected=protected)


def _together(place: Path, drivers: list[tuple[str, tuple[str, ...]]], *, protected: bool) -> Seen:
    plan, store = toy_plan(place), Store(place / "runs")
    claims = {} if protected else {"TOY_CLAIMS": "none"}
    started: list[subprocess.Popen[str]] = []
    for name, options in drivers:
        started.append(start(place, "--name", name, "--seconds", "0.2", *options, **claims))
        if len(started) == 1:
            wait_for(lambda: _executed(plan, store) >= 2)
    ended = [process.communicate(timeout=60) for process in started]
    steps = steps_of(plan, store)
    return {
        "exits": [process.returncode for process in started],
        "told": [line for _, err in ended for line in err.splitlines() if "is being run by" in line][-1:],
        "executed twice": sum(map(len, steps)) - STEPS * len(steps),
        "states": {store.state(trial.trial_id) for trial in plan.trials},
    }


def _verify_together(*exits: int):
    def verify(seen: Seen) -> None:
        assert (seen["exits"], seen["executed twice"]) == (list(exits), 0)
        assert seen["states"] == {"finished"}
        assert bool(seen["told"]) == (3 in exits)

    return verify


@contextmanager
def _clock_off_by(seconds: float, zone: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, TZ=zone):
        time.tzset()
        real = time.time
        with mock.patch("time.time", side_effect=lambda: real() + seconds):
            yield
    time.tzset()


def _clock_steps(place: Path, *, protected: bool) -> Seen:
    """While a trial runs, another driver comes whose clock is an hour ahead and in another zone.

    The control believes file times.
    """
    plan, store = toy_plan(place), Store(place / "runs")
    elsewhere = mock.patch("workbench.processes.Process.is_here", return_value=False)
    with start(place, "--seconds", "0.3", "--seeds", "1", TOY_BEAT_SECONDS="0.3") as driver:
        wait_for(lambda: _executed(plan, store) >= 2)
        folder = store.trial_dir(plan.trials[0].trial_id)
        with _clock_off_by(3600, "Pacific/Apia"), elsewhere:
            taken = _takes(folder, protected=protected)
        driver.communicate(timeout=60)
    times = [item.began_at for trial in plan.trials for item in attempts.read(store.trial_dir(trial.trial_id))]
    return {"taken over": taken, "exit": driver.returncode, "UTC": all(time.endswith("+00:00") for time in times)}


def _takes(folder: Path, *, protected: bool) -> bool:
    believing = mock.patch("workbench.attempts._await_end") if not protected else mock.MagicMock()
    with believing:
        try:
            taken = attempts.begin(folder, driver=None)
        except BusyError:
            return False
    attempts.end(folder, taken, outcome="interrupted", seconds=0.0, cpu_seconds=0.0)
    return True


def _verify_clock(seen: Seen) -> None:
    assert seen == {"taken over": False, "exit": 0, "UTC": True}


test_fault, test_control = cases(
    Fault(
        number="F6",
        title="Ctrl-C",
        expected="step finished, checkpoint, exit 130 with the line that goes on, no step twice",
        scenario=_signalled(signal.SIGINT),
        verify=_verify_interrupted(signal.SIGINT),
    ),
    Fault(
        number="F6b",
        title="Ctrl-C twice",
        expected="exit 130 at once, at most one checkpoint interval lost",
        scenario=_signalled(signal.SIGINT, twice=True),
        verify=_verify_at_once,
    ),
    Fault(
        number="F7",
        title="SIGTERM",
        expected="as F6 with exit 143",
        scenario=_signalled(signal.SIGTERM),
        verify=_verify_interrupted(signal.SIGTERM),
    ),
    Fault(
        number="F8",
        title="kill -9 of the driver, twenty times",
        expected="each trial finished once, curves whole, MLflow equal, steps within the bound, no process left",
        scenario=_killed,
        verify=_verify_killed,
    ),
    Fault(
        number="F19",
        title="the same study by three drivers",
        expected="one runs, one waits, one leaves with exit 3; no step twice",
        scenario=_two_drivers,
        verify=_verify_together(0, 0, 3),
    ),
    Fault(
        number="F20",
        title="two studies that share their trials",
        expected="both end well, no step twice",
        scenario=_two_studies,
        verify=_verify_together(0, 0),
    ),
    Fault(
        number="F23",
        title="a clock that is an hour off, another time zone",
        expected="nothing is taken over, all times are UTC",
        scenario=_clock_steps,
        verify=_verify_clock,
    ),
)
