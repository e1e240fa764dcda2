"""One optimiser step after another, and the state that a checkpoint keeps.

Pictures of a step may go through the model in parts, one after another (`accumulate`) or in several processes: losses
are normalised by the boxes of the whole step, so the gradient is that of all pictures at once. What a part draws at
random for a picture does not depend on the split; dropout does, and so do the statistics of a batch norm that is not
frozen.
"""

import math
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import save_checkpoint
from core.compiling import compile_backbones
from core.config import ExperimentConfig
from core.data.batching import part_length, steps_per_epoch
from core.data.loading import step_parts
from core.data.splits import DataSplits
from core.detector import build_detector
from core.distributed import ALONE, World, step_loss, unsynchronised
from core.memory import keep_freed_memory
from core.optimisation import Averaged, gradient_norm, learning_rate_factor, parameter_groups, shorten
from core.seeding import seeded, torch_stream
from core.types import Batch, Detector, LossTerm

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # of an fp16 loss; a gradient that overflows below is no matter of scale


@dataclass(slots=True)
class Sums:
    """Sums since an event, for its means."""

    losses: dict[str, float]
    grad_norm: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    skipped: int = 0

    def add(self, losses: dict[str, float], grad_norm: float, *, seconds: float, waited: float) -> None:
        """Add one step; one whose gradient is not finite was skipped."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        if math.isfinite(grad_norm):
            self.grad_norm += grad_norm
        else:
            self.skipped += 1
        self.steps += 1
        self.seconds += seconds
        self.waited += waited

    def means(self, batch_size: int) -> dict[str, Any]:
        """Return fields of StepsTaken and EpochFinished."""
        seconds = max(self.seconds, 1e-9)
        return {
            "losses": {name: value / self.steps for name, value in self.losses.items()},
            "grad_norm": self.grad_norm / max(self.steps - self.skipped, 1),
            "pictures_per_s": self.steps * batch_size / seconds,
            "data_share": self.waited / seconds,
            "skipped_steps": self.skipped,
        }


class _Losses:
    """The losses of a step's parts, kept on the device until all are read in one transfer."""

    def __init__(self) -> None:
        self._values: list[torch.Tensor] = []
        self._names: list[tuple[str, float]] = []  # and the weight of each

    def add(self, total: torch.Tensor, terms: tuple[LossTerm, ...]) -> None:
        """Keep the losses of a part."""
        self._names += [("total", 1.0), *((f"{term.source}/{term.name}", term.weight) for term in terms)]
        self._values += [total.detach(), *(term.value.detach() for term in terms)]

    def read(self, norm: torch.Tensor) -> tuple[dict[str, float], float]:
        """Return the weighted losses, summed by name, and the norm."""
        *values, found = torch.stack([*self._values, norm]).tolist()
        losses: dict[str, float] = {}
        for (name, weight), value in zip(self._names, values, strict=True):
            losses[name] = losses.get(name, 0.0) + weight * value
        return losses, found


class Trainer:
    """One trial in this process: state, one step, its checkpoint. Close it to end the processes that read pictures."""

    def __init__(
        self, config: ExperimentConfig, *, seed: int, data: DataSplits, device: torch.device, world: World = ALONE
    ) -> None:
        part_length(config.training, world.size)
        self.config, self.seed, self.data, self.device, self.world = config, seed, data, device, world
        torch.set_num_threads(config.training.threads)
        keep_freed_memory()
        self.detector = build_detector(config, num_classes=len(data.class_names), seed=seed).to(device)
        if config.training.compile:
            compile_backbones(self.detector)
        decay = config.training.ema_decay
        self.averaged = None if decay is None else Averaged(self.detector, decay)
        self.loss = step_loss(self.detector, world)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.detector, config.training), weight_decay=config.training.weight_decay, fused=True
        )
        self._parameters = [own for group in self.optimizer.param_groups for own in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16")
        self.steps_per_epoch = steps_per_epoch(len(data.train), config.training)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        self.num_step = 0
        self.seconds = 0.0
        self.waited = 0.0  # seconds in this process that steps have waited for their pictures
        self.epoch_sums = Sums({})
        self._batches: Generator[tuple[Batch, ...]] | None = None

    def step(self) -> tuple[dict[str, float], float]:
        """Take one optimiser step; return the weighted losses by name and the gradient's norm before clipping.

        With fp16 a gradient may overflow: then its norm is not finite, the weights stay and the next step's loss is
        scaled less.

        Raises:
            FloatingPointError: if a loss or the gradient is not finite; the weights are then those before the step.
        """
        factor = learning_rate_factor(self.config.training, self.num_step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        parts = self._next_parts()
        if not self.detector.training:
            self.detector.train()
        self.optimizer.zero_grad(set_to_none=True)
        own = self._backward(parts)
        self.scaler.unscale_(self.optimizer)
        own_losses, norm = own.read(gradient_norm(self._parameters))
        losses = self._summed(own_losses)
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
        if not math.isfinite(losses["total"]) or not (may_skip or math.isfinite(norm)):
            raise FloatingPointError(f"loss {losses['total']} and gradient norm {norm} at step {self.num_step}")
        shorten(self._parameters, norm=norm, clip_norm=self.config.training.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.num_step += 1
        if self.averaged is not None:
            self.averaged.update(self.num_step)
        return losses, norm

    def _next_parts(self) -> tuple[Batch, ...]:
        began = time.perf_counter()
        if self._batches is None:
            self._batches = step_parts(
                self.data,
                self.config,
                seed=self.seed,
                steps=range(self.num_step, self.total_steps),
                rank=self.world.rank,
                size=self.world.size,
                pin=self.device.type == "cuda",
            )
        parts = next(self._batches, None)
        if parts is None:
            raise ValueError(f"all {self.total_steps} steps of this training are taken")
        self.waited += time.perf_counter() - began
        return parts

    def _backward(self, parts: tuple[Batch, ...]) -> "_Losses":
        """Sum the gradient over parts and processes; return what the losses of this process are."""
        own_counts = [len(target.labels) for part in parts for target in part.targets]
        counts = tuple(count for counts in self.world.gather(own_counts) for count in counts)
        losses = _Losses()
        for index, part in enumerate(parts):
            batch = replace(part, box_counts=counts).to(self.device)
            synchronised = index == len(parts) - 1
            with nullcontext() if synchronised else unsynchronised(self.loss):
                with self.world.together():
                    total, terms = self._forward(batch, part=self.world.rank * len(parts) + index)
                # Processes average their gradients, and the step's gradient is their sum.
                self.scaler.scale(total * self.world.size if self.world.size > 1 else total).backward()
            losses.add(total, terms)
        return losses

    def _summed(self, own: dict[str, float]) -> dict[str, float]:
        """Sum the losses over the processes."""
        losses: dict[str, float] = {}
        for theirs in self.world.gather(own):
            for name, value in theirs.items():
                losses[name] = losses.get(name, 0.0) + value
        return losses

    def _forward(self, batch: Batch, *, part: int) -> tuple[torch.Tensor, Any]:
        """Return the loss of a part and its terms."""
        precision = PRECISIONS[self.config.training.precision]
        names = ("dropout", self.num_step, *([part] if part else []))
        generator = torch_stream(self.seed, "loss", self.num_step)
        lower = torch.autocast(self.device.type, dtype=precision, enabled=precision != torch.float32)
        with seeded(self.seed, *names), lower:
            return self.loss(batch, generator)

    def scored(self) -> dict[str, Detector]:
        """Return the models to score while training: the averaged one where there is one."""
        if self.averaged is None:
            return {"raw": self.detector.eval()}
        return {"averaged": self.averaged.model.eval()}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint."""
        sums = self.epoch_sums
        state = {
            "raw": self.detector.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "seconds": self.seconds,
            "config": self.config.model_dump(mode="json"),
            "classes": dict(zip(self.data.ground_truth.category_ids, self.data.class_names, strict=True)),
            "epoch_losses": sums.losses,
            "epoch_sums": [sums.grad_norm, sums.steps, sums.seconds, sums.waited, sums.skipped],
        }
        return save_checkpoint(folder, self.num_step, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.detector.load_state_dict(state["raw"])
        if self.averaged is not None:
            self.averaged.model.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.close()  # pictures read ahead were those of other steps
        self.num_step, self.seconds = state["step"], state["seconds"]
        self.epoch_sums = Sums(dict(state["epoch_losses"]), *state["epoch_sums"])

    def close(self) -> None:
        """End the processes that read pictures ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None
