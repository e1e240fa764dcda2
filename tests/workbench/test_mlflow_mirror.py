"""The copy in MLflow: live, truthful, once, and never in the way. A real embedded database."""

import io
import json
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from mlflow_server import locks_waited_for

from core.events import StepsTaken
from workbench.commands import mlflow_command
from workbench.durable import EventWriter
from workbench.mirror_content import milliseconds
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
    assert names == {
        "spec.json",
        "events.jsonl",
        "result.json",
        "evaluations",
        "attempts",
        "provenance",
        "manifest.json",
    }
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
@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "tracking_uri": 3, "runs": 5}'])
def test_a_damaged_memory_of_what_was_sent_is_none(store, toy_plan, toy_trainer, client, ref, text):
    """`sync` without an address goes to the embedded database again, and adds nothing."""
    run(next(iter(toy_plan.specs.values())), store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = _everything(store)
    (ref.path / "mlflow.json").write_text(text)
    assert sync(store, err=io.StringIO()) == 0
    assert _everything(store) == before


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
    with locks_waited_for(300):
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


@pytest.mark.ci
def test_a_failed_trial_that_is_tried_again_has_no_stale_marks(store, toy_plan, toy_trainer, client, ref):
    """Its run is FAILED with its error and end; then RUNNING with neither; then FINISHED, all at the times recorded."""
    spec = next(iter(toy_plan.specs.values()))
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    run(spec, store, toy_trainer(before_step=lambda step: _fail(step, at=4)))
    sender.send(api, last=False)
    failed = runs_of(client, "trial")[spec.trial_id]
    assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "injected")
    error = store.record(spec.trial_id).error
    assert failed.info.end_time == milliseconds(error["failed_at"])
    assert failed.info.start_time == milliseconds(store.events(spec.trial_id)[0].time)
    seen = []

    def look(step):
        if step == 5:
            sender.send(api, last=False)
            seen.append(runs_of(client, "trial")[spec.trial_id])

    run(spec, store, toy_trainer(before_step=look))
    (again,) = seen
    assert again.info.status == "RUNNING"
    assert not again.info.end_time  # 0 or None: MLflow has both for a run without an end
    assert "error" not in again.data.tags
    assert (again.data.tags["state"], again.data.tags["attempts"]) == ("running", "2")
    sender.send(api, last=True)
    finished = runs_of(client, "trial")[spec.trial_id]
    assert finished.info.run_id == failed.info.run_id
    assert finished.info.status == "FINISHED"
    assert finished.info.end_time == milliseconds(store.record(spec.trial_id).result["finished_at"])
    assert "error" not in finished.data.tags


@pytest.mark.ci
def test_runs_of_a_dead_driver_are_killed_by_the_next_one(store, toy_plan, toy_trainer, client, ref):
    """A trial whose worker died without a word, and its plan, no longer look as if they ran."""
    spec = next(iter(toy_plan.specs.values()))

    def die(step):
        if step == 4:
            sender_of(store, ref, toy_plan).send(api_of(client, store), last=False)
            raise KeyboardInterrupt  # nothing is recorded, as after a kill

    with pytest.raises(KeyboardInterrupt):
        run(spec, store, toy_trainer(before_step=die))
    assert runs_of(client, "trial")[spec.trial_id].info.status == "RUNNING"
    assert runs_of(client, "plan")["plan"].info.status == "RUNNING"
    path = store.trial_dir(spec.trial_id) / "attempts" / "0001.json"
    attempt = json.loads(path.read_text())
    attempt["worker"]["started"] = 1  # another process of this number
    path.write_text(json.dumps(attempt))
    assert store.state(spec.trial_id) == "interrupted"
    assert sync(store, err=io.StringIO()) == 0
    child = runs_of(client, "trial")[spec.trial_id]
    assert (child.info.status, child.data.tags["state"]) == ("KILLED", "interrupted")
    assert runs_of(client, "plan")["plan"].info.status == "KILLED"


@pytest.mark.ci
def test_studies_that_share_trials_have_a_run_of_each(store, toy_plan, toy_trainer, client, ref):
    """A trial computed once has a child run in both studies, with all of its points."""
    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    other = replace(toy_plan, study=replace(toy_plan.study, name="other"), plan_hash="0123456789ab")
    store.start_look(store.register(other, source="study: other"), 1)
    assert sync(store, err=io.StringIO()) == 0
    runs = [item for item in client.search_experiments() if item.name in ("toy/smoke", "other/smoke")]
    assert len(runs) == 2
    for experiment in runs:
        found = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
        assert {item.data.tags["trial_id"] for item in found} == set(toy_plan.specs)
        assert {item.info.status for item in found} == {"FINISHED"}
        assert len(curve(client, found[0], "loss/total")) == 6


@pytest.mark.ci
def test_variants_that_share_a_trial_have_a_run_each(store, toy_plan, toy_trainer, client):
    """Variants that differ in their evaluation only: each run has its own final scores, found again when forgotten."""
    first, second = toy_plan.trials[0], toy_plan.trials[1]
    shared = replace(second, trial_id=first.trial_id)
    plan = replace(toy_plan, trials=(first, shared), specs={first.trial_id: toy_plan.specs[first.trial_id]})
    ref = store.register(plan, source="")
    run(plan.specs[first.trial_id], store, toy_trainer())
    for _ in range(2):
        assert Mirror(store, ref, plan, tracking_uri=None, warn=_unexpected).finish()
        (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
        found = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
        assert {item.data.tags["variant"] for item in found} == {"plain", "sharp"}
        assert [len(curve(client, item, "final_averaged/ap")) for item in found] == [1, 1]
        (ref.path / "mlflow.json").unlink()


@pytest.mark.ci
@pytest.mark.parametrize("gone", ["deleted", "purged"])
def test_what_was_deleted_in_mlflow_comes_back(store, toy_plan, toy_trainer, client, ref, gone):
    """Runs that somebody deleted are brought back, and made anew where they are gone for good."""
    specs = list(toy_plan.specs.values())
    for spec in specs[:2]:
        run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    child = runs_of(client, "trial")[specs[0].trial_id].info.run_id
    parent = runs_of(client, "plan")["plan"].info.run_id
    for deleted in (child, parent):
        client.delete_run(deleted)
    if gone == "purged":
        with sqlite3.connect(store.mlflow_database) as database:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table} WHERE run_uuid IN (?, ?)", (child, parent))
    path = store.trial_dir(specs[0].trial_id) / "attempts" / "0001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 99.0}))  # so that there is news of it
    for spec in specs[2:]:
        run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    children = runs_of(client, "trial")
    assert children.keys() == set(toy_plan.specs)
    assert [len(curve(client, item, "loss/total")) for item in children.values()] == [6] * 4
    assert {item.info.status for item in children.values()} == {"FINISHED"}
    assert runs_of(client, "plan")["plan"].info.status == "FINISHED"
    if gone == "deleted":
        assert children[specs[0].trial_id].info.run_id == child


@pytest.mark.ci
def test_a_database_that_was_removed_is_filled_again(store, toy_plan, toy_trainer, client, ref, empty_database):
    """The ids in mlflow.json name nothing in a new database: all goes to new runs."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = _everything(store)
    fresh = store.root / "fresh.db"
    fresh.write_bytes(empty_database.read_bytes())
    fresh.replace(store.mlflow_database)  # the client here has the old one open
    (ref.path / "verdicts.json").write_text('{"format": 1, "verdicts": []}')
    uri = f"{default_uri(store)}?new"  # which SQLite takes for the same file, and MLflow for another
    plain = json.loads((ref.path / "mlflow.json").read_text())
    (ref.path / "mlflow.json").write_text(json.dumps({**plain, "tracking_uri": uri}))
    assert sync(store, tracking_uri=uri, err=io.StringIO()) == 0
    assert _everything(store) == before


@pytest.mark.ci
def test_what_mlflow_refuses_of_one_trial_does_not_stop_the_others(store, toy_plan, toy_trainer, client, ref):
    """A parameter changed by hand and the like: told as a refusal, the other trials are all there."""
    from mlflow.exceptions import MlflowException

    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    bad = next(iter(toy_plan.specs))
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    log = api.log

    def refuse(run_id, *, points=(), **rest):
        if points and client.get_run(run_id).data.tags.get("trial_id") == bad:
            raise MlflowException("too bad", error_code=1000)  # INVALID_PARAMETER_VALUE
        log(run_id, points=points, **rest)

    api.log = refuse
    with pytest.raises(MlflowException, match="too bad"):
        sender.send(api, last=True)
    statuses = {trial_id: item.info.status for trial_id, item in runs_of(client, "trial").items()}
    assert statuses == {trial_id: "RUNNING" if trial_id == bad else "FINISHED" for trial_id in toy_plan.specs}
    assert runs_of(client, "plan")["plan"].info.status == "FINISHED"


@pytest.mark.ci
def test_an_edited_question_is_no_obstacle(store, toy_plan, toy_trainer, client, ref):
    """MLflow refuses to change a parameter; the run keeps the first wording when what was sent is forgotten."""
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=_unexpected).finish()
    (ref.path / "mlflow.json").unlink()
    edited = replace(toy_plan, study=replace(toy_plan.study, question="Does it?"))
    assert Mirror(store, ref, edited, tracking_uri=None, warn=_unexpected).finish()
    assert runs_of(client, "plan")["plan"].data.params["question"] == "Does a heavier box loss help?"


@pytest.mark.ci
def test_the_same_trial_trained_twice_has_two_runs(store, toy_plan, toy_trainer, client, ref, tmp_path):
    """Two machines that train the same plan on their own and share a server do not mix their points in one run."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    time.sleep(0.01)
    elsewhere = Store(tmp_path / "elsewhere")
    elsewhere.start_look(elsewhere.register(toy_plan, source=""), 1)
    run(spec, elsewhere, toy_trainer())
    assert sync(elsewhere, tracking_uri=default_uri(store), err=io.StringIO()) == 0
    (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
    found = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    assert [len(curve(client, item, "loss/total")) for item in found] == [6, 6]
    assert len({item.data.tags["mlflow.parentRunId"] for item in found}) == 2


@pytest.mark.slow
def test_drivers_that_make_the_database_at_once_make_one(tmp_path):
    """Two processes that open a database that is not there: neither fails, and both use the same."""
    code = (
        "import sys; from pathlib import Path; from workbench.mlflow_mirror.api import connect\n"
        "api = connect(sys.argv[1], artifacts=Path(sys.argv[2]))\n"
        "print(api.experiment('toy/smoke'))"
    )
    arguments = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new/mlflow.db", str(tmp_path / "artifacts")]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


def test_a_run_does_not_wait_for_a_server_that_never_answers(store, toy_plan, toy_trainer, ref, monkeypatch):
    """A server that takes the connection and says nothing: the command ends after the silence it allows, not later."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        monkeypatch.setattr("workbench.mlflow_mirror.mirror.SILENCE_SECONDS", 0.5)
        run(next(iter(toy_plan.specs.values())), store, toy_trainer())
        warnings = []
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        mirror = Mirror(store, ref, toy_plan, tracking_uri=uri, warn=warnings.append)
        began = time.monotonic()
        assert not mirror.finish()
        assert time.monotonic() - began < 15
        assert warnings == ["MLflow has not everything yet: `python -m workbench sync` brings it up to date."]


def test_a_stopped_run_waits_less(store, toy_plan, ref, monkeypatch):
    """After SIGTERM a batch system kills soon: the limit holds even while MLflow takes what it is sent."""
    api = SimpleNamespace(heard=0.0)

    def send(_self, _api, **_):
        for _ in range(400):
            time.sleep(0.05)
            api.heard = time.monotonic()

    monkeypatch.setattr("workbench.mlflow_mirror.mirror.connect", lambda *_, **__: api)
    monkeypatch.setattr(Sender, "send", send)
    began = time.monotonic()
    assert not Mirror(store, ref, toy_plan, tracking_uri=None, warn=lambda _: None).finish(limit=0.5)
    assert time.monotonic() - began < 10


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
