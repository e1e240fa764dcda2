"""A session of Ray, of this machine's own or on a cluster, for as long as there are trials to run."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import worker

from workbench import disk
from workbench.budget import watching
from workbench.errors import WorkbenchError
from workbench.execution import Job
from workbench.ray_executor.cluster import join
from workbench.ray_executor.output import output_to
from workbench.ray_executor.room import Room
from workbench.ray_executor.search import search
from workbench.ray_executor.tuner import fit

_NO_ROOM_BYTES = 1_000_000

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
    shutil.rmtree(folder, ignore_errors=True)  # the first time there is none; one that stays is told by `mkdir`
    folder.mkdir(parents=True)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    with output_to(folder / "ray.log"):
        join(job.address, cores=job.resources.cores)
        try:
            if job.stop.wanted():
                return  # it came while Ray started
            room = Room(job.resources.demand, tell=job.tell)
            with watching(() if job.address is None else (room.check,), job.stop), _full_disk_in_words():
                if job.searching is None:
                    fit(job, folder)
                else:
                    search(job, job.searching, folder)
        finally:
            ray.shutdown()


@contextmanager
def _full_disk_in_words() -> Iterator[None]:
    """Say within the block that the disk is full on which Ray keeps its session, which need not be that of the records.

    Raises:
        WorkbenchError: instead of an error that names no file.
    """
    node: Any = worker._global_node  # this process's, since it has joined
    session = Path(node.get_session_dir_path())
    try:
        yield
    except OSError as error:
        if error.errno not in disk.FULL or shutil.disk_usage(session).free > _NO_ROOM_BYTES:
            raise
        raise WorkbenchError(
            f"{session}: no space left on the disk where Ray keeps its session. What is on record is whole; make room, "
            "or set RAY_TMPDIR to a folder with a short name on another disk, then give the same command again"
        ) from error
