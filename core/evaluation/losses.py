"""The loss of a detector on pictures that it does not learn from, to compare implementations number by number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.data.batching import collate
from core.data.pictures import PictureSet
from core.detector import AnyDetector
from core.seeding import torch_stream


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanLosses:
    """Means over pictures.

    `terms` by `source/layer/name` (`decoder/5/class`), before weighting; `weights` of the same keys; `total` is the
    weighted sum. `grad_norm`: the Euclidean norm, over all trainable parameters, of the gradient of the total summed
    over the pictures.
    """

    terms: dict[str, float]
    weights: dict[str, float]
    total: float
    grad_norm: float


def mean_losses(
    detector: AnyDetector, *, pictures: PictureSet, indices: Sequence[int], device: torch.device
) -> MeanLosses:
    """Compute every loss term with each picture alone in its batch, normalised by what is in it.

    The detector must be in evaluation mode: no dropout, and batch norm by its stored statistics. What a loss draws at
    random (denoising, the regions that Faster R-CNN samples) comes from a stream of the picture's id.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    total = 0.0
    detector.zero_grad(set_to_none=True)
    for index in indices:
        picture = pictures.read(index)
        terms = detector.loss(collate([picture]).to(device), torch_stream(0, "losses", picture.picture_id))
        loss = torch.stack([term.weight * term.value for term in terms]).sum()
        loss.backward()
        total += float(loss.detach())
        for term in terms:
            name = f"{term.source}/{term.layer}/{term.name}"
            sums[name] = sums.get(name, 0.0) + float(term.value.detach())
            weights[name] = term.weight
    norms = [parameter.grad.double().norm() for parameter in detector.parameters() if parameter.grad is not None]
    detector.zero_grad(set_to_none=True)
    return MeanLosses(
        terms={name: value / len(indices) for name, value in sums.items()},
        weights=weights,
        total=total / len(indices),
        grad_norm=math.hypot(*map(float, norms)),
    )
