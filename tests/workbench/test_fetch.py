"""Rebuilding records from MLflow: equal to the originals, never over what differs, and nothing on a stranger's word."""

import io
from dataclasses import replace

import pandas as pd
import pytest
from mirroring import fetched, mirrored, results_of
from rated import SEARCH, SETS, RatedTrainer

from dashboard import load
from workbench.fetch import fetch
from workbench.mlflow_mirror import default_uri, sync
from workbench.options import Options
from workbench.plan import make_plan
from workbench.report import render
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that MLflow imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def origin(store, toy_plan, toy_trainer, empty_database):
    """Return a store with a study that has run, with a failure and a divergence in it, and its MLflow."""
    return mirrored(store, toy_plan, toy_trainer, empty_database)


@pytest.fixture(scope="module")
def lasting_origin(tmp_path_factory, plan_in, toy_trainer, empty_database):
    """Return one for all tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("origin")
    return mirrored(Store(folder / "runs"), plan_in(folder), toy_trainer, empty_database)


def files_of(store):
    """Return the text of every file of a store's records, but where they came from."""
    paths = [
        path for path in store.root.rglob("*") if path.is_file() and path.relative_to(store.root).parts[0][0] != "."
    ]
    return {
        path.relative_to(store.root).as_posix(): path.read_bytes()
        for path in paths
        if path.relative_to(store.root).parts[0] in ("trials", "studies")
        and path.name not in ("fetched.json", "mlflow.json", "report.md", "driver.lock")
        and "checkpoints" not in path.parts
        and path.suffix != ".beat"  # a sign of life
        and not (path.parts[-6:-5] == ("studies",) and path.parent.name == "attempts")  # drivers of one machine
        and path.suffix != ".png"
    }


def assert_equal(origin, copy):
    """Records, report and what the dashboard draws are those of the original."""
    here, there = results_of(origin), results_of(copy)
    same_folder = replace(there, runs=here.runs, mlflow=here.mlflow)  # a report ends with lines that name the folder
    assert same_folder == here
    assert render(same_folder, format="text") == render(here, format="text")
    assert render(same_folder, format="html") == render(here, format="html")
    ours, theirs = (load.trials(store.root, of).drop(columns="mlflow") for store, of in ((origin, here), (copy, there)))
    pd.testing.assert_frame_equal(ours, theirs)
    assert load.claim_cards(there) == load.claim_cards(here)
    assert load.progress(there) == load.progress(here)
    assert [replace(item, folder=None) for item in load.failures(copy.root, there)] == [
        replace(item, folder=None) for item in load.failures(origin.root, here)
    ]


@pytest.mark.ci
def test_fetched_records_equal_the_originals(lasting_origin, tmp_path):
    """Every file of every record is there byte for byte; results, report and dashboard are equal, and again so."""
    code, copy, told = fetched(lasting_origin, tmp_path / "copy")
    assert code == 0, told
    assert "4 trials fetched" in told
    assert files_of(copy) == files_of(lasting_origin)
    assert_equal(lasting_origin, copy)
    assert next(copy.root.glob("studies/toy/smoke/*/report.md")).read_text().startswith("#")
    code, _, told = fetched(lasting_origin, tmp_path / "copy")
    assert code == 0
    assert "4 already here" in told
    assert_equal(lasting_origin, copy)


@pytest.mark.ci
def test_a_copy_goes_on_in_the_same_runs(origin, tmp_path, toy_plan, toy_trainer, empty_database):
    """`sync` of a fetched copy adds no run and no point; a trial tried again there is the same run, and comes back."""
    from mlflow import MlflowClient

    _, copy, _ = fetched(origin, tmp_path / "copy")
    client = MlflowClient(default_uri(origin))
    before = _runs(client)
    assert sync(copy, tracking_uri=default_uri(origin), err=io.StringIO()) == 0
    assert _runs(client) == before
    failed = next(spec for spec in toy_plan.specs.values() if copy.state(spec.trial_id) == "failed")
    execute(failed, copy.root, should_stop=lambda: False, trainer=toy_trainer())
    assert sync(copy, tracking_uri=default_uri(origin), err=io.StringIO()) == 0
    assert {run for run, _ in _runs(client)} == {run for run, _ in before}
    third = fetched(origin, tmp_path / "third")[1]
    assert third.state(failed.trial_id) == "finished"
    assert third.record(failed.trial_id).error is None
    assert fetched(origin, tmp_path / "third")[0] == 0
    code, _, told = fetched(origin, origin.root)  # never touched by a fetch, and behind: kept as it is
    assert code == 1
    assert "differs from what is here" in told
    assert origin.state(failed.trial_id) == "failed"


@pytest.mark.ci
def test_what_an_earlier_fetch_put_there_is_brought_up_to_date(origin, tmp_path, toy_plan, toy_trainer):
    """After the origin went on, the copy follows, files that are no more included; one that was changed is kept."""
    _, copy, _ = fetched(origin, tmp_path / "copy")
    changed = fetched(origin, tmp_path / "changed")[1]
    failed = next(spec for spec in toy_plan.specs.values() if copy.state(spec.trial_id) == "failed")
    with (changed.trial_dir(failed.trial_id) / "events.jsonl").open("a") as file:
        file.write("{}\n")
    execute(failed, origin.root, should_stop=lambda: False, trainer=toy_trainer())
    assert sync(origin, err=io.StringIO()) == 0
    code, _, told = fetched(origin, tmp_path / "copy")
    assert code == 0, told
    assert "1 brought up to date" in told
    assert_equal(origin, copy)
    assert files_of(copy) == files_of(origin)
    code, _, told = fetched(origin, tmp_path / "changed")
    assert code == 1
    assert f"trial {failed.trial_id}: differs from what is here" in told
    assert changed.state(failed.trial_id) == "failed"


@pytest.mark.ci
def test_a_trial_without_its_checkpoints_starts_over(origin, tmp_path, toy_plan, toy_trainer):
    """A fetched trial that had not finished can be run: from its start, and the records stay readable throughout."""
    _, copy, _ = fetched(origin, tmp_path / "copy")
    failed = next(spec for spec in toy_plan.specs.values() if copy.state(spec.trial_id) == "failed")
    trainer = toy_trainer()
    execute(failed, copy.root, should_stop=lambda: False, trainer=trainer)
    assert trainer.calls[1] == "train from 0"
    assert copy.record(failed.trial_id).attempts == 2
    assert results_of(copy).records[failed.trial_id].state == "finished"


@pytest.mark.ci
def test_a_search_is_fetched_with_all_that_it_tried(tmp_path, empty_database):
    """Its plan grows while it runs, so most of its trials stand in no plan.json."""
    (tmp_path / "rates.yaml").write_text(SEARCH.format(method="random", scheduler="fifo", configurations=3))
    plan = make_plan(load_study(tmp_path / "rates.yaml", Selection(profile="smoke", sets=SETS)))
    store, copy = Store(tmp_path / "runs"), Store(tmp_path / "copy")
    options = Options(executor="inline", trainer=RatedTrainer(), tracking_uri="http://127.0.0.1:9")
    assert run_study(plan, store, options, out=io.StringIO(), err=io.StringIO()) == 0
    store.mlflow_database.write_bytes(empty_database.read_bytes())
    assert sync(store, tracking_uri=default_uri(store), err=io.StringIO()) == 0
    said = io.StringIO()
    assert fetch(copy, tracking_uri=default_uri(store), study="rates", out=said, err=said) == 0
    assert "6 trials fetched" in said.getvalue()
    assert {record.state for record in results_of(copy).records.values()} == {"finished"}
    assert files_of(copy) == {name: data for name, data in files_of(store).items() if not name.endswith("steps.log")}


def _runs(client):
    """Return every run with the points that it has."""
    (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
    runs = client.search_runs([experiment.experiment_id])
    return {
        (run.info.run_id, sum(len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics))
        for run in runs
    }
