"""Train one detector from a config and a seed, with events, checkpoints and resumption.

What a trial computes depends on its config, seed and pictures alone. Every source of chance has a stream of its own,
keyed by the step or the picture, so nothing about generators needs saving: on a CPU a resumed trial equals an
unbroken one bit for bit.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from core.checkpoint import load_newest, weights_hash
from core.checkpoint_files import PassedOver
from core.config import ExperimentConfig
from core.data.batching import subset_indices
from core.data.splits import DataSplits
from core.distributed import ALONE, World
from core.evaluation.score import score
from core.events import (
    CheckpointPassedOver,
    CheckpointSaved,
    Diverged,
    EpochFinished,
    Event,
    StepsTaken,
    TrainingStarted,
)
from core.memory import peak_memory_bytes, reset_peak_memory
from core.metrics import Metrics
from core.trainer import Sums, Trainer

REPORT_SECONDS = 5.0  # of training between two StepsTaken


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a training ended. `checkpoint` is the last one; `weights_hash` is of the raw weights in it."""

    outcome: Literal["finished", "diverged", "interrupted"]
    reason: str
    step: int
    seconds: float
    weights_hash: str
    peak_memory_bytes: int
    checkpoint: Path | None
    num_parameters: int


def train(
    config: ExperimentConfig,
    *,
    seed: int,
    data: DataSplits,
    checkpoints: Path,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    device: torch.device,
    world: World = ALONE,
) -> TrainResult:
    """Train to the end, from the newest valid checkpoint in `checkpoints` if there is one.

    `should_stop` is asked after every step, and after every batch that is scored, by which one can tell that the work
    goes on; when it says so after a step, a checkpoint is written and the outcome is `interrupted`.
    A loss or gradient that is not finite ends the trial as `diverged`. Several processes (`world`) train one detector:
    the first writes checkpoints and events and scores; all read the checkpoints, and all stop when one is asked to.
    """
    reset_peak_memory(device)
    trainer = Trainer(config, seed=seed, data=data, device=device, world=world)
    try:
        return _Training(trainer, checkpoints, on_event if world.rank == 0 else _ignore, should_stop).run()
    finally:
        trainer.close()


def _ignore(_: Event) -> None:
    """Leave the telling to the first process."""


class _Training:
    """The loop over epochs of one process, with what it tells and writes."""

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Path,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.trainer, self.checkpoints, self.on_event = trainer, checkpoints, on_event
        self._asked_to_stop = should_stop

    def run(self) -> TrainResult:
        trainer, config = self.trainer, self.trainer.config
        damaged: list[PassedOver] = []
        found = load_newest(self.checkpoints, on_passed_over=damaged.append if trainer.world.rank == 0 else None)
        if found is not None:
            trainer.restore(found[0])
        steps = trainer.world.gather(trainer.num_step)
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"{self.checkpoints}: the processes found checkpoints of steps {steps}, by rank: give all of them one "
                "folder that they share"
            )
        self.on_event(
            TrainingStarted(
                step=trainer.num_step,
                total_steps=trainer.total_steps,
                total_epochs=config.training.epochs,
                num_parameters=_num_parameters(trainer.detector),
                threads=config.training.threads,
                device=str(trainer.device),
                process_id=os.getpid(),
            )
        )
        for one in damaged:
            self.on_event(CheckpointPassedOver(step=trainer.num_step, path=one.name, reason=one.reason))
        checkpoint = found[1] if found is not None else None
        outcome, reason = "finished", ""
        try:
            while trainer.num_step < trainer.total_steps:
                checkpoint, stopped = self._epoch()
                if stopped and trainer.num_step < trainer.total_steps:
                    outcome, reason = "interrupted", "asked to stop"
                    break
        except FloatingPointError as error:
            outcome, reason = "diverged", str(error)
            self.on_event(Diverged(step=trainer.num_step, reason=reason))
        return TrainResult(
            outcome=outcome,
            reason=reason,
            step=trainer.num_step,
            seconds=trainer.seconds,
            weights_hash=weights_hash(trainer.detector.state_dict()),
            peak_memory_bytes=peak_memory_bytes(trainer.device),
            checkpoint=checkpoint,
            num_parameters=_num_parameters(trainer.detector),
        )

    def _epoch(self) -> tuple[Path, bool]:
        """Train to the end of the epoch, score, and write a checkpoint; return it and whether a stop was asked for."""
        trainer = self.trainer
        training = trainer.config.training
        end = (trainer.num_step // trainer.steps_per_epoch + 1) * trainer.steps_per_epoch
        recent, saved_at = Sums({}), trainer.seconds
        while trainer.num_step < end:
            self._step(recent)
            if recent.seconds >= REPORT_SECONDS:
                epoch = trainer.num_step / trainer.steps_per_epoch
                self.on_event(StepsTaken(epoch=epoch, **self._progress(recent)))
                recent = Sums({})
            if self._should_stop():
                if trainer.num_step < end:
                    return self._save(), True
                break
            if self._is_due(trainer.seconds - saved_at >= training.checkpoint_seconds) and trainer.num_step < end:
                self._save()
                saved_at = trainer.seconds
        self.on_event(
            EpochFinished(
                epoch=trainer.num_step // trainer.steps_per_epoch,
                metrics=_subset_metrics(trainer, on_batch=self._asked_to_stop) if trainer.world.rank == 0 else {},
                peak_memory_bytes=peak_memory_bytes(trainer.device),
                **self._progress(trainer.epoch_sums),
            )
        )
        trainer.epoch_sums = Sums({})
        return self._save(), self._should_stop()

    def _step(self, recent: Sums) -> None:
        trainer = self.trainer
        began, waited = time.perf_counter(), trainer.waited
        losses, norm = trainer.step()
        seconds, waited = time.perf_counter() - began, trainer.waited - waited
        trainer.seconds += seconds
        for sums in (recent, trainer.epoch_sums):
            sums.add(losses, norm, seconds=seconds, waited=waited)

    def _progress(self, sums: Sums) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "step": trainer.num_step,
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "seconds": trainer.seconds,
            **sums.means(trainer.config.training.batch_size),
        }

    def _should_stop(self) -> bool:
        return any(self.trainer.world.gather(self._asked_to_stop()))

    def _is_due(self, due: bool) -> bool:  # noqa: FBT001 - the clock of the first process decides for all
        return self.trainer.world.gather(due)[0]

    def _save(self) -> Path:
        """Write a checkpoint, in the first process; the others wait until it is there."""
        world = self.trainer.world
        path = self.trainer.save(self.checkpoints) if world.rank == 0 else self.checkpoints
        path = world.gather(path)[0]
        self.on_event(CheckpointSaved(step=self.trainer.num_step, path=path.name))
        return path


def _subset_metrics(trainer: Trainer, *, on_batch: Callable[[], object]) -> dict[str, Metrics]:
    config = trainer.config.evaluation
    indices = subset_indices(len(trainer.data.scored), config.training_subset)
    return {
        parameters: score(
            detector, config, data=trainer.data, indices=indices, device=trainer.device, on_batch=on_batch
        )[0]
        for parameters, detector in trainer.scored().items()
    }


def _num_parameters(detector: nn.Module) -> int:
    return sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
