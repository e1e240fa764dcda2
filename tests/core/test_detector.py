"""DETR as a detector: which of the model's predictions it trains and detects with."""

from dataclasses import replace

import pytest
import torch
from loss_oracle import given, prediction_of, targets_of

from core.config import EvaluationConfig, ExperimentConfig, LossConfig, Matcher, ModelConfig
from core.detector import DetrDetector, build_detector
from core.evaluation.postprocess import recalled, to_detections
from core.loss.criterion import build_criterion
from core.types import Batch

TARGETS = targets_of(2, 1)
BATCH = Batch(
    images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), padding_mask=torch.zeros(2, 8, 8, dtype=bool), targets=TARGETS
)
SMALL = {
    "hidden_dim": 16,
    "num_heads": 2,
    "ffn_dim": 16,
    "backbone": {"kind": "small_resnet", "width": 4},
    "encoder": {"num_layers": 1, "attention": {"kind": "deformable", "num_points": 1}},
    "decoder": {"num_layers": 2, "attention": {"kind": "deformable", "num_points": 1}},
}


class Fixed(torch.nn.Module):
    """A model that always says the same."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = predictions
        self.calls = []

    def forward(self, _batch, *generator, **asked):
        """Say it, and note what was asked."""
        self.calls.append((*generator, asked))
        return self.predictions


ROWS = (
    prediction_of(2, num_queries=20, source="encoder", layer=1),
    prediction_of(2, num_queries=20, source="encoder", layer=2, valid=torch.arange(20).expand(2, -1) > 2),
    *(
        row
        for layer in (0, 1)
        for row in (
            prediction_of(2, num_queries=6, layer=layer),
            prediction_of(
                2, num_queries=8, layer=layer, source="denoising", matching="given", assignments=given([(0, 1)], [])
            ),
        )
    ),
)


def _detector(predictions=ROWS, *, loss=LossConfig(), **changes):  # noqa: B008 - frozen
    criterion = build_criterion(loss, encoder_supervision=None)
    values = {"classes_per_query": "all", "num_selected": None, "decoder_steps": None, **changes}
    return DetrDetector(model=Fixed(predictions), criterion=criterion, **values)


def _pairs(found):
    return [(one.queries.tolist(), one.labels.tolist(), one.gt_ids.tolist(), one.recalled) for one in found]


@pytest.mark.parametrize("classes_per_query", ["all", "one"])
def test_the_decoders_last_layer_detects(classes_per_query):
    """Denoising rows come after it and do not count; the true boxes are given out by one-to-one matching."""
    detector = _detector(classes_per_query=classes_per_query, loss=LossConfig(matcher=Matcher(repeats=3)))
    last = ROWS[-2]
    assignments = detector.criterion.matcher(last, TARGETS)
    assert [len(assignment.queries) for assignment in assignments] == [2, 1]
    expected = to_detections(last, TARGETS, assignments, top_k=5, classes_per_query=classes_per_query)
    assert _pairs(detector.detect(BATCH, top_k=5)) == _pairs(expected)
    assert detector.predict(BATCH) is last


def test_tokens_detect_without_a_decoder():
    """The last encoder layer's valid tokens are then what is detected."""
    detector = _detector(ROWS[:2])
    expected = to_detections(ROWS[1], TARGETS, given([], []), top_k=100, classes_per_query="all")
    found = detector.detect(BATCH, top_k=100)
    assert [one.scores.tolist() for one in found] == [one.scores.tolist() for one in expected]
    assert min(found[0].queries.tolist()) == 3


def test_recall_is_that_of_the_last_encoder_layers_selected_tokens():
    """Where queries are selected, each picture says how many of its true boxes the selected tokens are near."""
    with torch.no_grad():
        row = replace(ROWS[1], boxes=ROWS[1].boxes.clone())
        row.boxes[0, 5] = TARGETS[0].boxes[1]
    found = _detector((ROWS[0], row, *ROWS[2:]), num_selected=17).detect(BATCH, top_k=5)
    counts = recalled(row, TARGETS, count=17)
    assert [one.recalled for one in found] == counts
    assert counts[0] > 0
    assert [one.recalled for one in _detector().detect(BATCH, top_k=5)] == [None, None]


@pytest.mark.parametrize(("steps", "asked"), [(None, {}), (9, {"decoder_steps": 9})])
def test_decoder_steps_are_asked_when_detecting_only(steps, asked):
    """The model runs its own number of layers unless the evaluation names another, and in training always."""
    detector = _detector(decoder_steps=steps)
    generator = torch.Generator()
    detector.detect(BATCH, top_k=5)
    detector.loss(BATCH, generator)
    assert detector.model.calls == [(asked,), (generator, {})]


def test_losses_are_divided_by_the_boxes_of_the_step():
    """A batch that is part of a step says so, and its box losses shrink as much."""
    alone = _detector().loss(BATCH, torch.Generator())
    part = _detector().loss(replace(BATCH, box_counts=(2, 1, 3, 0, 6)), torch.Generator())
    ratios = [ours.value.item() / theirs.value.item() for ours, theirs in zip(alone, part, strict=True)]
    assert ratios == pytest.approx([4] * len(alone))


def test_a_config_decides_how_its_detector_detects():
    """The evaluation's fields and the kind of queries reach the detector, and the encoder's the criterion."""
    model = {
        **SMALL,
        "queries": {"kind": "selected", "num_queries": 7},
        "encoder_supervision": {"labels": "class_aware", "tokens": "selected", "weight": 3.0},
        "decoder": {**SMALL["decoder"], "weights": "shared"},
    }
    config = ExperimentConfig(
        model=ModelConfig.model_validate(model),
        loss=LossConfig(matcher=Matcher(repeats=2)),
        evaluation=EvaluationConfig(classes_per_query="one", decoder_steps=4),
    )
    detector = build_detector(config, num_classes=3, seed=0)
    assert (detector.classes_per_query, detector.num_selected, detector.decoder_steps) == ("one", 7, 4)
    criterion = detector.criterion
    assert (criterion.repeats, criterion.encoder_tokens, criterion.encoder_weight) == (2, "selected", 3.0)
    learned = build_detector(ExperimentConfig(model=ModelConfig.model_validate(SMALL)), num_classes=3, seed=0)
    assert (learned.classes_per_query, learned.num_selected, learned.decoder_steps) == ("all", None, None)
