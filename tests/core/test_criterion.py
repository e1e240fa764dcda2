"""The losses against their formulas, one query, class and box at a time."""

import math

import pytest
import torch

from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.config import Focal, IoUAware, LossConfig
from core.loss.criterion import build_criterion
from core.types import Prediction, Target


def _targets(*counts):
    generator = torch.Generator().manual_seed(5)
    return tuple(
        Target(
            labels=torch.randint(0, 3, (count,), generator=generator),
            boxes=torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
            annotation_ids=torch.arange(count),
            picture_id=index,
            original_size=(10, 10),
        )
        for index, count in enumerate(counts)
    )


def _prediction(batch, *, layer=0, source="decoder", valid=None, class_agnostic=False):
    generator = torch.Generator().manual_seed(6 + layer)
    return Prediction(
        logits=torch.randn(batch, 5, 3, generator=generator).requires_grad_(),
        boxes=(torch.rand(batch, 5, 4, generator=generator) * 0.4 + 0.1).requires_grad_(),
        source=source,
        layer=layer,
        valid=valid,
        class_agnostic=class_agnostic,
    )


def _oracle(prediction, targets, criterion, classification):
    owned = {}
    for picture, assignment in enumerate(criterion.matcher(prediction, targets)):
        for query, index in zip(assignment.queries.tolist(), assignment.targets.tolist(), strict=True):
            owned[picture, query] = (targets[picture].labels[index].item(), targets[picture].boxes[index])
    sums = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for picture in range(len(targets)):
        for query in range(5):
            label, box = owned.get((picture, query), (None, None))
            if prediction.class_agnostic and label is not None:
                label = 0
            iou = 0.0
            if box is not None:
                predicted = prediction.boxes[picture, query]
                overlap, generalised = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(box))
                iou = overlap.item()
                sums["l1"] += (predicted - box).abs().sum().item()
                sums["giou"] += 1 - generalised.item()
            if prediction.valid is not None and not prediction.valid[picture, query]:
                continue
            for k in range(3):
                p = torch.sigmoid(prediction.logits[picture, query, k]).item()
                sums["class"] += _class_loss(classification, p, positive=k == label, iou=iou)
    number = max(1, sum(len(target.labels) for target in targets))
    return {name: value / number for name, value in sums.items()}


def _class_loss(classification, p, *, positive, iou):
    if isinstance(classification, Focal):
        return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)
    if positive:
        return -iou * (iou * math.log(p) + (1 - iou) * math.log(1 - p))
    return -0.75 * p**2 * math.log(1 - p)


@pytest.mark.parametrize("classification", [Focal(), IoUAware()], ids=lambda part: part.kind)
@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0)])
def test_terms_equal_the_formulas(classification, counts):
    """Class, L1 and GIoU terms are sums over queries and boxes, divided by the boxes of the batch."""
    criterion = build_criterion(LossConfig(classification=classification), encoder_tokens="all")
    prediction, targets = _prediction(2), _targets(*counts)
    terms = {term.name: term for term in criterion((prediction,), targets)}
    expected = _oracle(prediction, targets, criterion, classification)
    assert {name: term.value.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert {name: term.weight for name, term in terms.items()} == {"class": 2, "l1": 5, "giou": 2}


def test_encoder_terms_skip_invalid_tokens_and_ignore_labels_when_class_agnostic():
    """Invalid tokens give no class loss, and a class-agnostic prediction sees every label as 0."""
    valid = torch.tensor([[True, False, True, True, True], [True] * 5])
    criterion = build_criterion(LossConfig(), encoder_tokens="all")
    encoder = _prediction(2, source="encoder", layer=1, valid=valid, class_agnostic=True)
    targets = _targets(2, 2)
    terms = criterion((encoder, _prediction(2)), targets)
    found = {term.name: term.value.item() for term in terms if term.source == "encoder"}
    assert found == pytest.approx(_oracle(encoder, targets, criterion, Focal()), rel=1e-4)


def test_only_the_last_layer_is_trained_without_auxiliary_losses():
    """`auxiliary: false` drops the terms of the earlier decoder layers, and nothing else."""
    predictions = tuple(_prediction(2, layer=layer) for layer in range(3))
    targets = _targets(2, 1)
    with_all = build_criterion(LossConfig(), encoder_tokens="all")(predictions, targets)
    alone = build_criterion(LossConfig(auxiliary=False), encoder_tokens="all")(predictions, targets)
    assert [term.layer for term in with_all] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [(term.layer, term.value.item()) for term in alone] == [(t.layer, t.value.item()) for t in with_all[6:]]


def test_iou_target_gets_no_gradient():
    """The IoU that the class aims at is a number: the class term does not move the boxes."""
    criterion = build_criterion(LossConfig(classification=IoUAware()), encoder_tokens="all")
    prediction = _prediction(2)
    term = next(term for term in criterion((prediction,), _targets(2, 2)) if term.name == "class")
    term.value.backward()
    assert prediction.boxes.grad is None
    assert prediction.logits.grad.abs().sum() > 0
