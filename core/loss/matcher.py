"""Matching of queries and true boxes by least cost (DETR, arXiv:2005.12872, eq. 1 and 2), and its repetitions."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.loss.rows import Rows, in_rows
from core.types import Assignment, Matching, Prediction, Target

ALPHA, GAMMA = 0.25, 2.0  # of the focal cost, as in Deformable DETR, whatever the loss


Pairs = tuple[np.ndarray, np.ndarray]  # queries and true boxes of one picture that belong together, int64


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
        """Match each picture's queries to its own boxes, as `prediction.matching` says; see `match`."""
        if prediction.matching == "given":
            return given(prediction)
        (rows,) = in_rows([prediction])
        device = prediction.logits.device
        return tuple(
            Assignment(queries=torch.as_tensor(queries, device=device), targets=torch.as_tensor(matched, device=device))
            for queries, matched in self.match([rows], targets)[0][0]
        )

    def match(self, parts: Sequence[Rows], targets: tuple[Target, ...]) -> list[list[list[Pairs]]]:
        """Return the pairs of each picture of each row of each of `parts`; the costs of all come in one transfer.

        Raises:
            FloatingPointError: if a cost is not finite, which means that the model's outputs are not.
            ValueError: if the matching is given, but no assignments are.
        """
        asked = [part.prediction for part in parts if part.prediction.matching != "given"]
        costs = iter(self._transferred([self._costs(prediction, targets) for prediction in asked]))
        counts = [len(target.labels) for target in targets]
        return [
            _as_given(part) if part.prediction.matching == "given" else _solved(part, next(costs), counts)
            for part in parts
        ]

    def costs(self, prediction: Prediction, targets: tuple[Target, ...]) -> np.ndarray:
        """Return costs (..., B, Q, N of the fullest picture); columns beyond a picture's N mean nothing."""
        return self._transferred([self._costs(prediction.in_fp32(), targets)])[0]

    @staticmethod
    def _transferred(costs: list[Tensor]) -> list[np.ndarray]:
        """Copy to the CPU all at once."""
        if not costs:
            return []
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        ends = np.cumsum([cost.numel() for cost in costs])
        starts = [0, *ends[:-1]]
        return [flat[start:end].reshape(cost.shape) for start, end, cost in zip(starts, ends, costs, strict=True)]

    @torch.no_grad()
    def _costs(self, prediction: Prediction, targets: tuple[Target, ...]) -> Tensor:
        """Return costs (..., B, Q, N) of fp32 logits (..., B, Q, K) and boxes."""
        with torch.autocast(prediction.logits.device.type, enabled=False):
            predicted = prediction.boxes
            boxes = pad_sequence([target.boxes for target in targets], batch_first=True, padding_value=0.5)
            cost = self.cost_class * self._class_cost(prediction, targets)
            cost += self.cost_l1 * (predicted[..., None, :] - boxes[:, None]).abs().sum(-1)
            _, giou = iou_and_giou(cxcywh_to_xyxy(predicted)[..., None, :], cxcywh_to_xyxy(boxes)[:, None])
            cost -= self.cost_giou * giou
            if prediction.valid is None:
                return cost
            return cost.masked_fill(~prediction.valid[..., None], 1e6)  # matched only where nothing else is left

    def _class_cost(self, prediction: Prediction, targets: tuple[Target, ...]) -> Tensor:
        """Return the class cost of each query and true box, (..., B, Q, N)."""
        if self.cost == "probability":
            per_class = -prediction.probabilities()
        else:
            positive, negative = focal_cost(prediction.logits)
            per_class = positive - negative  # (..., B, Q, K)
        labels = pad_sequence([_labels(target, prediction) for target in targets], batch_first=True)  # (B, N)
        return per_class.gather(-1, labels[:, None].expand(*per_class.shape[:-1], -1))


def given(prediction: Prediction) -> tuple[Assignment, ...]:
    """Return the assignments that a prediction brings.

    Raises:
        ValueError: if it brings none.
    """
    if prediction.assignments is None:
        raise ValueError(f"{prediction.source} layer {prediction.layer} is to be matched as given, but is not")
    return prediction.assignments


def _as_given(part: Rows) -> list[list[Pairs]]:
    pairs = [(own.queries.cpu().numpy(), own.targets.cpu().numpy()) for own in given(part.prediction)]
    return [pairs] * len(part.layers)


def _solved(part: Rows, costs: np.ndarray, counts: list[int]) -> list[list[Pairs]]:
    """Return the pairs of each picture, of `counts` true boxes, of each row; `costs` (R, B, Q, N)."""
    prediction = part.prediction
    if not np.isfinite(costs).all():
        layer = part.layers[int(np.isfinite(costs).reshape(len(costs), -1).all(1).argmin())]
        raise FloatingPointError(f"the matching cost of {prediction.source} layer {layer} is not finite")
    return [
        [
            solve(cost[:, :count], prediction.matching, prediction.repeats)
            for cost, count in zip(row, counts, strict=True)
        ]
        for row in costs
    ]


def solve(cost: np.ndarray, matching: Matching, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries and boxes of least total cost (Q, N), by query within a group.

    `one_to_many`: every box is there `repeats` times (H-DETR, arXiv:2207.13080). `one_to_one`: each of
    `repeats` equal groups of queries side by side is matched on its own.
    """
    if matching == "one_to_many":
        queries, copies = linear_sum_assignment(np.tile(cost, (1, repeats)))
        return queries, copies % cost.shape[1]
    if repeats == 1:
        return linear_sum_assignment(cost)
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
