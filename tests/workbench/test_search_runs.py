"""Whole searches: under Ray with ASHA and Optuna, killed and gone on with; and with the real detector."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rated import SEARCH, SETS
from toys import executed

from workbench import attempts
from workbench.stopping import ask
from workbench.store import Store

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds, on a busy machine
DRIVER = """\
import os
import sys
from pathlib import Path
from rated import SETS, RatedTrainer
from workbench import budget, driving
from workbench.costs import Machine
from workbench.plan import make_plan
from workbench.options import Options
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study
from toys import Poison
study, runs, *cap = sys.argv[1:]
if cap:  # each trial is said to hold so many GPUs that a second is a GPU-hour
    budget.gpus_of = lambda _: 3600.0
    budget.WATCH_SECONDS = 0.2
    driving.machine_of = lambda *_, **__: Machine(device="cpu", at_once=2, gpus=3600.0)
plan = make_plan(load_study(Path(study), Selection(profile="smoke", sets=SETS)))
poisons = (Poison(kind="oom", step=2, marker=Path(os.environ["STRUCK"])),) if "STRUCK" in os.environ else ()
options = Options(
    trainer=RatedTrainer(seconds=0.12, poisons=poisons),
    tracking_uri="http://127.0.0.1:9",
    gpu_hours=float(cap[0]) if cap else None,
    without_gate=True,
)
sys.exit(run_study(plan, Store(Path(runs)), options, out=sys.stdout, err=sys.stderr))
"""


def _start(study, runs, *cap, stderr=subprocess.PIPE):
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults"), str(ROOT)]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(study), str(runs), *map(str, cap)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
    )


def _await(driver, happened):
    give_up = time.monotonic() + PATIENCE
    while not happened():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < give_up
        time.sleep(0.1)


def _found(runs):
    (path,) = runs.glob("studies/*/*/*/search.json")
    return json.loads(path.read_text())


def test_asha_and_optuna_go_on_after_a_kill(tmp_path):
    """Killed in the middle, the same command completes the search: nothing that was over is trained again.

    ASHA has ended some configurations early, which are interrupted and say why; the rest are finished, and both
    variants have as many. Once complete, a further run trains nothing and needs no Ray.
    """
    study, runs = tmp_path / "rates.yaml", tmp_path / "runs"
    study.write_text(SEARCH.format(method="optuna", scheduler="asha", configurations=8))
    store = Store(runs)
    with _start(study, runs) as driver:
        _await(driver, lambda: len(list(runs.glob("trials/*/result.json"))) >= 2)
        driver.kill()
    early = {path.parent.name: attempts.read(path.parent) for path in runs.glob("trials/*/result.json")}
    known = [row["trial_id"] for row in _found(runs)["configurations"]]
    with _start(study, runs) as driver:
        out, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, err
    told = _found(runs)
    rows = told["configurations"]
    assert told["complete"]
    assert Counter(row["variant"] for row in rows) == {"plain": 8, "sharp": 8}
    assert {row["trial_id"] for row in rows} >= set(known)
    assert {name: attempts.read(store.trial_dir(name)) for name in early} == early
    stopped = [row for row in rows if row["reason"] == "stopped by the search"]
    assert {row["state"] for row in stopped} == {"interrupted"}
    assert {row["state"] for row in rows if row not in stopped} == {"finished"}
    assert stopped
    for row in rows:
        steps = executed(store.trial_dir(row["trial_id"]))
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
        assert len(steps) <= max(steps) + 4  # at most one checkpoint interval again, and only for what the kill struck
        assert max(steps) == 16 or row["state"] == "interrupted"  # perhaps between its last step and its score
    assert "Best of" in out
    assert "stopped at epoch" in err
    began = time.monotonic()
    with _start(study, runs) as driver:
        _, err = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, "Starting the processes" in err) == (0, False), err
    assert time.monotonic() - began < 30
    assert _found(runs) == told


def _steps(runs):
    return {path.name: executed(path) for path in runs.glob("trials/*")}


def _each_step_once(runs):
    return all(steps == list(range(1, 17)) for steps in _steps(runs).values())


def test_a_paused_search_waits_and_goes_on_and_so_does_one_that_is_stopped(tmp_path):
    """No trial is at work in a pause; after `resume`, and after Ctrl-C, each goes on where it was: no step is lost."""
    study, runs = tmp_path / "rates.yaml", tmp_path / "runs"
    study.write_text(SEARCH.format(method="random", scheduler="fifo", configurations=3))
    said, store = tmp_path / "said", Store(runs)
    with said.open("w") as stderr, _start(study, runs, stderr=stderr) as driver:
        _await(driver, lambda: any(_steps(runs).values()))
        (folder,) = runs.glob("studies/rates/smoke/*")
        ask(attempts.wish_file(folder, 1), "pause")
        _await(
            driver, lambda: "Paused, with no trial at work. To go on: python -m workbench resume" in said.read_text()
        )
        before = _steps(runs)
        time.sleep(1)
        assert _steps(runs) == before
        ask(attempts.wish_file(folder, 1), None)
        _await(driver, lambda: len(list(runs.glob("trials/*/result.json"))) >= 2)
        _await(driver, lambda: any(store.state(name) == "running" for name in _steps(runs)))
        driver.send_signal(signal.SIGINT)
        driver.wait(PATIENCE)
    err = said.read_text()
    assert driver.returncode == 130, err
    assert "Interrupted; nothing that was finished is lost" in err
    assert not _found(runs)["complete"]
    with _start(study, runs) as driver:
        _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, err
    assert (_found(runs)["complete"], len(_steps(runs)), _each_step_once(runs)) == (True, 6, True)


def test_a_configuration_that_fails_leaves_the_others_be(tmp_path, monkeypatch):
    """Before it has a score, too: the rest of the search is completed, and the exit code and a line tell of it."""
    study, runs = tmp_path / "rates.yaml", tmp_path / "runs"
    study.write_text(SEARCH.format(method="random", scheduler="fifo", configurations=2))
    monkeypatch.setenv("STRUCK", str(tmp_path / "struck"))
    with _start(study, runs) as driver:
        _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1, err
    assert "Failed trials are tried again by the same command" in err
    assert Counter(row["state"] for row in _found(runs)["configurations"]) == {"finished": 3, "failed": 1}


def test_the_cap_of_gpu_hours_ends_a_search_and_a_higher_one_goes_on(tmp_path):
    """Trials at work write a checkpoint and end, none begins; the same cap begins nothing more."""
    study, runs = tmp_path / "rates.yaml", tmp_path / "runs"
    study.write_text(SEARCH.format(method="random", scheduler="fifo", configurations=4))
    with _start(study, runs, 2.0) as driver:
        _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 4, err
    assert "of 2 GPU-hours are spent, all attempts counted: the limit is reached" in err
    before = _steps(runs)
    assert [row["state"] for row in _found(runs)["configurations"]].count("interrupted") == 2
    with _start(study, runs, 2.0) as driver:
        _, err = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, _steps(runs)) == (4, before), err
    with _start(study, runs, 1000.0) as driver:
        _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, err
    assert (_found(runs)["complete"], len(_steps(runs)), _each_step_once(runs)) == (True, 8, True)


def test_search_then_comparison_with_the_real_detector(tmp_path):
    """A search, its file of tuned settings, and a study that names it: from YAML to the comparison by the command line.

    MLflow gets a run for each configuration that was tried.
    """
    runs, search, study = tmp_path / "runs", tmp_path / "rates.yaml", tmp_path / "compare.yaml"
    search.write_text(SEARCH.format(method="random", scheduler="fifo", configurations=2))
    study.write_text(SEARCH.format(method="", scheduler="", configurations=0).replace("rates", "compare"))
    study.write_text(study.read_text().partition("search:")[0] + "tuned: tuned.yaml\n")
    _command(runs, "run", search, "--executor", "inline")
    _command(runs, "report", search, "--format", "tuned", "--out", tmp_path / "tuned.yaml")
    _command(runs, "run", study, "--seeds", "1", "--executor", "inline")
    told = json.loads(_command(runs, "status", search, "--json"))
    assert [trial["state"] for trial in told["trials"]] == ["finished"] * 4
    told = json.loads(_command(runs, "status", study, "--seeds", "1", "--json"))
    assert [trial["state"] for trial in told["trials"]] == ["finished"] * 2
    (mirrored,) = runs.glob("studies/rates/*/*/mlflow.json")
    assert len(json.loads(mirrored.read_text())["runs"]) == 4


def _command(runs, verb, study, *options):
    """Run a command of the workbench at the smallest scale and return what it printed."""
    sets = [part for text in (*SETS[:-1], "training.epochs=1") for part in ("--set", text)]
    line = [sys.executable, "-m", "workbench", verb, study, "--profile", "smoke", *sets, "--runs", runs, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
