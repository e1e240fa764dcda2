"""From the last decoder layer's prediction to detections in pixels."""

import torch
from torch import Tensor

from core.boxes import cxcywh_to_xyxy
from core.types import Assignment, Detections, Prediction, Target


def to_detections(
    prediction: Prediction, targets: tuple[Target, ...], assignments: tuple[Assignment, ...], *, top_k: int
) -> tuple[Detections, ...]:
    """Keep the `top_k` best (query, class) pairs of each picture, as Deformable DETR does; no NMS.

    A query may appear with several classes. `assignments` say which true box is each query's.
    """
    scores = prediction.logits.sigmoid()
    num_classes = scores.shape[-1]
    best, pairs = scores.flatten(1).topk(min(top_k, scores[0].numel()), dim=1)
    queries = pairs // num_classes
    boxes = cxcywh_to_xyxy(prediction.boxes).gather(1, queries[..., None].expand(-1, -1, 4))
    found = []
    for index, (target, assignment) in enumerate(zip(targets, assignments, strict=True)):
        owners = torch.full_like(prediction.logits[index, :, 0], -1, dtype=torch.int64)  # (Q,)
        owners[assignment.queries] = target.annotation_ids[assignment.targets]
        found.append(
            Detections(
                picture_id=target.picture_id,
                scores=best[index],
                labels=pairs[index] % num_classes,
                boxes_xyxy_px=boxes[index] * _size_factor(target, boxes),
                queries=queries[index],
                gt_ids=owners[queries[index]],
                layer=prediction.layer,
            )
        )
    return tuple(found)


def _size_factor(target: Target, like: Tensor) -> Tensor:
    height, width = target.original_size
    return torch.tensor([width, height, width, height], dtype=like.dtype, device=like.device)
