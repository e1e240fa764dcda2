"""From a model's predictions to detections in pixels."""

from typing import Literal

import torch
from torch import Tensor

from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.types import Assignment, Detections, Prediction, Target

RECALL_IOU = 0.5


def detecting(predictions: tuple[Prediction, ...]) -> Prediction:
    """Return what detects: the last decoder layer's prediction, or the encoder's where there is no decoder."""
    decoded = [prediction for prediction in predictions if prediction.source == "decoder"]
    rows = decoded or [prediction for prediction in predictions if prediction.source == "encoder"]
    return max(rows, key=lambda row: row.layer)


def to_detections(
    prediction: Prediction,
    targets: tuple[Target, ...],
    assignments: tuple[Assignment, ...],
    *,
    top_k: int,
    classes_per_query: Literal["all", "one"],
) -> tuple[Detections, ...]:
    """Keep the `top_k` best of each picture, without its invalid queries; no NMS.

    `all`: of all (query, class) pairs, so that a query may appear with several classes (Deformable DETR). `one`: of the
    queries, each with its best class (DETR). `assignments` say which true box is each query's.
    """
    prediction = prediction.in_fp32()
    found: list[Detections] = []
    best, queries, labels = _best(prediction, top_k, classes_per_query)
    boxes = cxcywh_to_xyxy(prediction.boxes).gather(1, queries[..., None].expand(-1, -1, 4))
    for index, (target, assignment) in enumerate(zip(targets, assignments, strict=True)):
        owners = torch.full_like(prediction.boxes[index, :, 0], -1, dtype=torch.int64)  # (Q,)
        owners[assignment.queries] = target.annotation_ids[assignment.targets]
        detections = Detections(
            picture_id=target.picture_id,
            scores=best[index],
            labels=labels[index],
            boxes_xyxy_px=boxes[index] * _size_factor(target, boxes),
            queries=queries[index],
            gt_ids=owners[queries[index]],
            layer=prediction.layer,
        )
        found.append(detections if prediction.valid is None else detections.keep(best[index] >= 0))
    return tuple(found)


def recalled(proposals: Prediction, targets: tuple[Target, ...], *, count: int) -> list[int]:
    """Count each picture's true boxes that overlap one of its `count` best proposals by an IoU of .5 or more."""
    boxes = cxcywh_to_xyxy(proposals.best(count).boxes.float())
    found: list[Tensor] = []
    for own, target in zip(boxes, targets, strict=True):
        iou, _ = iou_and_giou(own[:, None], cxcywh_to_xyxy(target.boxes))  # (count, N)
        found.append((iou.amax(0) >= RECALL_IOU).sum())
    return torch.stack(found).tolist()


def _best(
    prediction: Prediction, top_k: int, classes_per_query: Literal["all", "one"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, queries and labels, each (B, top_k or as many as there are); invalid queries score -1."""
    scores = prediction.probabilities()
    if prediction.valid is not None:
        scores = scores.masked_fill(~prediction.valid[..., None], -1.0)
    if classes_per_query == "one":
        of_query, labels = scores.max(-1)
        best, queries = of_query.topk(min(top_k, of_query.shape[1]), dim=1)
        return best, queries, labels.gather(1, queries)
    best, pairs = scores.flatten(1).topk(min(top_k, scores[0].numel()), dim=1)
    return best, pairs // prediction.num_classes, pairs % prediction.num_classes


def _size_factor(target: Target, like: Tensor) -> Tensor:
    height, width = target.original_size
    return torch.tensor([width, height, width, height], dtype=like.dtype, device=like.device)
