"""What turns a gradient into new weights: parameter groups, learning rates, clipping, the moving average."""

import copy
import math
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from core.config import TrainingConfig

Model = TypeVar("Model", bound=nn.Module)


class Averaged(Generic[Model]):
    """An exponential moving average of weights and buffers, with the ramp (1 + t) / (10 + t) up to `decay`."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).requires_grad_(requires_grad=False)
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


def clip(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """Shorten the whole gradient to `clip_norm`, if it is longer; return its norm before."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
