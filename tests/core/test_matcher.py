"""Matching: the least cost over all ways to match."""

from itertools import permutations

import pytest
import torch

from core.boxes import cxcywh_to_xyxy
from core.loss.matcher import HungarianMatcher
from core.types import Prediction, Target


def _case(num_queries, counts, seed, *, class_agnostic=False):
    generator = torch.Generator().manual_seed(seed)
    prediction = Prediction(
        logits=torch.randn(len(counts), num_queries, 4, generator=generator),
        boxes=torch.rand(len(counts), num_queries, 4, generator=generator) * 0.4 + 0.1,
        source="decoder",
        layer=0,
        class_agnostic=class_agnostic,
    )
    targets = tuple(
        Target(
            labels=torch.randint(0, 4, (count,), generator=generator),
            boxes=torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
            annotation_ids=torch.arange(count),
            picture_id=index,
            original_size=(100, 100),
        )
        for index, count in enumerate(counts)
    )
    return prediction, targets


def _cost(prediction, target, picture, query, index):
    """The cost of one pair, from the definitions alone: 2 x focal + 5 x L1 - 2 x GIoU."""
    label = 0 if prediction.class_agnostic else int(target.labels[index])
    p = torch.sigmoid(prediction.logits[picture, query, label]).double()
    positive = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8)
    negative = 0.75 * p**2 * -torch.log(1 - p + 1e-8)
    box, true = prediction.boxes[picture, query].double(), target.boxes[index].double()
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = cxcywh_to_xyxy(box).tolist(), cxcywh_to_xyxy(true).tolist()
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    giou = overlap / union - (hull - union) / hull
    return float(2 * (positive - negative) + 5 * (box - true).abs().sum() - 2 * giou)


MATCHER = HungarianMatcher(cost_class=2, cost_l1=5, cost_giou=2)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize(("num_queries", "counts"), [(4, (3, 1, 0)), (5, (5, 2)), (2, (4, 1))])
def test_matching_is_the_best_of_all_permutations(num_queries, counts, class_agnostic):
    """The matched cost is the least of every one-to-one matching, also with more boxes than queries and with none."""
    prediction, targets = _case(num_queries, counts, seed=sum(counts), class_agnostic=class_agnostic)
    for picture, (assignment, target) in enumerate(zip(MATCHER(prediction, targets), targets, strict=True)):
        count = len(target.labels)
        assert len(assignment.queries) == min(num_queries, count)
        pairs = zip(assignment.queries.tolist(), assignment.targets.tolist(), strict=True)
        found = sum(_cost(prediction, target, picture, query, index) for query, index in pairs)
        larger, smaller = max(num_queries, count), min(num_queries, count)
        best = min(
            sum(
                _cost(prediction, target, picture, *((a, b) if num_queries >= count else (b, a)))
                for b, a in enumerate(chosen)
            )
            for chosen in permutations(range(larger), smaller)
        )
        assert found == pytest.approx(best, abs=1e-5)


def test_a_picture_is_matched_alone_as_in_a_batch():
    """Other pictures of the batch do not change an assignment."""
    prediction, targets = _case(6, (3, 5), seed=7)
    together = MATCHER(prediction, targets)
    for picture in range(2):
        alone = Prediction(
            logits=prediction.logits[picture : picture + 1],
            boxes=prediction.boxes[picture : picture + 1],
            source="decoder",
            layer=0,
        )
        (assignment,) = MATCHER(alone, (targets[picture],))
        assert torch.equal(assignment.queries, together[picture].queries)
        assert torch.equal(assignment.targets, together[picture].targets)


def test_invalid_queries_are_matched_last():
    """An invalid token is matched only where no valid one is left."""
    prediction, targets = _case(4, (2,), seed=3)
    valid = torch.tensor([[False, True, False, True]])
    masked = Prediction(logits=prediction.logits, boxes=prediction.boxes, source="encoder", layer=0, valid=valid)
    assert sorted(MATCHER(masked, targets)[0].queries.tolist()) == [1, 3]


def test_outputs_that_are_not_finite_are_refused():
    """NaN logits end the trial with a message that names the layer, not with a scipy error."""
    prediction, targets = _case(4, (2,), seed=3)
    prediction.logits[0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="decoder layer 0 is not finite"):
        MATCHER(prediction, targets)
