"""Matching: the least cost over all ways to match."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from loss_oracle import given, overlaps, prediction_of, targets_of

from core.loss.matcher import HungarianMatcher
from core.types import Prediction

FOCAL = HungarianMatcher(cost="focal", cost_class=2, cost_l1=5, cost_giou=2)
PROBABILITY = HungarianMatcher(cost="probability", cost_class=1, cost_l1=5, cost_giou=2)
CASES = {
    "focal": (FOCAL, "sigmoid"),
    "sigmoid probability": (PROBABILITY, "sigmoid"),
    "softmax probability": (PROBABILITY, "softmax"),
}
COSTS = pytest.mark.parametrize(("matcher", "activation"), CASES.values(), ids=CASES)


def _cost(matcher, prediction, target, picture, query, index):
    """The cost of one pair, from the definitions alone."""
    label = 0 if prediction.class_agnostic else int(target.labels[index])
    logits = prediction.logits[picture, query].tolist()
    if prediction.activation == "softmax":
        p = math.exp(logits[label]) / sum(map(math.exp, logits))
    else:
        p = 1 / (1 + math.exp(-logits[label]))
    if matcher.cost == "focal":
        of_class = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
    else:
        of_class = -p
    box, true = prediction.boxes[picture, query].tolist(), target.boxes[index].tolist()
    l1 = sum(abs(a - b) for a, b in zip(box, true, strict=True))
    return matcher.cost_class * of_class + matcher.cost_l1 * l1 - matcher.cost_giou * overlaps(box, true)[1]


def _least(costs, queries, places):
    """The least cost of giving different `queries` to `places` (box numbers, any may be repeated), of all ways."""
    if len(queries) >= len(places):
        return min(
            sum(costs[query][box] for query, box in zip(chosen, places, strict=True))
            for chosen in permutations(queries, len(places))
        )
    return min(
        sum(costs[query][box] for query, box in zip(queries, chosen, strict=True))
        for chosen in permutations(places, len(queries))
    )


def _all_costs(matcher, prediction, targets, picture):
    target = targets[picture]
    return [
        [_cost(matcher, prediction, target, picture, query, index) for index in range(len(target.labels))]
        for query in range(prediction.logits.shape[1])
    ]


def _pairs(assignment):
    return list(zip(assignment.queries.tolist(), assignment.targets.tolist(), strict=True))


@COSTS
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize(("num_queries", "counts"), [(4, (3, 1, 0)), (5, (5, 2)), (2, (4, 1))])
def test_matching_is_the_best_of_all_permutations(matcher, activation, num_queries, counts, class_agnostic):
    """The matched cost is the least of every one-to-one matching, also with more boxes than queries and with none."""
    prediction = prediction_of(
        len(counts), num_queries=num_queries, activation=activation, class_agnostic=class_agnostic
    )
    targets = targets_of(*counts, seed=sum(counts))
    for picture, assignment in enumerate(matcher(prediction, targets)):
        costs = _all_costs(matcher, prediction, targets, picture)
        pairs = _pairs(assignment)
        assert len(pairs) == min(num_queries, counts[picture])
        assert len({query for query, _ in pairs}) == len({index for _, index in pairs}) == len(pairs)
        best = _least(costs, range(num_queries), range(counts[picture]))
        assert sum(costs[query][index] for query, index in pairs) == pytest.approx(best, abs=1e-5)


@COSTS
def test_costs_equal_the_definitions(matcher, activation):
    """Every pair's cost, not only the sum of the best ones."""
    prediction, targets = prediction_of(2, activation=activation), targets_of(3, 2)
    costs = matcher.costs(prediction, targets)
    for picture, target in enumerate(targets):
        expected = _all_costs(matcher, prediction, targets, picture)
        assert costs[picture, :, : len(target.labels)] == pytest.approx(torch.tensor(expected).numpy(), abs=1e-5)


@pytest.mark.parametrize(("num_queries", "counts", "repeats"), [(6, (2, 1, 0), 2), (4, (2,), 3), (3, (1,), 3)])
def test_one_to_many_is_the_best_of_all_ways_to_repeat_the_boxes(num_queries, counts, repeats):
    """Each box has up to `repeats` queries of its own, at the least cost; with too few queries all of them are used."""
    prediction = prediction_of(len(counts), num_queries=num_queries, matching="one_to_many", repeats=repeats)
    targets = targets_of(*counts)
    for picture, assignment in enumerate(FOCAL(prediction, targets)):
        pairs = _pairs(assignment)
        assert len(pairs) == len({query for query, _ in pairs}) == min(num_queries, repeats * counts[picture])
        assert all(assignment.targets.tolist().count(index) <= repeats for index in range(counts[picture]))
        costs = _all_costs(FOCAL, prediction, targets, picture)
        places = [index for index in range(counts[picture]) for _ in range(repeats)]
        best = _least(costs, range(num_queries), places)
        assert sum(costs[query][index] for query, index in pairs) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("counts", [(2, 1, 0), (4,)])
def test_each_group_side_by_side_is_matched_alone(counts):
    """Queries 0 to 2 are matched as if 3 to 5 were not there, and the other way round."""
    prediction = prediction_of(len(counts), num_queries=6, group="extra", source="auxiliary", repeats=2)
    targets = targets_of(*counts)
    parts = [
        Prediction(logits=prediction.logits[:, part], boxes=prediction.boxes[:, part], source="decoder", layer=0)
        for part in (slice(0, 3), slice(3, 6))
    ]
    halves = [FOCAL(part, targets) for part in parts]
    for both, first, second in zip(FOCAL(prediction, targets), *halves, strict=True):
        assert _pairs(both) == _pairs(first) + [(query + 3, index) for query, index in _pairs(second)]


def test_given_matches_are_not_questioned():
    """Denoising queries keep the boxes that they were made from, whatever it costs."""
    assignments = given([(4, 0), (0, 1)])
    prediction = prediction_of(1, source="denoising", matching="given", assignments=assignments)
    assert FOCAL(prediction, targets_of(2)) is assignments


def test_a_picture_is_matched_alone_as_in_a_batch():
    """Other pictures of the batch do not change an assignment."""
    prediction, targets = prediction_of(2, num_queries=6), targets_of(3, 5)
    together = FOCAL(prediction, targets)
    for picture in range(2):
        alone = replace(prediction, logits=prediction.logits[picture, None], boxes=prediction.boxes[picture, None])
        (assignment,) = FOCAL(alone, (targets[picture],))
        assert _pairs(assignment) == _pairs(together[picture])


def test_invalid_queries_are_matched_last():
    """An invalid token is matched only where no valid one is left."""
    prediction = prediction_of(1, num_queries=4, valid=torch.tensor([[False, True, False, True]]))
    assert sorted(FOCAL(prediction, targets_of(2))[0].queries.tolist()) == [1, 3]
    assert len(FOCAL(prediction, targets_of(3))[0].queries) == 3


def test_costs_are_computed_in_single_precision():
    """Half-precision outputs under autocast are matched as the same numbers in single precision."""
    prediction, targets = prediction_of(2, num_queries=30), targets_of(9, 7)
    half = replace(prediction, logits=prediction.logits.bfloat16(), boxes=prediction.boxes.bfloat16())
    expected = FOCAL(half.in_fp32(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FOCAL(half, targets)
    assert [_pairs(assignment) for assignment in found] == [_pairs(assignment) for assignment in expected]


@COSTS
def test_outputs_that_are_not_finite_are_refused(matcher, activation):
    """NaN logits end the trial with a message that names the layer, not with a scipy error."""
    prediction = prediction_of(1, num_queries=4, activation=activation)
    with torch.no_grad():
        prediction.logits[0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="decoder layer 0 is not finite"):
        matcher(prediction, targets_of(2))
