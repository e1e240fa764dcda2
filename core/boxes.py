"""Boxes as tensors: formats, overlap, logits. Pure functions; boxes are (..., 4)."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn (cx, cy, w, h) into (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def iou_and_giou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU (arXiv:1902.09630) of xyxy boxes with x1 > x0, y1 > y0.

    The shapes broadcast: (N, 4) with (N, 4) gives pairs (N,), (N, 1, 4) with (M, 4) gives all of (N, M).
    """
    intersection = _area(torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:]))
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - intersection
    hull = _area(torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:]))
    smallest = torch.finfo(union.dtype).tiny  # two empty boxes at one place: 0 / 0 otherwise
    iou = intersection / union.clamp(min=smallest)
    return iou, iou - (hull - union) / hull.clamp(min=smallest)


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def inverse_sigmoid(probability: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit, with both p and 1 - p clamped at `eps` as in Deformable DETR: no gradient beyond +-11.5."""
    probability = probability.clamp(0, 1)
    return torch.log(probability.clamp(min=eps) / (1 - probability).clamp(min=eps))
