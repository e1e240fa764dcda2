"""What turns a gradient into new weights: parameter groups, learning rates, clipping, the moving average."""

import copy
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from core.config import TrainingConfig

Model = TypeVar("Model", bound=nn.Module)


class Averaged(Generic[Model]):
    """An exponential moving average of weights and buffers, with the ramp (1 + t) / (10 + t) up to `decay`.

    It follows the tensors that `model` has now, so these may be changed in place only.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.decay = decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after step number `step`; whole-number buffers are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._averaged:
            ours, theirs = (list(side) for side in zip(*self._averaged, strict=True))
            torch._foreach_lerp_(ours, theirs, 1 - decay)  # type: ignore[attr-defined]  # the stub lacks it
        for ours, theirs in self._copied:
            ours.copy_(theirs)


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


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of the whole gradient, ()."""
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def shorten(parameters: Sequence[nn.Parameter], *, norm: float, clip_norm: float | None) -> None:
    """Shorten the whole gradient, which has this norm, to `clip_norm`, if it is longer."""
    if clip_norm is not None and not norm <= clip_norm:  # a norm that is not a number passes on
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))  # type: ignore[attr-defined]  # the stub lacks it
