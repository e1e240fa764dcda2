"""What the tests of the copy in MLflow share: trials that pretend, looks at what MLflow has, and the way back."""

import io
import sqlite3

from workbench.fetch import fetch
from workbench.mlflow_mirror import default_uri, sync
from workbench.mlflow_mirror.api import Api
from workbench.mlflow_mirror.sender import Sender
from workbench.mlflow_mirror.state import State
from workbench.store import Store
from workbench.trial import execute
from workbench.verdict import judge


def run(spec, store, trainer):
    """Execute one trial with a toy trainer."""
    return execute(spec, store.root, should_stop=lambda: False, trainer=trainer)


def sender_of(store, ref, plan):
    """Return what a mirror's thread does, without the thread, as a new process would."""
    return Sender(store, ref, plan, State(ref.path / "mlflow.json", default_uri(store)))


def api_of(client, store):
    """Return a client as the sender wants it."""
    return Api(client, artifact_location=store.mlflow_artifacts.as_uri())


def runs_of(client, kind):
    """Return the runs of a kind by trial id, or by kind for the parent."""
    return {run.data.tags.get("trial_id", kind): run for run in all_runs(client, kind)}


def all_runs(client, kind):
    """Return the runs of a kind."""
    (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
    return client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")


def curve(client, run, name):
    """Return a metric's points as (step, value)."""
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def everything(store):
    """Count the rows of MLflow's tables, with its own eyes closed."""
    with sqlite3.connect(store.mlflow_database) as database:
        return {
            table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("experiments", "runs", "metrics", "params", "tags")
        }


def purge(store, run):
    """Remove a run from MLflow's tables for good."""
    with sqlite3.connect(store.mlflow_database) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run.info.run_id,))


def fail(step, at=3):
    """Break a trial before a step."""
    if step == at:
        raise RuntimeError("injected")


def unexpected(line):
    """Take no warning."""
    raise AssertionError(line)


def mirrored(store, toy_plan, toy_trainer, empty_database):
    """Run the toy study and send it to the store's embedded MLflow."""
    store.mlflow_database.write_bytes(empty_database.read_bytes())
    ref = store.register(toy_plan, source=toy_plan.study.path.read_text())
    store.start_look(ref, 1)
    trainers = (toy_trainer(), toy_trainer(outcome="diverged"), toy_trainer(before_step=fail), toy_trainer())
    for spec, trainer in zip(toy_plan.specs.values(), trainers, strict=True):
        execute(spec, store.root, should_stop=lambda: False, trainer=trainer)
    store.save_verdicts(ref, judge(store.results(ref)))
    store.save_last_run(ref, {"seconds": 3.0})
    assert sync(store, err=io.StringIO()) == 0
    return store


def fetched(origin, folder, **options):
    """Fetch the toy study from a store's embedded MLflow; return the code, the new store and what was said."""
    target, out, err = Store(folder), io.StringIO(), io.StringIO()
    uri = options.pop("tracking_uri", default_uri(origin))
    code = fetch(target, tracking_uri=uri, study="toy", out=out, err=err, **options)
    return code, target, out.getvalue() + err.getvalue()


def results_of(store):
    """Return a store's only study."""
    (ref,) = store.studies()
    return store.results(ref)
