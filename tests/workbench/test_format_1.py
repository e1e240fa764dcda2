"""A runs folder as the first format was written, kept in `data/format_1`: every later version reads it."""

import shutil
from pathlib import Path

import pytest

from dashboard import load
from workbench import report, status
from workbench.store import Store
from workbench.trial import execute

FROZEN = Path(__file__).parent / "data" / "format_1"


@pytest.fixture
def runs(tmp_path):
    """Return a copy that may be written to."""
    return shutil.copytree(FROZEN, tmp_path / "runs")


def test_status_and_report_read_it(runs):
    """States, scores, curves and the verdict are those that were written."""
    store = Store(runs, create=False)
    (ref,) = store.studies()
    results = store.results(ref)
    described = status.describe(results)
    states = {(trial["variant"], trial["seed"]): trial["state"] for trial in described["trials"]}
    assert states == {
        ("plain", 0): "finished",
        ("sharp", 0): "finished",
        ("plain", 1): "failed",
        ("sharp", 1): "interrupted",
    }
    assert {trial["metrics"].get("ap") for trial in described["trials"]} == {0.8599069199664302, None}
    assert [verdict.verdict for verdict in results.verdicts] == ["undecided"]
    assert {len(record.epochs) for record in results.records.values()} == {1, 2}
    assert "sharp_better" in report.render(results, format="text")


def test_the_dashboard_reads_it(runs):
    """The entry has its results, and the curves of all trials."""
    (entry,) = load.entries(runs)
    assert entry.problem is None
    assert entry.results is not None
    _, curves = load.comparison.curves(entry.results, metric="ap", parameters="raw", axis="epoch")
    assert set(zip(curves["variant"], curves["seed"], strict=True)) == {
        (trial.variant, trial.seed) for trial in entry.results.plan.trials
    }


def test_its_trials_go_on(runs, toy_trainer):
    """What had finished is not run again, and what had not is brought to its end in the format of today."""
    store = Store(runs)
    plan = store.results(store.studies()[0]).plan
    trainer = toy_trainer()
    for spec in plan.specs.values():
        shutil.rmtree(store.trial_dir(spec.trial_id) / "checkpoints")  # of another trainer
        assert execute(spec, runs, should_stop=lambda: False, trainer=trainer) == "finished"
    assert [call for call in trainer.calls if call.startswith("train")] == ["train from 0", "train from 0"]
    assert {record.state for record in store.results_for(plan).records.values()} == {"finished"}
