"""What `sync` makes up for: whatever is lost here, on the way or in MLflow, is there once. A real embedded database."""

import io
import shutil
import time
from dataclasses import replace

import pytest
from mirroring import all_runs, api_of, curve, everything, purge, run, runs_of, sender_of

from workbench import durable
from workbench.mlflow_mirror import default_uri, sync
from workbench.store import Store

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that MLflow imports
]


def test_sync_replays_exactly_once(store, toy_plan, toy_trainer, client, ref):
    """Replaying everything, even with the memory of what was sent lost, adds no run and no point."""
    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = everything(store)
    (ref.path / "mlflow.json").unlink()
    assert sync(store, err=io.StringIO()) == 0
    assert everything(store) == before
    assert before["metrics"] > 100


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "tracking_uri": 3, "runs": 5}'])
def test_a_damaged_memory_of_what_was_sent_is_none(store, toy_plan, toy_trainer, client, ref, text):
    """`sync` without an address goes to the embedded database again, and adds nothing."""
    run(next(iter(toy_plan.specs.values())), store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = everything(store)
    (ref.path / "mlflow.json").write_text(text)
    assert sync(store, err=io.StringIO()) == 0
    assert everything(store) == before


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
    (child,) = all_runs(client, "trial")
    assert (child.info.status, child.data.params["training.epochs"]) == ("FINISHED", "1")


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
    attempt = durable.read_json(path)
    attempt["worker"]["started"] = 1  # another process of this number
    durable.write_json(path, attempt)
    assert store.state(spec.trial_id) == "interrupted"
    assert sync(store, err=io.StringIO()) == 0
    child = runs_of(client, "trial")[spec.trial_id]
    assert (child.info.status, child.data.tags["state"]) == ("KILLED", "interrupted")
    assert runs_of(client, "plan")["plan"].info.status == "KILLED"


@pytest.mark.parametrize("gone", ["runs deleted", "experiment deleted", "run purged"])
def test_what_was_deleted_in_mlflow_comes_back(store, toy_plan, toy_trainer, client, ref, gone):
    """`sync` asks MLflow, though nothing is new here: what was deleted is brought back, or made anew, once."""
    specs = list(toy_plan.specs.values())
    for spec in specs:
        run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = everything(store)
    child, parent = runs_of(client, "trial")[specs[0].trial_id], runs_of(client, "plan")["plan"]
    if gone == "experiment deleted":
        client.delete_experiment(child.info.experiment_id)
    elif gone == "runs deleted":
        client.delete_run(child.info.run_id)
        client.delete_run(parent.info.run_id)
    else:
        purge(store, child)
    assert sync(store, err=io.StringIO()) == 0
    assert everything(store) == before
    children = all_runs(client, "trial")
    assert {item.data.tags["trial_id"] for item in children} == set(toy_plan.specs)
    assert [len(curve(client, item, "loss/total")) for item in children] == [6] * 4
    assert {item.info.status for item in (*children, *all_runs(client, "plan"))} == {"FINISHED"}
    assert len(all_runs(client, "plan")) == 1


def test_a_run_that_is_purged_while_its_trial_trains_is_made_anew(store, toy_plan, toy_trainer, client, ref):
    """The driver that found it goes on: all points go to one new run."""
    spec = next(iter(toy_plan.specs.values()))
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)

    def look(step):
        if step == 3:
            sender_of(store, ref, toy_plan).send(api, last=False)
        if step in (4, 6):
            sender.send(api, last=False)
        if step == 5:
            purge(store, runs_of(client, "trial")[spec.trial_id])

    run(spec, store, toy_trainer(before_step=look))
    sender.send(api, last=True)
    (child,) = all_runs(client, "trial")
    assert child.info.status == "FINISHED"
    assert child.data.params["training.epochs"] == "1"
    assert [len(curve(client, child, name)) for name in ("loss/total", "final_averaged/ap")] == [6, 1]


def test_a_database_that_was_removed_is_filled_again(store, toy_plan, toy_trainer, client, ref, empty_database):
    """The ids in mlflow.json name nothing in a new database: all goes to new runs, though nothing is new here."""
    for spec in toy_plan.specs.values():
        run(spec, store, toy_trainer())
    uri = f"{default_uri(store)}?new"  # which SQLite takes for the same file, and MLflow for another
    assert sync(store, tracking_uri=uri, err=io.StringIO()) == 0
    before = everything(store)
    fresh = store.root / "fresh.db"
    fresh.write_bytes(empty_database.read_bytes())
    fresh.replace(store.mlflow_database)  # this process has the old one open
    uri = f"{default_uri(store)}?newer"
    durable.write_json(ref.path / "mlflow.json", {**durable.read_json(ref.path / "mlflow.json"), "tracking_uri": uri})
    assert sync(store, tracking_uri=uri, err=io.StringIO()) == 0
    assert everything(store) == before


def test_a_run_that_was_made_and_got_nothing_gets_all(store, toy_plan, toy_trainer, client, ref):
    """When a driver dies between making a run and the first points, the next one sends parameters too."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    sender.send(api, last=False)
    expected = runs_of(client, "trial")[spec.trial_id].data.params
    assert expected["training.epochs"] == "1"
    other = list(toy_plan.specs.values())[1]
    run(other, store, toy_trainer())

    def lose(*_, **__):
        raise ConnectionError("the server is gone")

    api.log = lose
    with pytest.raises(ConnectionError):
        sender.send(api, last=False)
    assert runs_of(client, "trial")[other.trial_id].data.params == {}
    assert sync(store, err=io.StringIO()) == 0
    assert runs_of(client, "trial")[other.trial_id].data.params.keys() == expected.keys()


def test_a_trial_that_was_removed_and_began_again_has_a_run_of_its_own(store, toy_plan, toy_trainer, client, ref):
    """Its points are those of one training, not the first half of one and the end of another."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    (first,) = all_runs(client, "trial")
    shutil.rmtree(store.trial_dir(spec.trial_id))
    time.sleep(0.01)
    run(spec, store, toy_trainer())
    for _ in range(2):
        assert sync(Store(store.root), err=io.StringIO()) == 0
    again = {item.info.run_id: item for item in all_runs(client, "trial")}
    assert len(again) == 2
    assert [len(curve(client, item, "loss/total")) for item in again.values()] == [6, 6]
    assert [len(curve(client, item, "final_averaged/ap")) for item in again.values()] == [1, 1]
    assert store.results(ref).mlflow["runs"][spec.trial_id] in again.keys() - {first.info.run_id}


def test_a_trial_that_is_trained_again_to_be_scored_has_its_scores_once(store, toy_plan, toy_trainer, client, ref):
    """Another study asks for another evaluation when the checkpoint is gone: the result is new, the point is not."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    assert sync(store, err=io.StringIO()) == 0
    before = everything(store)
    (store.trial_dir(spec.trial_id) / "checkpoints" / "toy.json").unlink()
    time.sleep(0.01)
    evaluation = next(iter(spec.evaluations.values()))
    run(replace(spec, evaluations=spec.evaluations | {"0123456789ab": evaluation}), store, toy_trainer())
    assert store.record(spec.trial_id).attempts == 2
    for forgets in (False, True):
        if forgets:
            (ref.path / "mlflow.json").unlink()
        assert sync(store, err=io.StringIO()) == 0
        assert everything(store)["metrics"] == before["metrics"]
        (child,) = all_runs(client, "trial")
        assert child.data.tags["attempts"] == "2"


def test_credentials_go_to_no_server_that_only_a_file_names(store, toy_plan, toy_trainer, monkeypatch):
    """`sync` takes the address from a study's file as `run` does, and asks for the same confirmation."""
    uri = "http://127.0.0.1:9"
    ref = store.register(replace(toy_plan, study=replace(toy_plan.study, tracking_uri=uri)), source="")
    run(next(iter(toy_plan.specs.values())), store, toy_trainer())
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "very-secret-token")
    for options, words in (({}, "would be sent MLFLOW_TRACKING_TOKEN"), ({"tracking_uri": uri}, "cannot be reached")):
        err = io.StringIO()
        assert sync(store, err=err, **options) == 1
        assert words in err.getvalue()
        assert "very-secret" not in err.getvalue()
        assert not (ref.path / "mlflow.json").exists()


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
