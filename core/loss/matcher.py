"""One-to-one matching of queries and true boxes by least cost (DETR, arXiv:2005.12872, eq. 1 and 2)."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.types import Assignment, Prediction, Target

ALPHA, GAMMA = 0.25, 2.0  # of the focal cost, as in Deformable DETR, whatever the loss


class HungarianMatcher:
    """The cost of a pair is a weighted sum of focal class cost, L1 distance and negative generalised IoU."""

    def __init__(self, *, cost_class: float, cost_l1: float, cost_giou: float) -> None:
        self.cost_class, self.cost_l1, self.cost_giou = cost_class, cost_l1, cost_giou

    @torch.no_grad()
    def __call__(self, prediction: Prediction, targets: tuple[Target, ...]) -> tuple[Assignment, ...]:
        """Match each picture's queries to its own boxes.

        Raises:
            FloatingPointError: if a cost is not finite, which means that the model's outputs are not.
        """
        costs = self._costs(prediction, targets)
        if not np.isfinite(costs).all():
            raise FloatingPointError(f"the matching cost of {prediction.source} layer {prediction.layer} is not finite")
        device = prediction.logits.device
        assignments = []
        for cost, target in zip(costs, targets, strict=True):
            queries, matched = linear_sum_assignment(cost[:, : len(target.labels)])
            assignments.append(
                Assignment(
                    queries=torch.as_tensor(queries, device=device), targets=torch.as_tensor(matched, device=device)
                )
            )
        return tuple(assignments)

    def _costs(self, prediction: Prediction, targets: tuple[Target, ...]) -> np.ndarray:
        """Return costs (B, Q, N of the fullest picture) in one transfer; columns beyond a picture's N mean nothing."""
        most = max((len(target.labels) for target in targets), default=0)
        labels = torch.stack([_pad(_labels(target, prediction), most) for target in targets])  # (B, N)
        boxes = torch.stack([_pad(target.boxes, most, value=0.5) for target in targets])  # (B, N, 4)
        logits = prediction.logits.float()
        positive, negative = focal_cost(logits)
        per_class = positive - negative  # (B, Q, K)
        cost_class = per_class.gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
        predicted = prediction.boxes.float()
        cost_l1 = (predicted[:, :, None] - boxes[:, None]).abs().sum(-1)
        _, giou = iou_and_giou(cxcywh_to_xyxy(predicted)[:, :, None], cxcywh_to_xyxy(boxes)[:, None])
        cost = self.cost_class * cost_class + self.cost_l1 * cost_l1 - self.cost_giou * giou
        if prediction.valid is not None:
            cost = cost.masked_fill(~prediction.valid[..., None], 1e6)  # matched only where nothing else is left
        return cost.cpu().numpy()


def focal_cost(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the focal loss that each logit would have as a positive and as a negative."""
    probability = logits.sigmoid()
    positive = ALPHA * (1 - probability) ** GAMMA * -(probability + 1e-8).log()
    negative = (1 - ALPHA) * probability**GAMMA * -(1 - probability + 1e-8).log()
    return positive, negative


def _labels(target: Target, prediction: Prediction) -> Tensor:
    return torch.zeros_like(target.labels) if prediction.class_agnostic else target.labels


def _pad(values: Tensor, length: int, value: float = 0) -> Tensor:
    padded = values.new_full((length, *values.shape[1:]), value)
    padded[: len(values)] = values
    return padded
