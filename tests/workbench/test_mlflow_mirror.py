"""What is sent to MLflow: all of a study, truthfully, once, while it grows. A real embedded database."""

import io
from dataclasses import replace

import pytest
from mirroring import api_of, curve, fail, run, runs_of, sender_of, unexpected

from core.events import StepsTaken
from workbench import driving
from workbench.durable import EventWriter
from workbench.errors import WorkbenchError
from workbench.mirror_content import milliseconds
from workbench.mlflow_mirror import Mirror, sync
from workbench.options import Options
from workbench.runner import run_study
from workbench.verdict import judge

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that MLflow imports


@pytest.mark.ci
def test_a_finished_study_is_all_there(store, toy_plan, toy_trainer, client, ref):
    """Parent and children have parameters, tags, curves, files, verdicts and truthful statuses."""
    for trial, trainer in zip(
        toy_plan.trials,
        (toy_trainer(), toy_trainer(outcome="diverged"), toy_trainer(before_step=fail), toy_trainer()),
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
def test_a_run_that_ends_by_an_error_is_not_shown_as_running(store, toy_plan, client, monkeypatch):
    """What the executor raises ends the run in MLflow, too."""

    def broken(_job):
        raise WorkbenchError("the cluster is gone")

    monkeypatch.setattr(driving, "run_inline", broken)
    with pytest.raises(WorkbenchError, match="the cluster is gone"):
        run_study(toy_plan, store, Options(executor="inline"), out=io.StringIO(), err=io.StringIO())
    (parent,) = runs_of(client, "plan").values()
    assert parent.info.status == "KILLED"


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
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=unexpected).finish()
    child = runs_of(client, "trial")[spec.trial_id]
    assert child.info.status == "FINISHED"
    assert curve(client, child, "averaged/ap") == [(2, 0.02), (4, 0.04), (6, 0.06)]


@pytest.mark.ci
def test_steps_that_happen_again_are_sent_once(store, toy_plan, toy_trainer, client, ref):
    """After a kill the steps since the checkpoint are trained again; MLflow keeps each point once, and one run."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer(before_step=lambda step: fail(step, at=4)))  # the last checkpoint is of step 2
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=unexpected).finish()
    assert runs_of(client, "trial")[spec.trial_id].info.status == "FAILED"
    run(spec, store, toy_trainer())
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=unexpected).finish()
    child = runs_of(client, "trial")[spec.trial_id]
    assert child.info.status == "FINISHED"
    assert curve(client, child, "loss/total") == [(step, 2 / step) for step in range(1, 7)]


@pytest.mark.ci
def test_numbers_that_are_none_are_not_sent(store, toy_plan, toy_trainer, client, ref):
    """An infinite loss, which MLflow would draw as 1.8e308, is left out; the rest of the event is kept."""
    spec = next(iter(toy_plan.specs.values()))
    run(spec, store, toy_trainer())
    last = next(item.event for item in store.events(spec.trial_id) if isinstance(item.event, StepsTaken))
    writer = EventWriter(store.trial_dir(spec.trial_id) / "events.jsonl", attempt=1)
    writer.append(replace(last, step=9, losses={"total": float("inf")}, grad_norm=float("nan"), learning_rate=0.25))
    writer.close()
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=unexpected).finish()
    child = runs_of(client, "trial")[spec.trial_id]
    assert curve(client, child, "learning_rate")[-1] == (9, 0.25)
    assert curve(client, child, "loss/total")[-1][0] == 6


@pytest.mark.ci
def test_afailed_trial_that_is_tried_again_has_no_stale_marks(store, toy_plan, toy_trainer, client, ref):
    """Its run is FAILED with its error and end; then RUNNING with neither; then FINISHED, all at the times recorded."""
    spec = next(iter(toy_plan.specs.values()))
    sender, api = sender_of(store, ref, toy_plan), api_of(client, store)
    run(spec, store, toy_trainer(before_step=lambda step: fail(step, at=4)))
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
        assert Mirror(store, ref, plan, tracking_uri=None, warn=unexpected).finish()
        (experiment,) = [item for item in client.search_experiments() if item.name == "toy/smoke"]
        found = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
        assert {item.data.tags["variant"] for item in found} == {"plain", "sharp"}
        assert [len(curve(client, item, "final_averaged/ap")) for item in found] == [1, 1]
        (ref.path / "mlflow.json").unlink()


@pytest.mark.ci
def test_an_edited_question_is_no_obstacle(store, toy_plan, toy_trainer, client, ref):
    """MLflow refuses to change a parameter; the run keeps the first wording when what was sent is forgotten."""
    assert Mirror(store, ref, toy_plan, tracking_uri=None, warn=unexpected).finish()
    (ref.path / "mlflow.json").unlink()
    edited = replace(toy_plan, study=replace(toy_plan.study, question="Does it?"))
    assert Mirror(store, ref, edited, tracking_uri=None, warn=unexpected).finish()
    assert runs_of(client, "plan")["plan"].data.params["question"] == "Does a heavier box loss help?"
