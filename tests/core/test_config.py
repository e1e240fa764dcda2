"""The rules across fields: each refuses what cannot be, says what is wrong, and what to set instead."""

import pytest
from pydantic import ValidationError

from core.config import ExperimentConfig
from core.recipes import RECIPES

SELECTED = {"kind": "selected"}
TOKENS = {"kind": "tokens"}
BOXES = {"kind": "learned", "reference": "box"}
REFINED = {"residual_base": "detached", "sampling_reference": "detached"}
CASES = [
    # Backbones and levels
    ({"model.strides": [16, 8]}, "must rise without repetition"),
    ({"model.backbone": {"kind": "resnet", "depth": 18, "dilation": True}}, "set depth to 50 or 101"),
    ({"model.backbone": {"kind": "timm", "name": "resnet18", "weights": "package"}}, "set weights to null"),
    ({"model.encoder.attention.levels": "own", "model.strides": [32], "model.extra_levels": 0}, "or add levels"),
    # The transformer
    ({"model.hidden_dim": 36, "model.num_heads": 4}, "not divisible by 8 .* choose a multiple"),
    ({"model.hidden_dim": 40, "model.num_heads": 16}, "not divisible by num_heads 16: choose a multiple"),
    ({"model.encoder.attention": {"kind": "dense"}}, "name fewer model.strides, use smaller pictures, set"),
    ({"model.encoder.question": "queries", "model.encoder.num_layers": 0}, "set encoder.num_layers to 1"),
    ({"model.encoder.question": "constant", "model.queries": SELECTED, "model.encoder_supervision": {}}, "to none"),
    # Queries
    ({"model.query_position": "sine_of_reference"}, "set queries.reference to box, or query_position to static"),
    ({"model.queries": SELECTED}, "set encoder_supervision to {labels: binary}"),
    ({"model.queries": TOKENS, "model.encoder_supervision": {}, "model.decoder.num_layers": 0}, "to class_aware"),
    ({"model.decoder.num_layers": 0}, "set queries.kind to tokens and decoder.num_layers to 0, or neither"),
    ({"model.queries": {"kind": "learned", "reference": "none"}}, "or decoder.attention.kind to dense"),
    ({"model.queries": {"kind": "learned", "anchors": "random"}}, "set reference to box or anchors to learned"),
    # Refinement and decoder
    ({"model.refinement.boxes": "recomputed"}, "set residual_base to detached, or boxes to direct"),
    ({"model.refinement": REFINED, "model.decoder.norm": "output_only"}, "set refinement.boxes to recomputed"),
    ({"model.refinement": REFINED, "model.decoder.attention": {"kind": "dense"}}, "moves nothing in a dense decoder"),
    (
        {"model.decoder.num_layers": 0, "model.decoder.norm": "both"},
        "decoder.norm needs decoder layers: set it to none",
    ),
    ({"model.decoder.num_layers": 0, "model.refinement": REFINED}, "refinement needs decoder layers: set"),
    # Supervision and denoising
    ({"model.encoder_supervision": {"tokens": "selected"}}, "set tokens to all"),
    ({"model.encoder_supervision": {"local": True}}, "set layers to all_shared or all_separate"),
    ({"model.encoder_supervision": {"layers": "all_shared"}, "model.encoder.num_layers": 0}, "or layers to last"),
    ({"model.denoising": {"kind": "dn"}}, "and query_position to sine_of_reference"),
    ({"model.denoising": {"kind": "cdn"}, "model.queries": BOXES}, "and query_position to sine_of_reference"),
    ({"model.denoising": {"kind": "dn"}, "model.decoder.num_layers": 0}, "set denoising to null or"),
    # Losses, data, training, scoring
    ({"loss.classification": {"kind": "cross_entropy"}}, "set matcher.cost to probability"),
    (
        {"model.encoder_supervision": {"classification": {"kind": "cross_entropy"}}},
        "set loss.matcher.cost to probability",
    ),
    ({"loss.matcher": {"cost_class": 0.0, "cost_l1": 0.0, "cost_giou": 0.0}}, "raise cost_class"),
    ({"data.resize": {"kind": "fixed"}}, "set augmentation to flip"),
    ({"training.batch_size": 10, "training.accumulate": 3}, "choose a divisor"),
    ({"evaluation.decoder_steps": 9}, "set model.decoder.weights and model.heads to shared"),
    (
        {"model": {"kind": "faster_rcnn"}, "evaluation.decoder_steps": 9},
        "set decoder_steps to null or model.kind to detr",
    ),
]


def _config(changes):
    plain = ExperimentConfig().model_dump(mode="json")
    for key, value in changes.items():
        node = plain
        *around, name = key.split(".")
        for part in around:
            node = node[part]
        node[name] = value
    return ExperimentConfig.model_validate(plain)


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_illegal_combination_is_refused_with_the_remedy(changes, message):
    """Each rule is told in words, with what to change."""
    with pytest.raises(ValidationError, match=message):
        _config(changes)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name):
    """A recipe reads back from what is written of it."""
    assert ExperimentConfig.model_validate(RECIPES[name].model_dump(mode="json")) == RECIPES[name]


def test_extra_levels_follow_a_dilated_last_stage():
    """The guard of dense attention counts tokens by the strides that the levels really have."""
    changes = {"model.strides": [32], "model.encoder.attention": {"kind": "dense"}}
    tokens = 800 * 1333 // 16**2
    dilated = {"kind": "resnet", "dilation": True}
    assert _config({**changes, "model.extra_levels": 0, "model.backbone": dilated})
    with pytest.raises(ValidationError, match=f"some {tokens + 800 * 1333 // 32**2} tokens"):
        _config({**changes, "model.extra_levels": 1, "model.backbone": dilated})
