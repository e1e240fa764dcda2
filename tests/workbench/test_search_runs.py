"""Whole searches: under Ray with ASHA and Optuna, killed and gone on with; and with the real detector."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rated import SEARCH, SETS
from toys import executed

from workbench import attempts
from workbench.store import Store

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]
PATIENCE = 110  # seconds, on a busy machine
DRIVER = """\
import sys
from pathlib import Path
from rated import SETS, RatedTrainer
from workbench.plan import make_plan
from workbench.runner import Options, run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study
plan = make_plan(load_study(Path(sys.argv[1]), Selection(profile="smoke", sets=SETS)))
options = Options(trainer=RatedTrainer(seconds=0.12), tracking_uri="http://127.0.0.1:9")
sys.exit(run_study(plan, Store(Path(sys.argv[2])), options, out=sys.stdout, err=sys.stderr))
"""


def _start(study, runs):
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults"), str(ROOT)]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(study), str(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
    )


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
        give_up = time.monotonic() + PATIENCE
        while len(list(runs.glob("trials/*/result.json"))) < 2:
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < give_up
            time.sleep(0.1)
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
