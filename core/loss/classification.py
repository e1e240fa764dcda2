"""Classification losses of a prediction, each with its own normaliser over the whole optimiser step.

`counts` are the numbers of true boxes of every picture of the step, over all processes and parts of the batch. What
the step's other pictures contribute to a normaliser is computed from them, so that the losses of the parts add up to
the loss of the joint batch without any communication.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows


class ClassificationLoss(Protocol):
    """Score logits against a label for each query; with softmax the last logit is "no object"."""

    activation: Literal["sigmoid", "softmax"]

    def __call__(
        self, logits: Tensor, labels: Tensor, *, iou: Tensor, valid: Tensor | None, counts: Sequence[int], repeats: int
    ) -> Tensor:
        """Return the normalised loss of each row, (R,).

        `logits` (R, B, Q, K), or (R, B, Q, K + 1) for a softmax: rows are layers, say, with a loss each; `labels`
        (R, B, Q) int64 in 0..K, K being "no object"; `iou` (R, B, Q) of the predicted with the true box, 0 where there
        is none, without gradient; `valid` (B, Q) bool, the same for all rows, False = no loss, or None = all count;
        `repeats` queries that each true box has.
        """
        ...


def num_boxes(counts: Sequence[int], repeats: int) -> int:
    """Return the number of matched boxes by which a step's losses are divided, at least one for each repetition."""
    return max(1, sum(counts)) * repeats


class FocalLoss:
    """Sigmoid focal loss (arXiv:1708.02002, eq. 5), summed over queries and classes, divided by the matched boxes."""

    activation: Literal["sigmoid", "softmax"] = "sigmoid"

    def __init__(self, *, alpha: float, gamma: float) -> None:
        self.alpha, self.gamma = alpha, gamma

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        iou: Tensor,  # noqa: ARG002 - one signature for all
        valid: Tensor | None,
        counts: Sequence[int],
        repeats: int,
    ) -> Tensor:
        """Return the loss of each logit, summed."""
        positive = _is_label(logits, labels)
        probability = logits.sigmoid()
        missed = torch.where(positive, 1 - probability, probability)
        weight = torch.where(positive, self.alpha, 1 - self.alpha)
        entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
        return _sum(weight * missed**self.gamma * entropy, valid) / num_boxes(counts, repeats)


class IoUAwareLoss:
    """Varifocal loss (arXiv:2008.13367, eq. 2): positives aim at their IoU and weigh as much; negatives are focal.

    Summed over queries and classes, divided by the matched boxes.
    """

    activation: Literal["sigmoid", "softmax"] = "sigmoid"

    def __init__(self, *, alpha: float, gamma: float) -> None:
        self.alpha, self.gamma = alpha, gamma

    def __call__(
        self, logits: Tensor, labels: Tensor, *, iou: Tensor, valid: Tensor | None, counts: Sequence[int], repeats: int
    ) -> Tensor:
        """Return the loss of each logit, summed."""
        positive = _is_label(logits, labels)
        aim = positive * iou[..., None]
        weight = torch.where(positive, aim, self.alpha * logits.detach().sigmoid() ** self.gamma)
        entropy = F.binary_cross_entropy_with_logits(logits, aim, reduction="none")
        return _sum(weight * entropy, valid) / num_boxes(counts, repeats)


class CrossEntropyLoss:
    """Softmax cross-entropy in which "no object" weighs less: a weighted mean over queries (DETR, section 3.1).

    The mean is over all queries of the step: a picture of N boxes has min(Q, repeats x N) queries of weight 1, and Q is
    the same for all. Where only some queries are valid, other pictures' numbers of them are not known; then each
    picture has a weighted mean of its own, and the loss is the mean of these over the pictures of the step.
    """

    activation: Literal["sigmoid", "softmax"] = "softmax"

    def __init__(self, *, no_object_weight: float) -> None:
        self.no_object_weight = no_object_weight

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        iou: Tensor,  # noqa: ARG002 - one signature for all
        valid: Tensor | None,
        counts: Sequence[int],
        repeats: int,
    ) -> Tensor:
        """Return the weighted mean."""
        num_queries, no_object = labels.shape[-1], logits.shape[-1] - 1
        entropy = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
        weight = torch.where(labels == no_object, self.no_object_weight, 1.0)
        if valid is not None:
            weight = weight * valid
            smallest = torch.finfo(weight.dtype).tiny  # pictures without a valid query: 0 / 0 otherwise
            return ((weight * entropy).sum(-1) / weight.sum(-1).clamp(min=smallest)).sum(-1) / len(counts)
        matched = sum(min(num_queries, repeats * count) for count in counts)
        return (weight * entropy).sum((-2, -1)) / (
            matched + self.no_object_weight * (num_queries * len(counts) - matched)
        )


def _is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which logits (..., Q, K) are those of the labels."""
    return labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)


def _sum(per_logit: Tensor, valid: Tensor | None) -> Tensor:
    """Sum over pictures, valid queries and classes."""
    return (per_logit if valid is None else per_logit * valid[..., None]).sum((-3, -2, -1))
