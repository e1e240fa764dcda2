"""Boxes: formats, overlap and logits."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from core.boxes import cxcywh_to_xyxy, inverse_sigmoid, iou_and_giou


def _boxes(count, seed):
    centre, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([centre, size * 0.5 + 0.01], dim=-1)


def test_corners_equal_torchvision():
    """Corners are those that torchvision gives."""
    boxes = _boxes(50, 0)
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), box_convert(boxes, "cxcywh", "xyxy"))


def test_overlap_equals_torchvision():
    """IoU and generalised IoU of all pairs equal torchvision's."""
    first, second = cxcywh_to_xyxy(_boxes(20, 1)), cxcywh_to_xyxy(_boxes(30, 2))
    iou, giou = iou_and_giou(first[:, None], second)
    torch.testing.assert_close(iou, box_iou(first, second))
    torch.testing.assert_close(giou, generalized_box_iou(first, second))


def test_giou_by_hand():
    """Two unit squares one apart: no overlap, a hull of 3, a third of it empty."""
    iou, giou = iou_and_giou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
    assert iou.item() == 0
    assert giou.item() == pytest.approx(-1 / 3)


def test_inverse_sigmoid_inverts_and_saturates():
    """It undoes the sigmoid in the middle and stays finite, without gradient, at the ends."""
    logits = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(logits.sigmoid()), logits)
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    values = inverse_sigmoid(ends)
    assert values.tolist() == pytest.approx([-11.5129, 11.5129], abs=1e-3)
