"""Trials as processes under Ray Tune, on this machine or a cluster.

Ray places processes and notices their death; it is not the record. Every call builds a fresh Tuner over one grid axis,
the trials; each resumes from its own checkpoint. On a CPU an actor of Ray is a slot that takes trial after trial; each
runs in a fork of the slot's template (`workbench.template`), so no number depends on what ran before it. Elsewhere each
trial has an actor of its own: on a GPU forking was never tried.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune

from workbench.execution import Job
from workbench.ray_executor import several
from workbench.ray_executor.cluster import join
from workbench.ray_executor.orphans import end_with_raylet
from workbench.ray_executor.output import output_to
from workbench.store import Store
from workbench.study import TrialSpec
from workbench.template import AVAILABLE, Template
from workbench.trial import execute

GRACE_SECONDS = 60.0
"""How long trials may take to finish a step and write a checkpoint once a stop is asked for."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_on_ray(job: Job) -> None:
    """Run the trials as processes, as many at once as the cores allow; returns when all have ended or a stop was asked.

    Raises:
        WorkbenchError: the cluster cannot be joined.
    """
    folder = job.folder / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    with output_to(folder / "ray.log"):
        join(job.address, cores=job.resources.cores)
        try:
            job.stop.install()  # Ray has taken SIGTERM, and would abort
            _fit(job, folder)
        finally:
            ray.shutdown()


def _per_trial(job: Job) -> dict[str, float]:
    demand = job.resources.demand
    if demand.nodes > 1:
        return dict(several.SUPERVISOR)
    return {"cpu": demand.cores_a_node, "gpu": demand.gpus * demand.processes}


def _fit(job: Job, folder: Path) -> None:
    demand = job.resources.demand
    forks = AVAILABLE and demand.device == "cpu" and demand.nodes == 1
    task = _Task(
        specs={spec.trial_id: spec for spec in job.specs},
        logs=folder if forks else None,
        run=partial(
            execute,
            runs=job.runs,
            should_stop=job.stop.path.exists,
            device=job.resources.device,
            driver=job.driver,
            allow_code=job.allow_code,
            trainer=several.trainer_for(demand, job),
            placement=demand.to_json(),
        ),
    )
    trainable = tune.with_parameters(_Slot, task=task)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _per_trial(job)),
        param_space={"trial_id": tune.grid_search([spec.trial_id for spec in job.specs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=job.resources.concurrency,
            reuse_actors=forks,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"{int(time.time())}-{os.getpid()}",
            storage_path=str(folder),
            verbose=0,
            log_to_file=True,
            # What a trial raises is on record and does not reach Ray, so what fails here is a process that died.
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            stop=_StopWhenAsked(job),
        ),
    )
    tuner.fit()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What every slot is given: the trials, where forks print (None: no forks), and how to run one."""

    specs: dict[str, TrialSpec]
    logs: Path | None
    run: Callable[[TrialSpec], Any]


class _Slot(tune.Trainable):
    """An actor in a process of its own: one trial after another, each in a fork, or a single one in the actor."""

    def setup(self, config: dict[str, Any], *, task: _Task | None = None) -> None:
        assert task is not None  # always given; Tune's own signature has only the config
        end_with_raylet()
        self._trial_id, self._task = config["trial_id"], task
        self._template = Template(log=task.logs / f"slot-{os.getpid()}.log") if task.logs else None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial_id = new_config["trial_id"]
        return True

    def step(self) -> dict[str, Any]:
        work = partial(self._task.run, self._task.specs[self._trial_id])
        if self._template is None:
            work()
        else:
            self._template.run(work)
        return {"done": True}

    def cleanup(self) -> None:
        if self._template is not None:
            self._template.close()


def _trial_name(trial: Any) -> str:
    return trial.config["trial_id"]


class _StopWhenAsked(tune.Stopper):
    """Ends the whole Tuner once a stop is asked for and no trial is at work any more, or the time of grace is over."""

    def __init__(self, job: Job) -> None:  # plain values: Tune pickles it
        self._stop_file, self._runs = job.stop.path, job.runs
        self._trial_ids = [spec.trial_id for spec in job.specs]
        self._deadline: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002 - Tune's signature
        return False

    def stop_all(self) -> bool:
        if not self._stop_file.exists():
            return False
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS
        store = Store(self._runs)
        working = any(store.state(trial_id) == "running" for trial_id in self._trial_ids)
        return not working or time.monotonic() > self._deadline
