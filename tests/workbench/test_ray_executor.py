"""Trials as processes under Ray: they share the cores, survive kills, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from workbench import attempts
from workbench.durable import EventReader
from workbench.processes import Process
from workbench.provenance import available_cores
from workbench.store import Store

pytestmark = pytest.mark.ci

SETS = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=60")
CUSTOM = 'model.box_head: {kind: custom, target: "heads:Mine"}'
PATIENCE = 120  # seconds, on a busy machine


WITHOUT_FORKS = "import sys; from workbench import cli, slots; slots.AVAILABLE = False; sys.exit(cli.main())"


def start(study, runs, executor, *options, seeds=1, program=("-m", "workbench")):
    """Start a run of the toy study, with a hundred steps a trial."""
    sets = [part for item in SETS for part in ("--set", item)]
    parts = [sys.executable, *program, "run", str(study), "--profile", "smoke", *sets, "--runs", str(runs)]
    return subprocess.Popen(
        [*parts, "--executor", executor, "--seeds", str(seeds), "--tracking-uri", "http://127.0.0.1:9", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process=None):
    """Return what `condition` returns once that is true; give up when the process has ended or time is over."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if found := condition():
            return found
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.1)
    if process is not None:
        process.kill()
    raise AssertionError(f"nothing happened in {PATIENCE} s")


def test_a_stop_while_ray_starts_has_its_exit_code(toy_study, tmp_path):
    """Batch systems send SIGTERM when they like, and look at the code: neither Ray's own nor an abort's."""
    process = start(toy_study, tmp_path / "runs", "ray")
    wait_for(lambda: list(tmp_path.glob("runs/studies/*/*/*/ray/ray.log")), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "goes on from here" in err or "To go on" in err


def test_a_stop_waits_for_this_drivers_trials_and_for_no_other(store, tmp_path):
    """Those that another study trains at the moment go on, and are no reason to use up the time of grace."""
    from workbench.ray_executor.tuner import StopWhenAsked

    mine = Process.current(command="mine")
    wish = tmp_path / "wish"
    wish.touch()
    for trial_id, driver, over in (("one", mine, False), ("two", Process.current(command="another's"), True)):
        attempts.begin(store.trial_dir(trial_id), driver=driver)
        job = SimpleNamespace(
            stop=SimpleNamespace(path=wish), runs=store.root, driver=mine, specs=[SimpleNamespace(trial_id=trial_id)]
        )
        assert StopWhenAsked(job).stop_all() == over


def running(runs, *, attempt):
    """Return (folder, worker) of a trial whose attempt of that number has written a checkpoint and goes on."""
    for folder in (runs / "trials").glob("*"):
        tried = attempts.read(folder)
        steps = [item.event.step for item in EventReader(folder / "events.jsonl").poll() if item.attempt == attempt]
        if len(tried) == attempt and tried[-1].running(folder) and max(steps, default=0) >= 4:
            return folder, tried[-1].worker
    return None


def test_kills_of_worker_and_driver_cost_nothing_but_time(toy_study, tmp_path):
    """A killed worker's trial goes on in a new process; after kill -9 of the driver no worker stays.

    The same command then ends with the weights of an undisturbed inline run.
    """
    runs = tmp_path / "ray"
    with start(toy_study, runs, "ray") as driver:
        folder, worker = wait_for(lambda: running(runs, attempt=1), driver)
        os.kill(worker.pid, signal.SIGKILL)
        wait_for(lambda: running(runs, attempt=2), driver)
        workers = [tried[-1].worker for path in (runs / "trials").glob("*") if (tried := attempts.read(path))]
        driver.kill()
        out, err = driver.communicate()
    assert (out, "Ray" in err, "raylet" in err) == ("", False, False)
    wait_for(lambda: not any(item.alive() for item in workers))
    for executor, place in (("ray", runs), ("inline", tmp_path / "inline")):
        with start(toy_study, place, executor) as process:
            _, err = process.communicate()
        assert process.returncode == 0, err
    assert _hashes(runs) == _hashes(tmp_path / "inline")
    assert Store(runs).record(folder.name).attempts == 3


def test_slots_take_trial_after_trial_in_new_processes(toy_study, tmp_path):
    """Two seeds of two variants go through the slots seed by seed, each in a process of its own.

    Where forking is not safe every trial has a new Python, and the weights are the same.
    """
    few = ("--set", "training.epochs=1")
    programs = {"forks": ("-m", "workbench"), "new": ("-c", WITHOUT_FORKS)}
    for place, program in programs.items():
        with start(toy_study, tmp_path / place, "ray", *few, seeds=2, program=program) as process:
            _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert "Time: " in err
        folders = list((tmp_path / place / "trials").glob("*"))
        order = sorted(folders, key=lambda folder: attempts.read(folder)[0].began_at)
        assert len({attempts.read(folder)[0].worker.pid for folder in order}) == len(order) == 4
        seeds = [json.loads((folder / "spec.json").read_text())["seed"] for folder in order]
        assert (seeds[0], seeds[-1]) == (0, 1)  # a slot that starts late begins its trial of seed 0 late
        (study,) = (tmp_path / place / "studies").glob("*/*/*")
        spent = json.loads((study / "last_run.json").read_text())
        assert (spent["trials"], spent["slots"]) == (4, min(4, available_cores()))
        slots = len(list(study.glob("ray/slot-*.log")))
        assert slots == spent["slots"]
    assert _hashes(tmp_path / "forks", count=4) == _hashes(tmp_path / "new", count=4)


def test_ctrl_c_ends_in_good_order(toy_study, tmp_path):
    """One Ctrl-C: running trials write a checkpoint, nothing new begins, exit code 130 and the line that goes on."""
    with start(toy_study, tmp_path, "ray", seeds=2) as driver:
        wait_for(lambda: running(tmp_path, attempt=1), driver)
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, err
    assert "To go on: python -m workbench run" in err
    tried = {path.name: attempts.read(path)[-1].outcome for path in (tmp_path / "trials").glob("*")}
    assert "interrupted" in tried.values()
    assert None not in tried.values()
    assert len(tried) < 4


def test_code_travels_to_the_workers(toy_study, tmp_path):
    """A custom part beside the study file reaches workers whose Python path does not have it, as text."""
    toy_study.write_text(toy_study.read_text().replace("loss.weight_giou: 4.0", CUSTOM))
    toy_study.with_name("heads.py").write_text(
        "from core.model.refinement import BoxHead\n\nclass Mine(BoxHead): ...\n"
    )
    with start(toy_study, tmp_path / "runs", "ray", "--allow-code", "--set", "training.epochs=1") as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert len(_hashes(tmp_path / "runs")) == 2
    assert len(list((tmp_path / "runs" / "trials").glob("*/code/heads.py"))) == 1


def _hashes(runs, *, count=2):
    paths = sorted((runs / "trials").glob("*/result.json"))
    assert len(paths) == count
    return {path.parent.name: json.loads(path.read_text())["weights_hash"] for path in paths}


def test_a_machine_on_which_ray_cannot_start_is_told_what_to_do(toy_study, tmp_path, monkeypatch):
    """A temporary folder whose name is too long for Ray's sockets ends in one line, without a traceback."""
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    process = start(toy_study, tmp_path / "runs", "ray")
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2
    assert "Ray cannot be started here" in said
    assert "run --executor inline goes without Ray" in said
    assert "Traceback" not in said
