"""Matching of queries and true boxes by least cost (DETR, arXiv:2005.12872, eq. 1 and 2), and its repetitions."""

from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.types import Assignment, Matching, Prediction, Target

ALPHA, GAMMA = 0.25, 2.0  # of the focal cost, as in Deformable DETR, whatever the loss


class HungarianMatcher:
    """The cost of a pair is a weighted sum of class cost, L1 distance and negative generalised IoU.

    The class cost is the focal loss that the class would have, less the one it has as a negative (`focal`, Deformable
    DETR), or minus its probability (`probability`, DETR). It is computed in single precision.
    """

    def __init__(
        self, *, cost: Literal["focal", "probability"], cost_class: float, cost_l1: float, cost_giou: float
    ) -> None:
        self.cost = cost
        self.cost_class, self.cost_l1, self.cost_giou = cost_class, cost_l1, cost_giou

    def __call__(self, prediction: Prediction, targets: tuple[Target, ...]) -> tuple[Assignment, ...]:
        """Match each picture's queries to its own boxes, as `prediction.matching` says.

        Raises:
            FloatingPointError: if a cost is not finite, which means that the model's outputs are not.
            ValueError: if the matching is given, but no assignments are.
        """
        if prediction.matching == "given":
            if prediction.assignments is None:
                raise ValueError(f"{prediction.source} layer {prediction.layer} is to be matched as given, but is not")
            return prediction.assignments
        costs = self.costs(prediction, targets)
        if not np.isfinite(costs).all():
            raise FloatingPointError(f"the matching cost of {prediction.source} layer {prediction.layer} is not finite")
        device = prediction.logits.device
        assignments: list[Assignment] = []
        for cost, target in zip(costs, targets, strict=True):
            queries, matched = solve(cost[:, : len(target.labels)], prediction.matching, prediction.repeats)
            assignments.append(
                Assignment(
                    queries=torch.as_tensor(queries, device=device), targets=torch.as_tensor(matched, device=device)
                )
            )
        return tuple(assignments)

    @torch.no_grad()
    def costs(self, prediction: Prediction, targets: tuple[Target, ...]) -> np.ndarray:
        """Return costs (B, Q, N of the fullest picture) in one transfer; columns beyond a picture's N mean nothing."""
        with torch.autocast(prediction.logits.device.type, enabled=False):
            return self._costs(prediction.in_fp32(), targets).cpu().numpy()

    def _costs(self, prediction: Prediction, targets: tuple[Target, ...]) -> Tensor:
        most = max((len(target.labels) for target in targets), default=0)
        labels = torch.stack([_pad(_labels(target, prediction), most) for target in targets])  # (B, N)
        boxes = torch.stack([_pad(target.boxes, most, value=0.5) for target in targets])  # (B, N, 4)
        per_class = self._class_cost(prediction)  # (B, Q, K)
        cost_class = per_class.gather(2, labels[:, None].expand(-1, per_class.shape[1], -1))
        predicted = prediction.boxes
        cost_l1 = (predicted[:, :, None] - boxes[:, None]).abs().sum(-1)
        _, giou = iou_and_giou(cxcywh_to_xyxy(predicted)[:, :, None], cxcywh_to_xyxy(boxes)[:, None])
        cost = self.cost_class * cost_class + self.cost_l1 * cost_l1 - self.cost_giou * giou
        if prediction.valid is None:
            return cost
        return cost.masked_fill(~prediction.valid[..., None], 1e6)  # matched only where nothing else is left

    def _class_cost(self, prediction: Prediction) -> Tensor:
        if self.cost == "probability":
            return -prediction.probabilities()
        positive, negative = focal_cost(prediction.logits)
        return positive - negative


def solve(cost: np.ndarray, matching: Matching, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries and boxes of least total cost (Q, N), by query within a group.

    `one_to_many`: every box is there `repeats` times (H-DETR, arXiv:2207.13080). `one_to_one`: each of
    `repeats` equal groups of queries side by side is matched on its own.
    """
    if matching == "one_to_many":
        queries, copies = linear_sum_assignment(np.tile(cost, (1, repeats)))
        return queries, copies % cost.shape[1]
    size = len(cost) // repeats
    solved = [linear_sum_assignment(group) for group in np.split(cost, repeats)]
    queries = [own + number * size for number, (own, _) in enumerate(solved)]
    return np.concatenate(queries), np.concatenate([matched for _, matched in solved])


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
