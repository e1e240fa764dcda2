"""Runs folders for the dashboard's tests: study results put on record the way trials and drivers do it."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.events import TrainingStarted
from workbench import attempts, durable, trial
from workbench.records import StudyResults, TrialRecord
from workbench.store import Store
from workbench.verdict import judge

RUNNING = {"detached": [0.31, 0.32], "kept": [0.335, 0.34], "off": [0.25]}
FINISHED = {
    "detached": [0.310, 0.320, 0.300, 0.315, 0.305],
    "kept": [0.352, 0.349, 0.351, 0.347, 0.353],
    "off": [0.312, 0.318, 0.302, 0.311, 0.307],
}


def _write_trial(store: Store, record: TrialRecord) -> None:
    folder = store.trial_dir(record.trial_id)
    if record.state == "pending":
        return
    attempt = attempts.begin(folder, driver=None)  # a running trial is one whose attempt, this process, goes on
    events = durable.EventWriter(folder / "events.jsonl", attempt=attempt.number)
    events.append(
        TrainingStarted(
            step=0,
            total_steps=record.total_steps or 1,
            total_epochs=4,
            num_parameters=1,
            threads=1,
            device="cpu",
            process_id=1,
        )
    )
    for epoch in record.epochs:
        events.append(epoch)
    events.close()
    for eval_id, metrics in record.metrics.items():
        path = store.evaluation_dir(record.trial_id, eval_id) / "metrics.json"
        durable.write_json(path, {"eval_id": eval_id, "metrics": metrics.to_json()})
    if record.state == "failed":
        trial.write_error(
            folder, kind="io", error_type="OSError", message="no space left on device", attempt=1, step=1, trace=""
        )
    if record.state in ("finished", "diverged"):
        result = {
            "trial_id": record.trial_id,
            "outcome": record.state,
            "reason": "the loss is not finite at step 190" if record.state == "diverged" else None,
            "seconds": record.seconds,
            "total_seconds": record.total_seconds,
            "finished_at": durable.now(),
            **(record.result or {}),
        }
        durable.write_json(folder / "result.json", result)
    if record.state != "running":
        attempts.end(folder, attempt, outcome=record.state, seconds=record.total_seconds, cpu_seconds=1.0)


@pytest.fixture(scope="session")
def write_runs():
    """Return a writer of study results into a runs folder, with the verdicts of a complete look."""

    def write(folder: Path, results: StudyResults, *, profile: str = "laptop", mirrored: bool = False) -> StudyResults:
        plan = replace(results.plan, study=replace(results.plan.study, profile=profile))
        results = replace(results, plan=plan)
        store = Store(folder)
        ref = store.register(plan, source="")
        store.start_look(ref, results.looks_started)
        for record in results.records.values():
            if not store.trial_dir(record.trial_id).exists():
                _write_trial(store, record)
        if all(
            results.records[t.trial_id].state in ("finished", "diverged") for t in plan.at_look(plan.study.looks[0])
        ):
            results = replace(results, verdicts=judge(results))
            store.save_verdicts(ref, results.verdicts)
        if mirrored:
            runs = {trial_id: f"run-{trial_id}" for trial_id in plan.specs}
            uri = f"sqlite:///{store.mlflow_database}"
            mirror = {"tracking_uri": uri, "experiment_id": "7", "parent_run_id": "parent", "runs": runs}
            durable.write_json(ref.path / "mlflow.json", mirror)
        return results

    return write


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory, fake_results, write_runs):
    """Return a runs folder with one study whose first look is complete: supported, then equivalent."""
    folder = tmp_path_factory.mktemp("finished")
    write_runs(folder, fake_results(FINISHED), mirrored=True)
    return folder


@pytest.fixture(scope="session")
def running_runs(tmp_path_factory, fake_results, write_runs):
    """Return a runs folder with one study under way: a trial runs, one failed, one diverged, one was interrupted."""
    folder = tmp_path_factory.mktemp("running")
    states = {("off", 1): "running", ("detached", 2): "failed", ("kept", 2): "diverged", ("off", 2): "interrupted"}
    write_runs(folder, fake_results(RUNNING, states=states))
    return folder
