"""Trials as processes under Ray Tune, on this machine or a cluster.

Ray places processes and notices their death; it is not the record. Every call builds a fresh Tuner over one grid axis,
the trials; each resumes from its own checkpoint. An actor of Ray is a slot (`workbench.slots`) that takes trial after
trial, each in a process of its own. When an actor dies, as with its machine, Ray gives its trial to another one.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray._private import ray_constants

from workbench.errors import WorkbenchError
from workbench.execution import Job
from workbench.slots import Slot, Task, task_for
from workbench.store import Store
from workbench.study import TrialSpec

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
        WorkbenchError: the cluster can never satisfy what a trial asks for (Ray itself would wait for ever).
    """
    folder = job.folder / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    with _output_to(folder / "ray.log"):
        _start(job)
        try:
            job.stop.install()  # Ray has taken SIGTERM, and would abort
            _check_resources(job)
            if job.searching is None:
                _fit(job, folder)
            else:
                from workbench.ray_executor.search import search  # which builds on this module

                search(job, job.searching, folder)
        finally:
            ray.shutdown()


def _start(job: Job) -> None:
    listen_to_others(allowed=job.address is not None)
    if job.address is not None:
        ray.init(address=job.address, logging_level=logging.ERROR, log_to_driver=False)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of one, which only this machine can reach
    try:
        ray.init(
            address="local",
            num_cpus=job.resources.cores,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=100 * 1024**2,
        )
    except (OSError, RuntimeError, ValueError) as error:  # no room, no loopback, names of sockets too long, ...
        raise WorkbenchError(
            f"Ray cannot be started here ({str(error).strip().splitlines()[0]}): `python -m workbench doctor` says "
            "what this machine lacks, and run --executor inline goes without Ray"
        ) from error


def listen_to_others(*, allowed: bool) -> None:
    """Let what Ray starts from here on be reached from other machines, or bind it all to loopback.

    On Linux Ray listens to every network, also for one machine, where no token guards it. Its switch for systems
    without clusters makes it use loopback; this process has read it already, those that it starts will.
    """
    ray_constants.ENABLE_RAY_CLUSTER = allowed
    if allowed:
        os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, None)
    else:
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"


def _check_resources(job: Job) -> None:
    wanted, available = _per_trial(job), ray.cluster_resources()
    for name, ray_name in (("cpu", "CPU"), ("gpu", "GPU")):
        if wanted[name] > available.get(ray_name, 0):
            raise WorkbenchError(
                f"a trial asks for {wanted[name]} {ray_name}, and Ray offers {available.get(ray_name, 0):g}: "
                "lower training.threads, or name a cluster with --address"
            )


def _per_trial(job: Job) -> dict[str, float]:
    return {"cpu": job.resources.threads, "gpu": 1 if job.resources.device == "cuda" else 0}


def _fit(job: Job, folder: Path) -> None:
    task = task_for(job, logs=folder, canary=job.specs[0].trial_id, should_stop=job.stop.path.exists)
    trainable = tune.with_parameters(_Actor, task=task, specs={spec.trial_id: spec for spec in job.specs})
    tuner = tune.Tuner(
        tune.with_resources(trainable, _per_trial(job)),
        param_space={"trial_id": tune.grid_search([spec.trial_id for spec in job.specs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=None if job.address else job.resources.concurrency,
            reuse_actors=True,  # a trial is a process of its own, so nothing is left of it in the actor
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"{int(time.time())}-{os.getpid()}",
            storage_path=str(folder),
            verbose=0,
            log_to_file=True,
            # What becomes of a trial is on record and does not reach Ray: what fails here is an actor that died.
            failure_config=tune.FailureConfig(max_failures=job.execution.retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            stop=_StopWhenAsked(job),
        ),
    )
    tuner.fit()


class _Actor(tune.Trainable):
    """A slot in an actor of Ray."""

    def setup(
        self, config: dict[str, Any], *, task: Task | None = None, specs: dict[str, TrialSpec] | None = None
    ) -> None:
        assert task is not None  # always given, both; Tune's own signature has only the config
        assert specs is not None
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


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process prints, Ray's native code included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with log.open("ab") as file:
        for number in saved:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)
