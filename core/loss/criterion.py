"""The set criterion: predictions and targets to weighted loss terms (DETR, eq. 2; Deformable DETR, A.4)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, assert_never

import torch
from torch import Tensor

from core import config as c
from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.custom import build_custom
from core.loss.classification import ClassificationLoss, CrossEntropyLoss, FocalLoss, IoUAwareLoss, num_boxes
from core.loss.matcher import HungarianMatcher
from core.types import Assignment, LossTerm, Prediction, Target


class SetCriterion:
    """Match every prediction on its own, then score classes over all queries and boxes over the matched ones.

    Box terms are summed and divided by the matched boxes of the optimiser step, one at least; the classification loss
    has a normaliser of its own. So the terms of the parts of a batch, on one process or several, add up to the terms of
    the joint batch. All is computed in single precision.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        classification: ClassificationLoss,
        weights: Mapping[str, float],
        repeats: int,
        auxiliary: bool,
        encoder_classification: ClassificationLoss,
        encoder_weight: float,
        encoder_tokens: Literal["all", "selected"],
    ) -> None:
        """Create a criterion.

        `weights` has the keys class, l1 and giou; `encoder_weight` multiplies them for encoder rows. `repeats`: queries
        that each true box gets in the rows that detect: the decoder's, or the encoder's where there is no decoder.
        `auxiliary` False drops all layers of the decoder but the last, of denoising and extra queries, too.
        """
        self.matcher = matcher
        self.classification = classification
        self.weights = weights
        self.repeats = repeats
        self.auxiliary = auxiliary
        self.encoder_classification = encoder_classification
        self.encoder_weight = encoder_weight
        self.encoder_tokens = encoder_tokens

    def __call__(
        self, predictions: tuple[Prediction, ...], targets: tuple[Target, ...], counts: Sequence[int]
    ) -> tuple[LossTerm, ...]:
        """Return three terms for each prediction that is trained.

        `counts`: numbers of true boxes of every picture of the optimiser step (`Batch.counts`).
        """
        with torch.autocast(predictions[0].logits.device.type, enabled=False):
            return tuple(
                term
                for prediction in self._trained(predictions)
                for term in self._terms(prediction.in_fp32(), targets, counts)
            )

    def _trained(self, predictions: tuple[Prediction, ...]) -> Iterator[Prediction]:
        """Yield the predictions that have a loss, as it sees them."""
        last = max((p.layer for p in predictions if p.source != "encoder"), default=None)
        decoded = next((p for p in predictions if p.source == "decoder"), None)
        for prediction in predictions:
            if prediction.source != "encoder" and prediction.layer != last and not self.auxiliary:
                continue
            trained = prediction
            if prediction.source == "encoder" and self.encoder_tokens == "selected":
                if decoded is None:
                    raise ValueError("no queries are selected from the tokens: set encoder_supervision.tokens to all")
                trained = prediction.best(decoded.logits.shape[1])
            if self.repeats > 1 and prediction.source == ("encoder" if decoded is None else "decoder"):
                trained = replace(trained, matching="one_to_many", repeats=self.repeats)
            yield trained

    def _terms(self, prediction: Prediction, targets: tuple[Target, ...], counts: Sequence[int]) -> Iterator[LossTerm]:
        assignments = self.matcher(prediction, targets)
        where = _flat_index(assignments)
        matched = prediction.boxes[where]  # (matched, 4)
        labels = torch.cat([t.labels[a.targets] for t, a in zip(targets, assignments, strict=True)])
        boxes = torch.cat([t.boxes[a.targets] for t, a in zip(targets, assignments, strict=True)])
        iou, giou = iou_and_giou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(boxes))
        query_labels = torch.full_like(prediction.boxes[..., 0], prediction.num_classes, dtype=torch.int64)
        query_labels[where] = 0 if prediction.class_agnostic else labels
        query_iou = torch.zeros_like(prediction.boxes[..., 0])
        query_iou[where] = iou.detach()
        of_encoder = prediction.source == "encoder"
        classification = self.encoder_classification if of_encoder else self.classification
        number = num_boxes(counts, prediction.repeats)
        values = {
            "class": classification(
                prediction.logits,
                query_labels,
                iou=query_iou,
                valid=prediction.valid,
                counts=counts,
                repeats=prediction.repeats,
            ),
            "l1": (matched - boxes).abs().sum() / number,
            "giou": (1 - giou).sum() / number,
        }
        factor = self.encoder_weight if of_encoder else 1.0
        for name, value in values.items():
            yield LossTerm(
                name=name,
                source=prediction.source,
                layer=prediction.layer,
                value=value,
                weight=factor * self.weights[name],
            )


def build_criterion(config: c.LossConfig, *, encoder_supervision: c.EncoderSupervision | None) -> SetCriterion:
    """Build the criterion and its parts from the configuration."""
    matcher = config.matcher
    supervision = encoder_supervision or c.EncoderSupervision()  # without one, no prediction is of the encoder
    return SetCriterion(
        matcher=HungarianMatcher(
            cost=matcher.cost, cost_class=matcher.cost_class, cost_l1=matcher.cost_l1, cost_giou=matcher.cost_giou
        ),
        classification=_classification(config.classification),
        weights={"class": config.weight_class, "l1": config.weight_l1, "giou": config.weight_giou},
        repeats=matcher.repeats,
        auxiliary=config.auxiliary,
        encoder_classification=_classification(supervision.classification or config.classification),
        encoder_weight=supervision.weight,
        encoder_tokens=supervision.tokens,
    )


def _classification(part: c.Focal | c.IoUAware | c.CrossEntropy | c.Custom) -> ClassificationLoss:
    match part:
        case c.Focal(alpha=alpha, gamma=gamma):
            return FocalLoss(alpha=alpha, gamma=gamma)
        case c.IoUAware(alpha=alpha, gamma=gamma):
            return IoUAwareLoss(alpha=alpha, gamma=gamma)
        case c.CrossEntropy(no_object_weight=no_object_weight):
            return CrossEntropyLoss(no_object_weight=no_object_weight)
        case c.Custom():
            return build_custom(part)
        case other:
            assert_never(other)


def _flat_index(assignments: tuple[Assignment, ...]) -> tuple[Tensor, Tensor]:
    pictures = torch.cat([torch.full_like(a.queries, index) for index, a in enumerate(assignments)])
    return pictures, torch.cat([a.queries for a in assignments])
