"""The batches of a training in order, perhaps read ahead by other processes.

Since a batch is a function of (seed, step), a worker only computes the batches of later steps: they are the same with
any number of workers.
"""

import pickle
import signal
from collections.abc import Generator
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from core.config import ExperimentConfig
from core.data.batching import training_parts
from core.data.pictures import DataSplits
from core.types import Batch


def step_parts(
    data: DataSplits, config: ExperimentConfig, *, seed: int, steps: range, rank: int, size: int, pin: bool
) -> Generator[tuple[Batch, ...]]:
    """Yield `training_parts` of each step; close the generator to end the `data_workers` before the last step.

    `pin` puts what workers read into page-locked memory, from where a GPU copies without waiting.
    """
    steps_ahead = _Steps(data, config, seed=seed, rank=rank, size=size)
    if not config.training.data_workers:
        for step in steps:
            yield steps_ahead.parts(step)
        return
    loader = DataLoader(
        steps_ahead,
        batch_size=None,
        sampler=steps,
        num_workers=config.training.data_workers,
        worker_init_fn=_begin_worker,
        pin_memory=pin,
    )
    ahead: Any = iter(loader)
    try:
        for sent in ahead:
            yield tuple(_received(*part) for part in sent)
    finally:
        ahead._shutdown_workers()  # torch has no public way; else they live as long as the traceback of an error


class _Steps(Dataset[Any]):
    """The parts of each step, as workers send them: targets in one piece, since each tensor costs a file descriptor."""

    def __init__(self, data: DataSplits, config: ExperimentConfig, *, seed: int, rank: int, size: int) -> None:
        self.data, self.config, self.seed, self.rank, self.size = data, config, seed, rank, size

    def parts(self, step: int) -> tuple[Batch, ...]:
        return training_parts(self.data, self.config, seed=self.seed, step=step, rank=self.rank, size=self.size)

    def __getitem__(self, step: int) -> list[tuple[Any, Any, bytes]]:
        return [(part.images, part.padding_mask, pickle.dumps(part.targets)) for part in self.parts(step)]


def _received(images: Any, padding_mask: Any, targets: bytes) -> Batch:
    return Batch(images=images, padding_mask=padding_mask, targets=pickle.loads(targets))


def _begin_worker(_: int) -> None:
    """Leave stopping to the training process, and its cores as well: a worker has one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(1)
