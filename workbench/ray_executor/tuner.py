"""Trials as processes under Ray Tune, on this machine or a cluster.

Ray places processes and notices their death; it is not the record. Every call builds a fresh Tuner over one grid axis,
the trials; each resumes from its own checkpoint. An actor of Ray is a slot (`workbench.slots`) that takes trial after
trial, each in a process of its own. When an actor dies, as with its machine, Ray gives its trial to another one.
"""

import os
import time
from pathlib import Path
from typing import Any

from ray import tune

from workbench.execution import Job
from workbench.ray_executor import several
from workbench.ray_executor.orphans import end_with_raylet
from workbench.retrying import at_work
from workbench.slots import Slot, Task, task_for
from workbench.store import Store
from workbench.study import TrialSpec

GRACE_SECONDS = 60.0
"""How long trials may take to finish a step and write a checkpoint once a stop is asked for."""


def per_trial(job: Job) -> dict[str, float]:
    """Return what the slot of a trial asks of Ray."""
    demand = job.resources.demand
    if demand.nodes > 1:
        return dict(several.SUPERVISOR)
    return {"cpu": demand.cores_a_node, "gpu": demand.gpus * demand.processes}


def fit(job: Job, folder: Path) -> None:
    """Run trials that are all known."""
    task = task_for(
        job,
        logs=folder,
        trainer=several.trainer_for(job.resources.demand, job),
        canary=job.specs[0].trial_id,
        should_stop=job.stop.path.exists,
    )
    trainable = tune.with_parameters(_Actor, task=task, specs={spec.trial_id: spec for spec in job.specs})
    tuner = tune.Tuner(
        tune.with_resources(trainable, per_trial(job)),
        param_space={"trial_id": tune.grid_search([spec.trial_id for spec in job.specs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=job.resources.concurrency,
            reuse_actors=True,  # a trial is a process of its own, so nothing is left of it in the actor
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=run_config(job, folder, stop=StopWhenAsked(job)),
    )
    tuner.fit()


def run_config(job: Job, folder: Path, *, stop: tune.Stopper) -> tune.RunConfig:
    """Return how Tune goes about trials whose record is not its own."""
    return tune.RunConfig(
        name=f"{int(time.time())}-{os.getpid()}",
        storage_path=str(folder),
        verbose=0,
        log_to_file=True,
        # What becomes of a trial is on record and does not reach Ray: what fails here is an actor that died.
        failure_config=tune.FailureConfig(max_failures=job.execution.retries),
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
        stop=stop,
    )


class _Actor(tune.Trainable):
    """A slot in an actor of Ray."""

    def setup(
        self, config: dict[str, Any], *, task: Task | None = None, specs: dict[str, TrialSpec] | None = None
    ) -> None:
        assert task is not None  # always given, both; Tune's own signature has only the config
        assert specs is not None
        end_with_raylet()
        self._trial_id, self._specs = config["trial_id"], specs
        self._slot = Slot(task)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial_id = new_config["trial_id"]
        return True

    def step(self) -> dict[str, Any]:
        self._slot.run(self._specs[self._trial_id])
        return {"done": True}

    def cleanup(self) -> None:
        self._slot.close()


def trial_name(trial: Any) -> str:
    """Return how Tune calls a trial: by our id."""
    return trial.config["trial_id"]


class StopWhenAsked(tune.Stopper):
    """Ends the whole Tuner once a stop is asked for and no trial is at work any more, or the time of grace is over."""

    def __init__(self, job: Job) -> None:  # plain values: Tune pickles it
        self._stop_file, self._runs, self._driver = job.stop.path, job.runs, job.driver
        self._trial_ids = [spec.trial_id for spec in job.specs]
        self._deadline: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002 - Tune's signature
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Tell whether everything has stopped as asked, or has had its time."""
        if not self._stop_file.exists():
            return False
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS
        store = Store(self._runs)
        working = any(at_work(store, trial_id, self._driver) for trial_id in self._trial_ids)
        return not working or time.monotonic() > self._deadline
