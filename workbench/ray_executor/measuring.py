"""Processes that measure on nodes of a cluster, used as those of this machine are (`workbench.probe`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from workbench.ray_executor.cluster import join
from workbench.ray_executor.output import output_to


@contextmanager
def processes(address: str, *, cores: int, gpus: float, log: Path) -> Iterator["_Processes"]:
    """Join a cluster for the block; each work gets so many cores and GPUs of a node. `log` takes what Ray prints.

    Raises:
        WorkbenchError: the cluster cannot be joined.
    """
    with output_to(log):
        join(address)
        try:
            yield _Processes(cores, gpus)
        finally:
            ray.shutdown()


class _Processes:
    def __init__(self, cores: int, gpus: float) -> None:
        # A process takes one work: what it measures begins as that of a trial does.
        self._run: Any = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=0, max_calls=1)(_call)

    def submit(self, work: Callable[..., Any], /, *arguments: Any) -> "_Reply":
        return _Reply(self._run.remote(work, *arguments))


@dataclass(frozen=True)
class _Reply:
    reference: Any

    def result(self) -> Any:
        """Wait for what the work returns.

        Raises:
            RuntimeError: the work raised, or its process or node died.
        """
        try:
            return ray.get(self.reference)
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            told = (str(cause).strip().splitlines() or [""])[0]
            raise RuntimeError(f"on a node of the cluster: {type(cause).__name__}: {told}") from error


def _call(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)
