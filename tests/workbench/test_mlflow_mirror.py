"""The copy in MLflow: live, truthful, once, and never in the way. A real embedded database."""

import io
import sqlite3
from dataclasses import replace

import pytest

from core.events import StepsTaken
from workbench.commands import mlflow_command
from workbench.durable import EventWriter
from workbench.mlflow_mirror import Mirror, default_uri, sync
from workbench.mlflow_mirror.api import Api
from workbench.mlflow_mirror.sender import Sender
from workbench.mlflow_mirror.state import State
from workbench.store import Store
from workbench.trial import execute
from workbench.verdict import judge

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that MLflow imports


@pytest.fixture
def client(store, empty_database):
    """Return a client of the store's embedded MLflow."""
    from mlflow import MlflowClient

    store.mlflow_database.write_bytes(empty_database.read_bytes())
    return MlflowClient(default_uri(store))


@pytest.fixture
def ref(store, toy_plan):
    """Register the toy plan and start its look."""
    ref = store.register(toy_plan, source="study: toy")
    store.start_look(ref, 1)
    return ref


def run(spec, store, trainer):
    """Execute one trial with a toy trainer."""
    return execute(spec, store.root, should_stop=lambda: False, trainer=trainer)


def sender_of(store, ref, plan):
    """Return what a mirror's thread does, without the thread."""
    return Sender(store, ref, plan, State(ref.path / "mlflow.json", default_uri(store)))


def api_of(client, store):
    """Return a client as the sender wants it."""
    return Api(client, artifact_location=store.mlflow_artifacts.as_uri())


def runs_of(client, kind):
    """Return the runs of a kind by trial id, or by kind for the parent."""
    (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
    found = client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")
    return {run.data.tags.get("trial_id", kind): run for run in found}


def curve(client, run, name):
    """Return a metric's points as (step, value)."""
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.ci
def test_a_finished_study_is_all_there(store, toy_plan, toy_trainer, client, ref):
    """Parent and children have parameters, tags, curves, files, verdicts and truthful statuses."""
    for trial, trainer in zip(
        toy_plan.trials,
        (toy_trainer(), toy_trainer(outcome="diverged"), toy_trainer(before_step=_fail), toy_trainer()),
        strict=True,
    ):
        run(toy_plan.specs[trial.trial_id], store, trainer)
    store.save_verdicts(ref, judge(store.results(ref)))
    warnings = []
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=warnings.append).finish()
    assert warnings == []
    children, (parent,) = runs_of(client, "trial"), runs_of(client, "plan").values()
    statuses = [children[trial.trial_id].info.status for trial in toy_plan.trials]
    assert statuses == ["FINISHED", "FAILED", "FAILED", "FINISHED"]
    assert parent.info.status == "FAILED"
    assert parent.data.tags["verdict.sharp_better"] == "undecided"
    assert "Sharp is better." in parent.data.params["claim.sharp_better"]
    first = children[toy_plan.trials[0].trial_id]
    assert first.data.tags["mlflow.parentRunId"] == parent.info.run_id
    wanted = {"study": "toy", "profile": "smoke", "variant": "plain", "seed": "0", "state": "finished"}
    assert wanted.items() <= first.data.tags.items()
    assert {"plan_hash", "numerics"} <= first.data.tags.keys()
    assert children[toy_plan.trials[1].trial_id].data.tags["outcome"] == "diverged"
    assert first.data.params["training.epochs"] == "1"
    assert first.data.params["loss.weight_giou"] == "2.0"
    assert curve(client, first, "averaged/ap") == [(2, 0.02), (4, 0.04), (6, 0.06)]
    assert curve(client, first, "loss/total") == [(step, 2 / step) for step in range(1, 7)]
    assert curve(client, first, "final_averaged/ap") == [(6, 0.25)]
    names = {item.path for item in client.list_artifacts(first.info.run_id)}
    assert names == {"spec.json", "events.jsonl", "result.json", "evaluations", "attempts", "manifest.json"}
    assert {"plan.json", "study.yaml", "registered.json", "looks.json", "verdicts.json", "manifest.json"} <= {
        item.path for item in client.list_artifacts(parent.info.run_id)
    }
    assert store.results(ref).mlflow["runs"].keys() == set(toy_plan.specs)


@pytest.mark.ci
def test_curves_are_there_while_a_trial_runs(store, toy_plan, toy_trainer, client, ref):
    """Two epochs in, the run is RUNNING and its curve has two points; at the end nothing is there twice."""
    spec = next(iter(toy_plan.specs.values()))
    seen = []

    def look(step):
        if step == 5:
            sender.send(api_of(client, store), last=False)
            child = runs_of(client, "trial")[spec.trial_id]
            seen.append((child.info.status, curve(client, child, "averaged/ap")))

    sender = sender_of(store, ref, toy_plan)
    run(spec, store, toy_trainer(before_step=look))
    assert seen == [("RUNNING", [(2, 0.02), (4, 0.04)])]
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=_unexpected).finish()
    child = runs_of(client, "trial")[spec.trial_id]
    assert child.info.status == "FINISHED"
    assert curve(client, child, "averaged/ap") == [(2, 0.02), (4, 0.04), (6, 0.06)]


@pytest.mark.ci
def test_steps_that_happen_again_are_sent_once(store, toy_plan, toy_trainer, client, ref):
    """After a kill the steps since the checkpoint are trained again; MLflow keeps each point once, and one run."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer(before_step=lambda step: _fail(step, at=4)))  # the last checkpoint is of step 2
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=_unexpected).finish()
    assert runs_of(client, "trial")[spec.trial_id].info.status == "FAILED"
    run(spec, store, toy_trainer())
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=_unexpected).finish()
    child = runs_of(client, "trial")[spec.trial_id]
    assert child.info.status == "FINISHED"
    assert curve(client, child, "loss/total") == [(step, 2 / step) for step in range(1, 7)]


@pytest.mark.ci
def test_sync_replays_exactly_once(store, toy_plan, toy_trainer, client, ref):
    """Replaying everything, even with the memory of what was sent lost, adds no run and no point."""
    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = _everything(store)
    (ref.path / "mlflow.json").unlink()
    assert sync(store, err=io.StringIO()) == 0
    assert _everything(store) == before
    assert before["metrics"] > 100


@pytest.mark.ci
def test_a_run_whose_id_never_arrived_is_found(store, toy_plan, toy_trainer, client, ref, monkeypatch):
    """When the answer to the creation of a run is lost, the next round takes that run and makes no second one."""
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    sender.send(api, last=False)  # the parent
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    create = client.create_run

    def lose(*args, **options):
        create(*args, **options)
        raise ConnectionError("the answer is lost")

    monkeypatch.setattr(client, "create_run", lose)
    with pytest.raises(ConnectionError):
        sender.send(api, last=False)
    monkeypatch.undo()
    sender.send(api, last=True)
    assert len(runs_of(client, "trial")) == 1
    child = runs_of(client, "trial")[spec.trial_id]
    assert (child.info.status, child.data.params["training.epochs"]) == ("FINISHED", "1")


@pytest.mark.ci
def test_a_locked_database_delays_the_copy_only(store, toy_plan, toy_trainer, client, ref):
    """While somebody holds the database the mirror says so once and keeps everything; `sync` makes up for it."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    holder = sqlite3.connect(store.mlflow_database)
    holder.execute("BEGIN EXCLUSIVE")
    warnings = []
    assert not Mirror(store, ref, toy_plan, tracking_uri=None, warn=warnings.append).finish()
    holder.close()
    assert warnings[0].startswith("MLflow cannot be reached")
    assert "python -m workbench sync" in warnings[1]
    assert sync(store, err=io.StringIO()) == 0
    assert runs_of(client, "trial")[spec.trial_id].info.status == "FINISHED"


@pytest.mark.ci
def test_numbers_that_are_none_are_not_sent(store, toy_plan, toy_trainer, client, ref):
    """An infinite loss, which MLflow would draw as 1.8e308, is left out; the rest of the event is kept."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    last = next(item.event for item in store.events(spec.trial_id) if isinstance(item.event, StepsTaken))
    writer = EventWriter(store.trial_dir(spec.trial_id) / "events.jsonl", attempt=1)
    writer.append(replace(last, step=9, losses={"total": float("inf")}, grad_norm=float("nan"), learning_rate=0.25))
    writer.close()
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=_unexpected).finish()
    child = runs_of(client, "trial")[spec.trial_id]
    assert curve(client, child, "learning_rate")[-1] == (9, 0.25)
    assert curve(client, child, "loss/total")[-1][0] == 6


def test_the_printed_line_is_absolute_and_quoted(tmp_path):
    """The line works from any directory; a server that shows its pages already needs none."""
    store = Store(tmp_path / "my runs")
    line = mlflow_command(default_uri(store))
    assert line is not None
    assert line.endswith(f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/my runs/mlflow.db' --port 5000")
    assert mlflow_command("http://mlflow.example:5000") is None


def _fail(step, at=3):
    if step == at:
        raise RuntimeError("injected")


def _unexpected(line):
    raise AssertionError(line)


def _everything(store):
    """Count the rows of MLflow's tables, with its own eyes closed."""
    with sqlite3.connect(store.mlflow_database) as database:
        return {
            table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("experiments", "runs", "metrics", "params", "tags")
        }
