"""From predictions to detections, and what the selected proposals recall, by plain loops."""

from dataclasses import replace

import pytest
import torch
from loss_oracle import given, overlaps, prediction_of, targets_of

from core.evaluation.postprocess import detecting, recalled, to_detections

NOTHING = given([], [])


def _scores(prediction, picture, query):
    logits = prediction.logits[picture, query].double()
    return (logits.softmax(-1)[:-1] if prediction.activation == "softmax" else logits.sigmoid()).tolist()


def _expected(prediction, picture, top_k, classes_per_query):
    """Return (score, query, label) of the best pairs, one loop at a time."""
    pairs = []
    for query in range(prediction.logits.shape[1]):
        if prediction.valid is not None and not prediction.valid[picture, query]:
            continue
        scores = [(score, query, label) for label, score in enumerate(_scores(prediction, picture, query))]
        pairs += scores if classes_per_query == "all" else [max(scores)]
    return sorted(pairs, reverse=True)[:top_k]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("classes_per_query", ["all", "one"])
@pytest.mark.parametrize("top_k", [3, 100])
def test_the_best_pairs_or_queries_are_kept(masked, activation, classes_per_query, top_k):
    """Scores, queries, labels and boxes are the best ones, "no object" is no class, and invalid queries are absent."""
    valid = torch.tensor([[True, False, True, False, True], [False] * 5]) if masked else None
    prediction = prediction_of(2, activation=activation, valid=valid, layer=4)
    targets = tuple(replace(target, original_size=(20, 40)) for target in targets_of(0, 0))
    found = to_detections(prediction, targets, NOTHING, top_k=top_k, classes_per_query=classes_per_query)
    for picture, detections in enumerate(found):
        expected = _expected(prediction, picture, top_k, classes_per_query)
        assert detections.scores.tolist() == pytest.approx([score for score, _, _ in expected])
        assert detections.queries.tolist() == [query for _, query, _ in expected]
        assert detections.labels.tolist() == [label for _, _, label in expected]
        boxes = [prediction.boxes[picture, query].tolist() for _, query, _ in expected]
        corners = [
            (40 * (cx - w / 2), 20 * (cy - h / 2), 40 * (cx + w / 2), 20 * (cy + h / 2)) for cx, cy, w, h in boxes
        ]
        assert detections.boxes_xyxy_px.tolist() == [pytest.approx(box, abs=1e-4) for box in corners]
        assert (detections.picture_id, detections.layer, detections.recalled) == (picture, 4, None)
        assert set(detections.gt_ids.tolist()) <= {-1}
    assert masked == (len(found[1].scores) == 0)


def test_a_detection_names_the_true_box_of_its_query():
    """Every detection of a matched query has the annotation's id, those of the others -1."""
    targets = tuple(replace(target, annotation_ids=target.annotation_ids + 70) for target in targets_of(2, 1))
    prediction = prediction_of(2)
    found = to_detections(prediction, targets, given([(4, 0), (1, 1)], []), top_k=100, classes_per_query="all")
    owners = {4: 70, 1: 71}
    assert found[0].gt_ids.tolist() == [owners.get(query, -1) for query in found[0].queries.tolist()]
    assert set(found[1].gt_ids.tolist()) == {-1}


def test_half_precision_outputs_are_scored_in_single_precision():
    """Scores of bf16 logits are not rounded to bf16, where many would tie."""
    prediction = prediction_of(1)
    half = replace(prediction, logits=prediction.logits.bfloat16(), boxes=prediction.boxes.bfloat16())
    (found,) = to_detections(half, targets_of(0), given([]), top_k=15, classes_per_query="all")
    assert found.scores.tolist() == pytest.approx([score for score, _, _ in _expected(half, 0, 15, "all")], abs=1e-6)
    assert found.boxes_xyxy_px.dtype == torch.float32


def test_the_last_decoder_layer_detects_wherever_it_stands():
    """Rows of the encoder, of denoising and of extra queries do not detect; without a decoder the encoder does."""
    rows = {
        (source, layer): prediction_of(1, source=source, layer=layer)
        for source in ("decoder", "encoder", "denoising", "auxiliary")
        for layer in (2, 1)
    }
    assert detecting(tuple(rows.values())) is rows["decoder", 2]
    assert detecting((rows["encoder", 1], rows["encoder", 2])) is rows["encoder", 2]


def test_recall_counts_true_boxes_near_a_selected_proposal():
    """A box counts once if one of the `count` best valid proposals has an IoU of .5 or more with it, of any class."""
    targets = targets_of(6, 0, 5)
    proposals = prediction_of(3, num_queries=40, valid=torch.arange(40).expand(3, -1) != 7, source="encoder")
    for picture, target in enumerate(targets):
        if len(target.boxes):  # one sure hit, at the best place and at an invalid one
            with torch.no_grad():
                proposals.boxes[picture, 3] = target.boxes[0] * 1.05
                proposals.boxes[picture, 7] = target.boxes[1]
                proposals.logits[picture, 3] += 5
                proposals.logits[picture, 7] += 9
    for count in (1, 10, 39):
        expected = []
        for picture, target in enumerate(targets):
            ranked = sorted(
                (query for query in range(40) if query != 7),
                key=lambda query: -max(proposals.logits[picture, query].tolist()),
            )
            boxes = [proposals.boxes[picture, query].tolist() for query in ranked[:count]]
            expected.append(sum(any(overlaps(box, true)[0] >= 0.5 for box in boxes) for true in target.boxes.tolist()))
        assert recalled(proposals, targets, count=count) == expected
        assert expected[0] > 0
