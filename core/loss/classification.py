"""Classification losses over (query, class) logits, summed over both; the criterion divides by the number of boxes."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows


class ClassificationLoss(Protocol):
    """Score logits (B, Q, K) against 0/1 `targets` of that shape; `iou` (B, Q, K) is the box's IoU at the positives."""

    def __call__(self, logits: Tensor, targets: Tensor, iou: Tensor) -> Tensor:
        """Return the loss of each logit, (B, Q, K)."""
        ...


class FocalLoss:
    """Sigmoid focal loss (arXiv:1708.02002, eq. 5)."""

    def __init__(self, *, alpha: float, gamma: float) -> None:
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, logits: Tensor, targets: Tensor, iou: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all
        """Return the loss of each logit."""
        probability = logits.sigmoid()
        missed = torch.where(targets > 0, 1 - probability, probability)
        weight = torch.where(targets > 0, self.alpha, 1 - self.alpha)
        return weight * missed**self.gamma * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class IoUAwareLoss:
    """Varifocal loss (arXiv:2008.13367, eq. 2): positives aim at their IoU and weigh as much; negatives are focal."""

    def __init__(self, *, alpha: float, gamma: float) -> None:
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, logits: Tensor, targets: Tensor, iou: Tensor) -> Tensor:
        """Return the loss of each logit."""
        aim = targets * iou
        weight = torch.where(targets > 0, aim, self.alpha * logits.detach().sigmoid() ** self.gamma)
        return weight * F.binary_cross_entropy_with_logits(logits, aim, reduction="none")
