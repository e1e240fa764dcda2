"""Running a study from plan to verdict, and again, and after every kind of interruption. Real training, tiny scale."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from workbench import driving
from workbench.durable import EventReader
from workbench.errors import StoreError, WorkbenchError
from workbench.execution import run_inline
from workbench.options import Options
from workbench.plan import make_plan
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute

NOWHERE = "http://127.0.0.1:9"  # nobody listens there
SETS = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4")


LONGER = ("--set", "training.epochs=20", "--seeds", "1")  # two trials of forty steps


def run(plan, store, **options):
    """Run a plan inline without MLflow; return the exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    options = {"executor": "inline", "tracking_uri": NOWHERE, **options}
    code = run_study(plan, store, Options(**options), out=out, err=err)
    return code, out.getvalue(), err.getvalue()


def command(study, runs, *options):
    """Return the command line that runs a toy study inline."""
    sets = [part for item in SETS for part in ("--set", item)]
    parts = [sys.executable, "-m", "workbench", "run", str(study), "--profile", "smoke", *sets, "--runs", str(runs)]
    return [*parts, "--executor", "inline", "--tracking-uri", NOWHERE, *options]


def hashes(store):
    """Return the hash of the weights of every trial in a store."""
    paths = sorted((store.root / "trials").glob("*/result.json"))
    return {path.parent.name: json.loads(path.read_text())["weights_hash"] for path in paths}


def test_a_study_runs_to_its_verdicts_and_the_second_time_trains_nothing(toy_plan, store):
    """All trials finish, the report is printed and written; again it is the same, without any attempt or MLflow's."""
    code, out, err = run(toy_plan, store)
    assert code == 0, err
    results = store.results_for(toy_plan)
    assert {record.state for record in results.records.values()} == {"finished"}
    assert [verdict.claim for verdict in results.verdicts] == ["sharp_better"]
    assert "sharp_better" in out
    (report,) = store.root.glob("studies/toy/smoke/*/report.md")
    assert "Sharp is better." in report.read_text()
    assert err.count("MLflow cannot be reached, training goes on without it") == 1
    assert "python -m workbench sync" in err
    weights = hashes(store)
    code, again, _ = run(toy_plan, store)
    assert (code, again) == (0, out)
    assert {record.attempts for record in store.results_for(toy_plan).records.values()} == {1}
    assert hashes(store) == weights


def test_trials_without_a_compiled_kernel_are_told_of_before_they_start(toy_plan, store, monkeypatch):
    """One line says that there is no compiler; who insists on the kernel, or names an unknown one, gets no trials."""
    started = []
    ray = SimpleNamespace(run_on_ray=started.append)
    monkeypatch.setitem(sys.modules, "workbench.ray_executor", ray)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    _, _, err = run(toy_plan, store, executor="ray")
    assert err.count("Deformable attention runs in its PyTorch form, several times slower: CXX names") == 1
    for value, said in (("cpp", "WORKBENCH_KERNEL=cpp: CXX names"), ("fast", "allowed are auto, torch, cpp")):
        monkeypatch.setenv("WORKBENCH_KERNEL", value)
        with pytest.raises(WorkbenchError, match=said):
            run(toy_plan, store, executor="ray")
    assert len(started) == 1


def test_a_failed_trial_is_told_and_tried_again(toy_plan, store):
    """A failure leaves the other trials alone, gives exit code 1 with its traceback, and the next run retries it."""
    trial = toy_plan.trials[1].trial_id
    blocked = store.trial_dir(trial) / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # a file where the trial wants a folder
    code, out, err = run(toy_plan, store)
    assert code == 1
    states = [store.state(item.trial_id) for item in toy_plan.trials]
    assert states == ["finished", "failed", "finished", "finished"]
    assert f"sharp seed 0 ({trial}) failed: io" in err
    assert "FileExistsError" in err
    assert "tried again by the same command" in err
    assert "undecided" in out.lower()
    blocked.unlink()
    code, _, _ = run(toy_plan, store)
    assert code == 0
    assert [store.record(item.trial_id).attempts for item in toy_plan.trials] == [
        1,
        4,
        1,
        1,
    ]  # an input or output error may pass: twice more


def test_weights_that_do_not_fit_are_told_in_words(toy_study, store, tmp_path):
    """What only the trial can find out about its configuration is a message for users, tried once by a command."""
    torch.save({}, tmp_path / "empty.pth")
    backbone = f"model.backbone={{kind: resnet, depth: 18, weights: {tmp_path / 'empty.pth'}}}"
    plan = make_plan(
        load_study(toy_study, Selection(profile="smoke", seeds=1, variants=("plain",), sets=(*SETS, backbone)))
    )
    code, _, err = run(plan, store)
    assert code == 1
    assert "plain seed 0" in err
    assert "failed: bad_config" in err
    assert f"    {tmp_path / 'empty.pth'}: 100 tensors of resnet18 are missing" in err
    assert "Traceback" not in err
    assert "in load_pretrained" not in err
    assert {record.attempts for record in store.results_for(plan).records.values()} == {1}


def test_more_threads_than_cores_are_refused_before_anything_starts(toy_study, store):
    """A request that cannot be met is an error with the number that can, not a study that waits for ever."""
    plan = make_plan(load_study(toy_study, Selection(profile="smoke", sets=(*SETS, "training.threads=4096"))))
    with pytest.raises(Exception, match=r"a trial asks for 4096 cores.*this machine: \d+ cores"):
        run(plan, store)
    assert not (store.root / "trials").exists()


def test_trials_that_somebody_else_has_just_computed_are_no_reason_to_give_up(toy_plan, store, toy_trainer):
    """Another driver took the first one while this one began: what is left is still run, and nothing is wrong."""
    given = []

    def too_late(job):
        if not given:
            execute(job.specs[0], job.runs, should_stop=lambda: False, trainer=job.trainer)
        else:
            run_inline(job)
        given.append(len(job.specs))

    with mock.patch.object(driving, "run_inline", too_late):
        code, _, err = run(toy_plan, store, trainer=toy_trainer())
    assert (code, given) == (0, [4, 3])
    assert "No trial could be started" not in err


class Terminal(io.StringIO):
    """A terminal without end; `lines` are what stands on it."""

    def isatty(self):
        """Say that it is one."""
        return True

    def lines(self):
        """Follow what was written, up and down."""
        shown = [""]
        for part in re.split(r"(\x1b\[\d+F\x1b\[J)", self.getvalue()):
            if up := re.fullmatch(r"\x1b\[(\d+)F\x1b\[J", part):
                shown[-int(up[1]) - 1 :] = [""]
            else:
                first, *rest = part.split("\n")
                shown = [*shown[:-1], shown[-1] + first, *rest]
        return shown


def test_what_is_said_while_a_table_is_drawn_stays_on_the_screen(toy_plan, store, toy_trainer, monkeypatch):
    """A table draws itself over its last self: a line said meanwhile stands above it, and is not drawn over."""
    monkeypatch.setenv("TERM", "xterm")

    def fail(_step):
        raise ImportError("No module named 'mine'")

    trainer, terminal = toy_trainer(before_step=fail), Terminal()
    options = Options(executor="inline", tracking_uri=NOWHERE, trainer=trainer)
    with mock.patch("workbench.progress.REDRAW_SECONDS", 0.01):
        assert run_study(toy_plan, store, options, out=io.StringIO(), err=terminal) == 1
    lines = terminal.lines()
    assert "The first trial could not take a single step, so the others were not begun." in lines
    assert sum(line.startswith("variant") for line in lines) == 1
    assert any("MLflow cannot be reached" in line for line in lines)


def test_an_executor_that_begins_nothing_is_told(toy_plan, store):
    """No endless loop, and no talk of failed trials: none was tried."""
    with mock.patch.object(driving, "run_inline"):
        code, _, err = run(toy_plan, store)
    assert code == 1
    assert "No trial could be started" in err
    assert "Trials are missing; they are run by the same command" in err


def test_a_disk_that_is_full_at_the_very_end_is_told_in_words(toy_plan, store, toy_trainer):
    """The driver lets go of the study when all is done: that this cannot be put on record is no traceback either."""
    run(toy_plan, store, trainer=toy_trainer())
    full = OSError(errno.ENOSPC, "No space left on device", str(store.study_dir(toy_plan) / "attempts"))
    with mock.patch("workbench.attempts.end", side_effect=full), pytest.raises(StoreError, match="make room"):
        run(toy_plan, store, trainer=toy_trainer())


TWO_LOOKS = """\
version: 1
study: two_looks
question: Which of three changes help?
baseline: plain
variants:
  plain: {}
  sharp: {why: surely better, set: {loss.weight_giou: 4.0}}
  noisy: {why: not clear at five seeds, set: {loss.weight_giou: 3.0}}
claims:
  - {id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}
  - {id: noisy_better, text: Noisy is better., plus: noisy, minus: plain, metric: ap, kind: superiority}
scope: seeds
"""
GAINS = {  # in AP, by seed
    "sharp": [0.05, 0.051, 0.049, 0.052, 0.05, -0.05, -0.06, -0.05, -0.06, -0.05],
    "noisy": [0.09, 0.01, 0.08, -0.02, 0.03, 0.06, 0.061, 0.059, 0.06, 0.062],
}


@pytest.fixture
def two_looks(tmp_path):
    """Return a plan with looks of five and ten seeds."""
    path = tmp_path / "two_looks.yaml"
    path.write_text(TWO_LOOKS)
    return make_plan(load_study(path, Selection(profile="laptop")))


@pytest.fixture
def scoring(two_looks, toy_trainer):
    """Return a trainer that only pretends and scores the trials of `two_looks` as `GAINS` say."""
    scores = {t.trial_id: 0.3 + GAINS[t.variant][t.seed] for t in two_looks.trials if t.variant != "plain"}

    class Scoring(toy_trainer):
        def evaluate(self, config, evaluation, *, checkpoint, **rest):
            scored = super().evaluate(config, evaluation, checkpoint=checkpoint, **rest)
            scored.metrics = replace(scored.metrics, ap=scores.get(checkpoint.parent.parent.name, 0.3))
            return scored

    return Scoring()


def test_only_the_first_look_runs_unasked(two_looks, scoring, store):
    """The same command stops at the first look however often it is given, and says what is undecided."""
    for _ in range(2):
        code, out, _ = run(two_looks, store, trainer=scoring)
        assert code == 0
        assert store.results_for(two_looks).looks_started == 1
    assert Counter(store.state(trial.trial_id) for trial in two_looks.trials) == {"finished": 15, "pending": 15}
    assert "UNDECIDED  noisy_better" in out
    assert "--until-decided" in out


def test_undecided_claims_go_on_to_the_second_look(two_looks, scoring, store):
    """With --until-decided the unclear claim is judged at ten seeds; the clear one stands, whatever comes."""
    code, _, err = run(two_looks, store, trainer=scoring, until_decided=True, budget_seconds=3600.0)
    assert code == 0
    assert "look 2 of 2: 30 trials, 15 already done" in err
    results = store.results_for(two_looks)
    assert results.looks_started == 2
    assert {record.attempts for record in results.records.values()} == {1}
    sharp, noisy = results.verdicts
    assert (sharp.verdict, sharp.look_seeds, sharp.n_pairs) == ("supported", 5, 5)
    assert "decided at the look of 5 seeds, which stands; later seeds do not reopen it" in sharp.notes
    assert (noisy.verdict, noisy.look_seeds, noisy.n_pairs, noisy.alpha) == ("supported", 10, 10, 0.02)


def test_a_spent_budget_stops_before_the_next_look(two_looks, scoring, store):
    """No trial of a look that does not fit begins; one line names the claim, the time it needs, and the option."""
    code, _, err = run(two_looks, store, trainer=scoring, until_decided=True, budget_seconds=1e-3)
    assert code == 0
    (line,) = (line for line in err.splitlines() if line.startswith("Undecided: "))
    assert re.fullmatch(
        r"Undecided: noisy_better\. The next look needs about \d+ s, and 0 s of the budget are left: "
        r"raise --budget to go on\.",
        line,
    )
    results = store.results_for(two_looks)
    assert results.looks_started == 1
    assert Counter(record.state for record in results.records.values()) == {"finished": 15, "pending": 15}


def test_a_look_whose_trials_are_known_needs_no_budget(two_looks, scoring, store):
    """Trials that another study has computed decide the claim at once, whatever time is left."""
    for spec in two_looks.specs.values():
        execute(spec, store.root, should_stop=lambda: False, trainer=scoring)
    code, _, err = run(two_looks, store, trainer=scoring, until_decided=True, budget_seconds=1e-3)
    assert code == 0
    assert "Undecided: " not in err
    assert [verdict.look_seeds for verdict in store.results_for(two_looks).verdicts] == [5, 10]


@pytest.mark.ci
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_study_goes_on_where_it_was(toy_study, tmp_path, signal_number, code):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint and tell how to go on; the numbers are equal."""
    process, store = _start_and_wait_for_steps(toy_study, tmp_path / "stopped")
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert f"To go on: python -m workbench run {toy_study}" in err
    assert _states(store) == ["interrupted"]  # and the second was not begun
    _finish_and_compare(toy_study, store, tmp_path / "unbroken")


@pytest.mark.ci
def test_a_killed_study_goes_on_where_it_was(toy_study, tmp_path):
    """After kill -9 the same command goes on from the checkpoint and ends with the weights of an unbroken run."""
    process, store = _start_and_wait_for_steps(toy_study, tmp_path / "killed")
    process.kill()
    process.communicate()
    assert _states(store) == ["interrupted"]
    _finish_and_compare(toy_study, store, tmp_path / "unbroken")


@pytest.mark.ci
def test_a_complete_study_imports_no_heavy_library(toy_study, tmp_path):
    """The same command again needs neither torch nor Ray, and MLflow only if it has not got everything."""
    runs = tmp_path / "runs"
    uri = ("--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    subprocess.run(command(toy_study, runs, *uri), check=True, capture_output=True)
    script = (
        "import sys, runpy\n"
        "try: runpy.run_module('workbench', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print('code', end.code, sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))\n"
    )
    parts = [sys.executable, "-c", script, *command(toy_study, runs, *uri)[3:]]
    done = subprocess.run(parts, check=True, capture_output=True, text=True)
    assert done.stdout.endswith("code 0 []\n"), done.stdout + done.stderr


def _states(store):
    return [store.state(path.name) for path in (store.root / "trials").glob("*")]


def _start_and_wait_for_steps(study, runs):
    """Start a run with many steps a trial; return it when its first trial has written its first checkpoint."""
    process = subprocess.Popen(
        command(study, runs, *LONGER),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        for path in (runs / "trials").glob("*/events.jsonl"):
            if any(item.event.step >= 6 for item in EventReader(path).poll()):
                return process, Store(runs)
    raise AssertionError(process.communicate()[1])


def _finish_and_compare(study, store, unbroken):
    for runs in (store.root, unbroken):
        done = subprocess.run(command(study, runs, *LONGER), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert hashes(store) == hashes(Store(unbroken))
    assert sorted(store.record(trial_id).attempts for trial_id in hashes(store)) == [1, 2]
