"""The set criterion: predictions and targets to weighted loss terms (DETR, eq. 2; Deformable DETR, A.4)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from core import config as c
from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.custom import build_custom
from core.loss.classification import ClassificationLoss, CrossEntropyLoss, FocalLoss, IoUAwareLoss, num_boxes
from core.loss.matcher import HungarianMatcher
from core.loss.rows import Rows, in_rows
from core.types import LossTerm, Prediction, Target


class SetCriterion:
    """Match every prediction on its own, then score classes over all queries and boxes over the matched ones.

    Predictions of one shape and kind, such as the decoder's layers, are computed together as rows.

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
        trained = list(self._trained(predictions))
        terms: list[tuple[LossTerm, ...]] = [()] * len(trained)
        with torch.autocast(predictions[0].logits.device.type, enabled=False):
            parts = in_rows(trained)
            boxes = torch.cat([target.boxes for target in targets])
            labels = torch.cat([target.labels for target in targets])
            for part, index in zip(parts, self._indices(parts, targets, device=boxes.device), strict=True):
                values = self._values(part.prediction, index, boxes=boxes, labels=labels, counts=counts)
                for place, of_row in zip(part.places, values, strict=True):
                    terms[place] = self._terms(trained[place], of_row)
        return tuple(term for of_row in terms for term in of_row)

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

    def _indices(self, parts: list[Rows], targets: tuple[Target, ...], device: torch.device) -> list[Tensor]:
        """Return which query and true box are matched, for each of `parts`: (2, R, matched) int64.

        Queries count on over the pictures of a row, and true boxes over those of all pictures.
        """
        matches = self.matcher.match(parts, targets)
        first_boxes = np.cumsum([0, *(len(target.labels) for target in targets)])
        indices: list[np.ndarray] = []
        for part, rows in zip(parts, matches, strict=True):
            num_queries = part.prediction.logits.shape[2]
            queries = [[own + index * num_queries for index, (own, _) in enumerate(row)] for row in rows]
            matched = [[own + first for first, (_, own) in zip(first_boxes, row, strict=False)] for row in rows]
            indices.append(np.stack([[np.concatenate(row) for row in both] for both in (queries, matched)]))
        flat = torch.from_numpy(np.concatenate([index.ravel() for index in indices])).to(device, non_blocking=True)
        return [
            piece.view(index.shape)
            for piece, index in zip(flat.split([index.size for index in indices]), indices, strict=True)
        ]

    def _values(
        self, rows: Prediction, index: Tensor, *, boxes: Tensor, labels: Tensor, counts: Sequence[int]
    ) -> list[tuple[Tensor, ...]]:
        """Return the class, L1 and GIoU loss of each row of (R, B, Q, ...), given the `index` of what is matched."""
        num_rows, *per_row = rows.boxes.shape[:-1]
        number = num_boxes(counts, rows.repeats)
        queries, chosen = index
        every = (queries + torch.arange(num_rows, device=queries.device)[:, None] * math.prod(per_row)).flatten()
        found = rows.boxes.reshape(-1, 4).index_select(0, every).view(num_rows, -1, 4)
        true = boxes[chosen]  # (R, matched, 4)
        iou, giou = iou_and_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(true))
        query_labels = torch.full_like(rows.boxes[..., 0], rows.num_classes, dtype=torch.int64).flatten(1)
        query_labels.scatter_(1, queries, torch.zeros_like(chosen) if rows.class_agnostic else labels[chosen])
        query_iou = torch.zeros_like(query_labels, dtype=iou.dtype).scatter_(1, queries, iou.detach())
        classification = self.encoder_classification if rows.source == "encoder" else self.classification
        of_class = classification(
            rows.logits,
            query_labels.unflatten(1, per_row),
            iou=query_iou.unflatten(1, per_row),
            valid=rows.valid,
            counts=counts,
            repeats=rows.repeats,
        )
        if of_class.shape != (num_rows,):
            raise ValueError(
                f"{type(classification).__name__} gives a loss of shape {list(of_class.shape)} for {num_rows} rows: "
                "sum over the last three dimensions of (rows, pictures, queries, classes) alone"
            )
        l1 = (found - true).abs().sum((1, 2)) / number
        return list(zip(of_class.unbind(), l1.unbind(), ((1 - giou).sum(1) / number).unbind(), strict=True))

    def _terms(self, prediction: Prediction, values: tuple[Tensor, ...]) -> tuple[LossTerm, ...]:
        factor = self.encoder_weight if prediction.source == "encoder" else 1.0
        return tuple(
            LossTerm(
                name=name,
                source=prediction.source,
                layer=prediction.layer,
                value=value,
                weight=factor * self.weights[name],
            )
            for name, value in zip(("class", "l1", "giou"), values, strict=True)
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
