"""The losses one picture, query and class at a time, in plain Python: slow, and nothing to misread."""

import math

import torch

from core.types import Assignment, Prediction, Target

NUM_CLASSES = 3


def targets_of(*counts, seed=5):
    """Return pictures with that many boxes."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        Target(
            labels=torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            boxes=torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
            annotation_ids=torch.arange(count),
            picture_id=index,
            original_size=(10, 10),
        )
        for index, count in enumerate(counts)
    )


def prediction_of(batch, *, num_queries=5, seed=6, activation="sigmoid", source="decoder", layer=0, **rest):
    """Return drawn logits and boxes."""
    generator = torch.Generator().manual_seed(seed + layer)
    columns = NUM_CLASSES + (activation == "softmax")
    return Prediction(
        logits=torch.randn(batch, num_queries, columns, generator=generator).requires_grad_(),
        boxes=(torch.rand(batch, num_queries, 4, generator=generator) * 0.4 + 0.1).requires_grad_(),
        source=source,
        layer=layer,
        activation=activation,
        **rest,
    )


def given(*pairs):
    """Return assignments from the (query, target) pairs of each picture."""
    return tuple(
        Assignment(
            queries=torch.tensor([query for query, _ in own], dtype=torch.int64),
            targets=torch.tensor([target for _, target in own], dtype=torch.int64),
        )
        for own in pairs
    )


def overlaps(box, other):
    """Return IoU and generalised IoU of two (cx, cy, w, h)."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in (box, other)
    )
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union, overlap / union - (hull - union) / hull


def class_loss(classification, logits, labels, iou, valid, counts, repeats):
    """Return the normalised class loss of nested lists, from the formulas of the papers.

    `labels` and `iou` have one number a query, `valid` as well or it is None.
    """
    if classification.kind == "cross_entropy":
        return _cross_entropy(classification.no_object_weight, logits, labels, valid, counts, repeats)
    total = 0.0
    for picture, rows in enumerate(logits):
        for query, row in enumerate(rows):
            if valid is None or valid[picture][query]:
                for k, logit in enumerate(row):
                    positive = k == labels[picture][query]
                    total += _of_logit(classification, logit, positive=positive, iou=iou[picture][query])
    return total / (max(1, sum(counts)) * repeats)


def _of_logit(classification, logit, *, positive, iou):
    p = 1 / (1 + math.exp(-logit))
    alpha, gamma = classification.alpha, classification.gamma
    if classification.kind == "focal":
        if positive:
            return -alpha * (1 - p) ** gamma * math.log(p)
        return -(1 - alpha) * p**gamma * math.log(1 - p)
    if positive:
        return -iou * (iou * math.log(p) + (1 - iou) * math.log(1 - p))
    return -alpha * p**gamma * math.log(1 - p)


def _cross_entropy(no_object_weight, logits, labels, valid, counts, repeats):
    total, of_pictures = 0.0, 0.0
    for picture, rows in enumerate(logits):
        own, own_weight = 0.0, 0.0
        for query, row in enumerate(rows):
            if valid is None or valid[picture][query]:
                weight = no_object_weight if labels[picture][query] == len(row) - 1 else 1.0
                own -= weight * math.log(math.exp(row[labels[picture][query]]) / sum(map(math.exp, row)))
                own_weight += weight
        total += own
        of_pictures += own / own_weight if own_weight else 0.0
    if valid is not None:
        return of_pictures / len(counts)
    step_weight = 0.0
    for count in counts:
        for query in range(len(logits[0])):
            step_weight += 1.0 if query < count * repeats else no_object_weight
    return total / step_weight


def terms(prediction, targets, assignments, classification, counts):
    """Return class, L1 and GIoU terms of a prediction whose matches are known."""
    num_queries = prediction.logits.shape[1]
    labels = [[prediction.num_classes] * num_queries for _ in targets]
    iou = [[0.0] * num_queries for _ in targets]
    l1, giou = 0.0, 0.0
    for picture, (target, assignment) in enumerate(zip(targets, assignments, strict=True)):
        for query, index in zip(assignment.queries.tolist(), assignment.targets.tolist(), strict=True):
            box, true = prediction.boxes[picture, query].tolist(), target.boxes[index].tolist()
            labels[picture][query] = 0 if prediction.class_agnostic else target.labels[index].item()
            iou[picture][query], generalised = overlaps(box, true)
            l1 += sum(abs(a - b) for a, b in zip(box, true, strict=True))
            giou += 1 - generalised
    valid = None if prediction.valid is None else prediction.valid.tolist()
    number = max(1, sum(counts)) * prediction.repeats
    of_class = class_loss(classification, prediction.logits.tolist(), labels, iou, valid, counts, prediction.repeats)
    return {"class": of_class, "l1": l1 / number, "giou": giou / number}
