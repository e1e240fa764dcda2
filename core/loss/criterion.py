"""The set criterion: predictions and targets to weighted loss terms (DETR, eq. 2; Deformable DETR, A.4)."""

from typing import Literal

import torch
from torch import Tensor

from core import config as c
from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.loss.classification import ClassificationLoss, FocalLoss, IoUAwareLoss
from core.loss.matcher import HungarianMatcher
from core.types import Assignment, LossTerm, Prediction, Target


class SetCriterion:
    """Match every prediction on its own, then score classes over all queries and boxes over the matched ones.

    Each term is summed and divided by the number of boxes in the batch, one at least.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        classification: ClassificationLoss,
        weights: dict[str, float],
        auxiliary: bool,
        encoder_tokens: Literal["all", "selected"],
    ) -> None:
        """Create a criterion; `weights` has the keys class, l1 and giou."""
        self.matcher = matcher
        self.classification = classification
        self.weights = weights
        self.auxiliary = auxiliary
        self.encoder_tokens = encoder_tokens

    def __call__(self, predictions: tuple[Prediction, ...], targets: tuple[Target, ...]) -> tuple[LossTerm, ...]:
        """Return three terms for each prediction that is trained."""
        last = max(prediction.layer for prediction in predictions if prediction.source == "decoder")
        num_queries = next(p.logits.shape[1] for p in predictions if p.source == "decoder")
        num_boxes = max(1, sum(len(target.labels) for target in targets))
        terms: list[LossTerm] = []
        for prediction in predictions:
            if prediction.source == "decoder" and prediction.layer != last and not self.auxiliary:
                continue
            trained = prediction
            if prediction.source == "encoder" and self.encoder_tokens == "selected":
                trained = prediction.best(num_queries)
            terms.extend(self._terms(trained, targets, num_boxes))
        return tuple(terms)

    def _terms(self, prediction: Prediction, targets: tuple[Target, ...], num_boxes: int) -> list[LossTerm]:
        assignments = self.matcher(prediction, targets)
        where = _flat_index(assignments)
        matched = prediction.boxes[where]  # (sum N, 4)
        labels = torch.cat([t.labels[a.targets] for t, a in zip(targets, assignments, strict=True)])
        boxes = torch.cat([t.boxes[a.targets] for t, a in zip(targets, assignments, strict=True)])
        iou, giou = iou_and_giou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(boxes))
        if prediction.class_agnostic:
            labels = torch.zeros_like(labels)
        aims = torch.zeros_like(prediction.logits)
        aims[(*where, labels)] = 1.0
        ious = torch.zeros_like(prediction.logits)
        ious[(*where, labels)] = iou.detach()
        per_logit = self.classification(prediction.logits, aims, ious)
        if prediction.valid is not None:
            per_logit = per_logit * prediction.valid[..., None]
        values = {
            "class": per_logit.sum() / num_boxes,
            "l1": (matched - boxes).abs().sum() / num_boxes,
            "giou": (1 - giou).sum() / num_boxes,
        }
        return [
            LossTerm(
                name=name, source=prediction.source, layer=prediction.layer, value=value, weight=self.weights[name]
            )
            for name, value in values.items()
        ]


def build_criterion(config: c.LossConfig, *, encoder_tokens: Literal["all", "selected"]) -> SetCriterion:
    """Build the criterion and its parts from the configuration."""
    match config.classification:
        case c.Focal(alpha=alpha, gamma=gamma):
            classification: ClassificationLoss = FocalLoss(alpha=alpha, gamma=gamma)
        case c.IoUAware(alpha=alpha, gamma=gamma):
            classification = IoUAwareLoss(alpha=alpha, gamma=gamma)
        case other:
            raise NotImplementedError(other.kind)
    matcher = config.matcher
    return SetCriterion(
        matcher=HungarianMatcher(cost_class=matcher.cost_class, cost_l1=matcher.cost_l1, cost_giou=matcher.cost_giou),
        classification=classification,
        weights={"class": config.weight_class, "l1": config.weight_l1, "giou": config.weight_giou},
        auxiliary=config.auxiliary,
        encoder_tokens=encoder_tokens,
    )


def _flat_index(assignments: tuple[Assignment, ...]) -> tuple[Tensor, Tensor]:
    pictures = torch.cat([torch.full_like(a.queries, index) for index, a in enumerate(assignments)])
    return pictures, torch.cat([a.queries for a in assignments])
