"""From the last decoder layer's prediction to detections in pixels."""

import torch
from torch import Tensor

from core.boxes import cxcywh_to_xyxy
from core.types import Detections, Prediction, Target


def to_detections(prediction: Prediction, targets: tuple[Target, ...], *, top_k: int) -> tuple[Detections, ...]:
    """Keep the `top_k` best (query, class) pairs of each picture, as Deformable DETR does; no NMS.

    A query may appear with several classes.
    """
    scores = prediction.logits.sigmoid()
    num_classes = scores.shape[-1]
    best, pairs = scores.flatten(1).topk(min(top_k, scores[0].numel()), dim=1)
    queries = pairs // num_classes
    boxes = cxcywh_to_xyxy(prediction.boxes).gather(1, queries[..., None].expand(-1, -1, 4))
    return tuple(
        Detections(
            picture_id=target.picture_id,
            scores=best[index],
            labels=pairs[index] % num_classes,
            boxes_xyxy_px=boxes[index] * _size_factor(target, boxes),
            queries=queries[index],
        )
        for index, target in enumerate(targets)
    )


def _size_factor(target: Target, like: Tensor) -> Tensor:
    height, width = target.original_size
    return torch.tensor([width, height, width, height], dtype=like.dtype, device=like.device)
