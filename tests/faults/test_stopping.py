"""A stop, a pause and a signal, wherever they meet a driver; and a driver whose study another one has taken over."""

import os
import signal
import threading
import time
from unittest import mock

import pytest
from drivers import start, steps_of, wait_for
from toys import ToyTrainer, run_toy, toy_plan

from workbench import attempts, durable
from workbench.driving import Run
from workbench.errors import WorkbenchError
from workbench.steering import steer
from workbench.stopping import StopNow, StopRequest, ask, wish
from workbench.store import Store


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


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_paused_study(tmp_path, number):
    """Whoever has freed the machine by a pause may also end the driver; the same command goes on."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    with start(tmp_path, "--seconds", "0.1") as driver:
        wait_for(lambda: sum(map(len, steps_of(plan, store))) >= 2)
        steer(plan, store, "pause")
        wait_for(lambda: not any(store.state(trial.trial_id) == "running" for trial in plan.trials))
        time.sleep(1)  # the driver says that it waits
        driver.send_signal(number)
        _, err = driver.communicate(timeout=30)
    assert driver.returncode == 128 + number
    assert "Paused, with no trial at work" in err
    assert "To go on" in err
    assert run_toy(plan, store, ToyTrainer())[0] == 0
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
    with store.lock(ref) as hold:
        with pytest.raises(WorkbenchError, match="is not paused"):
            steer(plan, store, None)
        assert not hold.wish_file.exists()
        steer(plan, store, "stop")
        for wanted in ("pause", None):
            with pytest.raises(WorkbenchError, match="is stopping already"):
                steer(plan, store, wanted)


def test_a_pause_is_never_taken_for_a_stop(tmp_path):
    """The driver may look while the wish is being written, which takes a while on a shared file system."""
    path, seen = tmp_path / "wish", []
    write = durable._write_and_sync

    def look_first(draft, content):
        draft.touch()
        seen.append(wish(path))
        write(draft, content)

    with mock.patch.object(durable, "_write_and_sync", look_first):
        ask(path, "pause")
    assert (seen, wish(path)) == ([None], "pause")
    ask(path, "stop")
    assert wish(path) == "stop"


def test_a_wish_that_comes_before_the_first_trial_is_heard(tmp_path):
    """Who is told that the run will end can rely on it, also while the driver joins a cluster or asks for a gate."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")
    with mock.patch.object(Run, "require_gate", side_effect=lambda: steer(plan, store, "stop")):
        code, _, err = run_toy(plan, store, ToyTrainer())
    assert code == 143
    assert "To go on" in err
    assert {store.state(trial.trial_id) for trial in plan.trials} == {"pending"}
    assert run_toy(plan, store, ToyTrainer())[0] == 0  # it was meant for that run alone


@pytest.mark.parametrize("phase", ["require_gate", "_say_start", "judge", "report"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_driver_at_once_where_no_trial_is_at_work(tmp_path, phase, number):
    """Nothing needs a checkpoint: the study is let go of, and the same command does what is missing."""
    assert threading.current_thread() is threading.main_thread()
    plan, store = toy_plan(tmp_path, variants=("plain",), seeds=1), Store(tmp_path / "runs")
    with (
        mock.patch.object(Run, phase, side_effect=lambda *_: os.kill(os.getpid(), number)),
        pytest.raises(StopNow) as raised,
    ):
        run_toy(plan, store, ToyTrainer(), inline=True)
    assert raised.value.signal == number
    (driver,) = attempts.read(store.study_dir(plan))
    assert driver.outcome == "finished"
    code, out, _ = run_toy(plan, store, ToyTrainer(), inline=True)
    assert (code, "sharp_better" in out) == (0, True)
    assert steps_of(plan, store)[0] == list(range(1, 13))


def test_a_signal_is_a_wish_while_trials_are_at_work_and_an_order_the_second_time(tmp_path):
    """On a disk that takes no file the driver still stops, and the trial in its own process writes its checkpoint."""
    stop = StopRequest(tmp_path / "gone" / "wish", announce=mock.Mock(side_effect=OSError))
    with stop.listening(), stop.gently():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()
        with pytest.raises(StopNow):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_driver_that_lost_its_study_stops(tmp_path):
    """One whose machine had been asleep learns that another has taken over, and leaves it alone."""
    plan, store = toy_plan(tmp_path), Store(tmp_path / "runs")

    def take_over():
        wait_for(lambda: sum(map(len, steps_of(plan, store))) >= 2)
        with mock.patch.object(attempts, "_await_end"):
            begun.append(attempts.begin(store.study_dir(plan), driver=None))

    begun = []
    other = threading.Thread(target=take_over)
    other.start()
    with mock.patch("workbench.lease.BEAT_SECONDS", 0.1):
        code, _, err = run_toy(plan, store, ToyTrainer(seconds=0.1))
    other.join()
    assert code == 143
    assert "Another driver has taken this study over" in err
    successor = StopRequest(attempts.wish_file(store.study_dir(plan), begun[0].number), announce=print)
    assert not successor.wanted()  # the one that has it now goes on
