"""A trainer whose processes meet at every step, as real ones do, and do nothing else; each can be made to fail."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from core.events import StepsTaken, TrainingStarted
from core.metrics import Metrics

NAMES = ("ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


@dataclass(kw_only=True)
class Sharing:
    """Takes `steps` steps; at step 3 process `victim` of the first attempt does what `fate` says."""

    steps: int = 5
    victim: int | None = None
    fate: Literal["kill", "memory"] = "kill"

    def open_data(self, _config, **_):
        """Return what looks like pictures."""
        return SimpleNamespace(report={})

    def train(self, _config, *, checkpoints, on_event, should_stop, world, **_):
        """Count to the end together; a checkpoint is a file with the step."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoints / "step"
        first = int(checkpoint.read_text()) if checkpoint.exists() else 0
        assert len(set(world.gather(first))) == 1
        if world.rank == 0:
            on_event(_started(first, self.steps, world.size))
        for step in range(first + 1, self.steps + 1):
            if step == 3 and world.rank == self.victim and first == 0:
                self._suffer()
            stop = any(world.gather(should_stop()))
            if world.rank == 0:
                (checkpoints / "draft").write_text(str(step))
                (checkpoints / "draft").replace(checkpoint)
                on_event(_step(step))
            if stop and step < self.steps:
                return _result("interrupted", step, checkpoint)
        return _result("finished", self.steps, checkpoint)

    def evaluate(self, _config, _evaluation, **_):
        """Give everything the same AP."""
        metrics = Metrics(ap=0.5, ap50=0.5, **dict.fromkeys(NAMES))
        return SimpleNamespace(metrics=metrics, predictions={"image_id": np.arange(3)}, seconds=0.0)

    def _suffer(self):
        if self.fate == "memory":
            raise MemoryError("no room for process 1")
        os.kill(os.getpid(), signal.SIGKILL)


def _started(step: int, total: int, size: int) -> TrainingStarted:
    return TrainingStarted(
        step=step,
        total_steps=total,
        total_epochs=1,
        num_parameters=size,
        threads=1,
        device="cpu",
        process_id=os.getpid(),
    )


def _step(step: int) -> StepsTaken:
    return StepsTaken(
        step=step, epoch=0.1, losses={"total": 1.0}, grad_norm=1.0, learning_rate=1e-3, pictures_per_s=1.0, seconds=step
    )


def _result(outcome: str, step: int, checkpoint: Path) -> SimpleNamespace:
    return SimpleNamespace(
        outcome=outcome,
        reason="",
        step=step,
        seconds=1.0 * step,
        weights_hash=f"{step}",
        peak_memory_bytes=1000,
        checkpoint=checkpoint,
        num_parameters=7,
    )
