"""Train one detector from a config and a seed, with events, checkpoints and resumption.

What a trial computes depends on its config, seed and pictures alone. Every source of chance has a stream of its own,
keyed by the step or the picture, so nothing about generators needs saving: on a CPU a resumed trial equals an
unbroken one bit for bit.
"""

import copy
import math
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.checkpoint import load_newest, save_checkpoint, weights_hash
from core.config import ExperimentConfig, TrainingConfig
from core.data.batching import steps_per_epoch, subset_indices, training_batch
from core.data.splits import DataSplits
from core.detector import AnyDetector, build_detector
from core.evaluation.score import score
from core.events import CheckpointSaved, Diverged, EpochFinished, Event, StepsTaken, TrainingStarted
from core.metrics import Metrics
from core.seeding import seeded, torch_stream

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


class Averaged:
    """An exponential moving average of weights and buffers, with the ramp (1 + t) / (10 + t) up to `decay`."""

    def __init__(self, model: AnyDetector, decay: float) -> None:
        self.model: AnyDetector = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model` after step number `step`; whole-number buffers are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        theirs = model.state_dict()
        for name, ours in self.model.state_dict().items():
            if ours.is_floating_point():
                ours.lerp_(theirs[name], 1 - decay)
            else:
                ours.copy_(theirs[name])


@dataclass(slots=True)
class _Sums:
    """Sums since an event, for its means."""

    losses: dict[str, float]
    grad_norm: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    def add(self, losses: dict[str, float], grad_norm: float, seconds: float) -> None:
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.grad_norm += grad_norm
        self.steps += 1
        self.seconds += seconds

    def means(self, batch_size: int) -> dict[str, Any]:
        return {
            "losses": {name: value / self.steps for name, value in self.losses.items()},
            "grad_norm": self.grad_norm / self.steps,
            "pictures_per_s": self.steps * batch_size / max(self.seconds, 1e-9),
        }


class Trainer:
    """One trial in this process: state, one step, its checkpoint."""

    def __init__(self, config: ExperimentConfig, *, seed: int, data: DataSplits, device: torch.device) -> None:
        self.config, self.seed, self.data, self.device = config, seed, data, device
        torch.set_num_threads(config.training.threads)
        self.detector = build_detector(config, num_classes=len(data.class_names), seed=seed).to(device)
        decay = config.training.ema_decay
        self.averaged = None if decay is None else Averaged(self.detector, decay)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.detector, config.training), weight_decay=config.training.weight_decay, fused=True
        )
        self.steps_per_epoch = steps_per_epoch(len(data.train), config.training)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        self.num_step = 0
        self.seconds = 0.0
        self.epoch_sums = _Sums({})

    def step(self) -> tuple[dict[str, float], float]:
        """Take one optimiser step; return the weighted losses by name and the gradient's norm before clipping.

        Raises:
            FloatingPointError: if a loss or the gradient is not finite; the weights are then those before the step.
        """
        factor = learning_rate_factor(self.config.training, self.num_step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        batch = training_batch(self.data, self.config, seed=self.seed, step=self.num_step).to(self.device)
        generator = torch_stream(self.seed, "loss", self.num_step)
        self.detector.train()
        with seeded(self.seed, "dropout", self.num_step):
            terms = self.detector.loss(batch, generator)
        total = torch.stack([term.weight * term.value for term in terms]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = float(_clip(self.detector.parameters(), self.config.training.clip_norm))
        losses = {"total": float(total.detach())}
        for term in terms:
            name = f"{term.source}/{term.name}"
            losses[name] = losses.get(name, 0.0) + term.weight * float(term.value.detach())
        if not (math.isfinite(losses["total"]) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {losses['total']} and gradient norm {norm} at step {self.num_step}")
        self.optimizer.step()
        self.num_step += 1
        if self.averaged is not None:
            self.averaged.update(self.detector, self.num_step)
        return losses, norm

    def scored(self) -> dict[str, AnyDetector]:
        """Return the models to score while training: the averaged one where there is one."""
        if self.averaged is None:
            return {"raw": self.detector}
        return {"averaged": self.averaged.model}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint."""
        state = {
            "config": self.config.model_dump(mode="json"),
            "classes": dict(zip(self.data.ground_truth.category_ids, self.data.class_names, strict=True)),
            "raw": self.detector.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
            "epoch_losses": self.epoch_sums.losses,
            "epoch_sums": [self.epoch_sums.grad_norm, self.epoch_sums.steps, self.epoch_sums.seconds],
        }
        return save_checkpoint(folder, self.num_step, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.detector.load_state_dict(state["raw"])
        if self.averaged is not None:
            self.averaged.model.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_step, self.seconds = state["step"], state["seconds"]
        self.epoch_sums = _Sums(dict(state["epoch_losses"]), *state["epoch_sums"])


def train(
    config: ExperimentConfig,
    *,
    seed: int,
    data: DataSplits,
    checkpoints: Path,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    device: torch.device,
) -> TrainResult:
    """Train to the end, from the newest valid checkpoint in `checkpoints` if there is one.

    `should_stop` is asked after every step; when it says so, a checkpoint is written and the outcome is `interrupted`.
    A loss or gradient that is not finite ends the trial as `diverged`.
    """
    trainer = Trainer(config, seed=seed, data=data, device=device)
    found = load_newest(checkpoints)
    if found is not None:
        trainer.restore(found[0])
    on_event(
        TrainingStarted(
            step=trainer.num_step,
            total_steps=trainer.total_steps,
            total_epochs=config.training.epochs,
            num_parameters=_num_parameters(trainer.detector),
            threads=config.training.threads,
            device=str(device),
            process_id=os.getpid(),
        )
    )
    checkpoint = found[1] if found is not None else None
    outcome, reason = "finished", ""
    try:
        while trainer.num_step < trainer.total_steps:
            checkpoint, stopped = _epoch(trainer, checkpoints, on_event, should_stop)
            if stopped and trainer.num_step < trainer.total_steps:
                outcome, reason = "interrupted", "asked to stop"
                break
    except FloatingPointError as error:
        outcome, reason = "diverged", str(error)
        on_event(Diverged(step=trainer.num_step, reason=reason))
    return TrainResult(
        outcome=outcome,
        reason=reason,
        step=trainer.num_step,
        seconds=trainer.seconds,
        weights_hash=weights_hash(trainer.detector.state_dict()),
        peak_memory_bytes=peak_memory_bytes(device),
        checkpoint=checkpoint,
        num_parameters=_num_parameters(trainer.detector),
    )


def _epoch(
    trainer: Trainer, checkpoints: Path, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
) -> tuple[Path, bool]:
    """Train to the end of the epoch, score, and write a checkpoint; return it and whether a stop was asked for."""
    batch_size = trainer.config.training.batch_size
    end = (trainer.num_step // trainer.steps_per_epoch + 1) * trainer.steps_per_epoch
    recent, saved_at = _Sums({}), trainer.seconds
    while trainer.num_step < end:
        began = time.perf_counter()
        losses, norm = trainer.step()
        seconds = time.perf_counter() - began
        trainer.seconds += seconds
        recent.add(losses, norm, seconds)
        trainer.epoch_sums.add(losses, norm, seconds)
        if recent.seconds >= REPORT_SECONDS:
            on_event(
                StepsTaken(
                    step=trainer.num_step,
                    epoch=trainer.num_step / trainer.steps_per_epoch,
                    learning_rate=trainer.optimizer.param_groups[0]["lr"],
                    seconds=trainer.seconds,
                    **recent.means(batch_size),
                )
            )
            recent = _Sums({})
        if should_stop():
            if trainer.num_step < end:
                return _save(trainer, checkpoints, on_event), True
            break
        if trainer.seconds - saved_at >= trainer.config.training.checkpoint_seconds and trainer.num_step < end:
            _save(trainer, checkpoints, on_event)
            saved_at = trainer.seconds
    on_event(
        EpochFinished(
            step=trainer.num_step,
            epoch=trainer.num_step // trainer.steps_per_epoch,
            learning_rate=trainer.optimizer.param_groups[0]["lr"],
            seconds=trainer.seconds,
            metrics=_subset_metrics(trainer),
            peak_memory_bytes=peak_memory_bytes(trainer.device),
            **trainer.epoch_sums.means(batch_size),
        )
    )
    trainer.epoch_sums = _Sums({})
    return _save(trainer, checkpoints, on_event), should_stop()


def _save(trainer: Trainer, checkpoints: Path, on_event: Callable[[Event], None]) -> Path:
    path = trainer.save(checkpoints)
    on_event(CheckpointSaved(step=trainer.num_step, path=path.name))
    return path


def _subset_metrics(trainer: Trainer) -> dict[str, Metrics]:
    config = trainer.config.evaluation
    indices = subset_indices(len(trainer.data.scored), config.training_subset)
    metrics = {}
    for parameters, detector in trainer.scored().items():
        detector.eval()
        scored = score(detector, config, data=trainer.data, indices=indices, device=trainer.device)
        metrics[parameters] = scored[0]
    return metrics


def parameter_groups(detector: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters as Deformable DETR does: backbone, sampling and references, all else."""
    groups: dict[str, list[nn.Parameter]] = {"rest": [], "backbone": [], "sampling": []}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".backbone." in name:
            groups["backbone"].append(parameter)
        elif any(part in name for part in ("sampling_offsets", "reference_points", "anchors")):
            groups["sampling"].append(parameter)
        else:
            groups["rest"].append(parameter)
    rates = {"rest": config.lr, "backbone": config.lr_backbone, "sampling": config.lr * config.lr_sampling_factor}
    return [
        {"params": parameters, "lr": rates[name], "full_lr": rates[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def learning_rate_factor(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the factor of every learning rate at `step`, 0 being the first: warm-up times schedule."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule.kind == "linear":
        return warmup * (1 - step / total_steps)
    return warmup * (config.schedule.factor if step >= config.schedule.at * total_steps else 1.0)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory that this process has used: of the GPU, or resident on the CPU (bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clip(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)


def _num_parameters(detector: nn.Module) -> int:
    return sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
