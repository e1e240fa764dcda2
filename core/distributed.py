"""Several processes that train one detector together: each takes its slice of every step's pictures.

Who starts the processes also calls `torch.distributed.init_process_group` (gloo or nccl; with nccl, also
`torch.cuda.set_device`) and hands each its `World`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Generator, Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from core.types import Batch, Detector, LossTerm

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Process `rank` of `size` in torch's default process group; one process alone needs no group."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size} processes: ranks are 0 to {max(self.size - 1, 0)}")
        if self.size > 1 and not distributed.is_initialized():
            raise ValueError(
                f"{self.size} processes need a process group: call torch.distributed.init_process_group first"
            )
        if self.size > 1 and (distributed.get_rank(), distributed.get_world_size()) != (self.rank, self.size):
            raise ValueError(
                f"rank {self.rank} of {self.size} processes, but the process group says rank "
                f"{distributed.get_rank()} of {distributed.get_world_size()}: pass the group's own numbers"
            )

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every process, by rank; each of them must call this, and gets the same list."""
        if self.size == 1:
            return [value]
        values: list[Value] = [value] * self.size
        distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a FloatingPointError of one process be raised in all, so that none waits for one that has left."""
        own: FloatingPointError | None = None
        try:
            yield
        except FloatingPointError as error:
            own = error
        problems = [problem for problem in self.gather(None if own is None else str(own)) if problem is not None]
        if problems:
            raise FloatingPointError(problems[0]) from own


ALONE = World()


class StepLoss(nn.Module):
    """A detector's loss as a forward pass, which is what DistributedDataParallel can wrap."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch, generator: Generator) -> tuple[Tensor, tuple[LossTerm, ...]]:
        """Return the weighted sum of the loss terms, fp32, and the terms."""
        terms = self.detector.loss(batch, generator)
        values = torch.stack([term.value.float() for term in terms])
        return (values * _constants(tuple(term.weight for term in terms), values.device)).sum(), terms


@lru_cache(maxsize=8)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a tensor that is copied to the device once, not every step."""
    return torch.tensor(values, device=device)


def step_loss(detector: Detector, world: World) -> nn.Module:
    """Wrap the detector's loss so that backward sums no more than this process's gradient, or averages over all.

    Unused parameters are looked for: whether each takes part depends on the toggles (no auxiliary losses: the earlier
    heads rest) and on the pictures (denoising without a box), and may differ between processes. Running statistics of
    a batch norm that is not frozen are of each process's own pictures; those of rank 0 are sent to all before each
    step, and are those that a checkpoint holds. SyncBatchNorm exists on GPUs only, and is not used.
    """
    loss = StepLoss(detector)
    if world.size == 1:
        return loss
    return DistributedDataParallel(loss, find_unused_parameters=True, gradient_as_bucket_view=True)


def unsynchronised(loss: nn.Module) -> AbstractContextManager[None]:
    """Let backward passes within the block add to this process's gradient only."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()
