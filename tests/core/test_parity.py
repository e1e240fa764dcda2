"""Our forward pass against an independent implementation: Hugging Face transformers, with the same random weights.

The two-stage model of transformers has no loss on the encoder's output, so only its forward pass is a reference.
"""

import math
import os
import runpy
import warnings
from pathlib import Path

import pytest
import torch

from core.model.build import build_model
from core.recipes import RECIPES
from core.types import Batch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

NUM_CLASSES = 91
SIZES = ((96, 128), (128, 80))
from_transformers = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "transformers_names.py"))[
    "from_transformers"
]


def _theirs(recipe):
    """Build transformers' model of a recipe with random weights."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        import transformers

        shared = {"use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False, "num_labels": 91}
        if recipe.startswith("detr"):
            config = transformers.DetrConfig(**shared, dilation=recipe.endswith("dc5"))
            model = transformers.DetrForObjectDetection(config)
        else:
            config = transformers.DeformableDetrConfig(
                **shared,
                dilation=recipe.endswith("dc5"),
                num_feature_levels=1 if "single_scale" in recipe else 4,
                with_box_refine=recipe in ("deformable_refine", "deformable_two_stage"),
                two_stage=recipe == "deformable_two_stage",
                two_stage_num_proposals=20,
                num_queries=20,
            )
            model = transformers.DeformableDetrForObjectDetection(config)
    # With some seeds transformers selects invalid tokens in two stages, which here never are (docs/design.md).
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            if value.is_floating_point():
                value.copy_(_drawn(name, value, generator))
    return model.eval()


def _drawn(name, value, generator):
    """Draw a whole tensor: transformers leaves some as they lie in memory until weights are loaded."""
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith("running_var"):
        return 1 + 0.2 * noise.abs()
    if value.ndim > 1:
        embedding = "query_position" in name or "level_embed" in name
        return noise if embedding else noise * math.sqrt((2 if value.ndim == 4 else 1) / value[0].numel())
    if "sampling_offsets" in name:
        return 2 * noise
    norm = name.endswith("weight")
    return 0.1 * noise + (1 if norm else 0)


def _batch():
    generator = torch.Generator().manual_seed(1)
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    images = torch.zeros(len(SIZES), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(SIZES), height, width, dtype=torch.bool)
    for index, (h, w) in enumerate(SIZES):
        images[index, :, :h, :w] = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
        padding_mask[index, :h, :w] = False
    return Batch(images=images, padding_mask=padding_mask, targets=())


def _model(recipe):
    config = RECIPES[recipe].model
    if not recipe.startswith("detr"):  # small pictures have few valid tokens
        config = config.model_copy(update={"queries": config.queries.model_copy(update={"num_queries": 20})})
    softmax = recipe.startswith("detr")
    return build_model(config, num_classes=NUM_CLASSES, seed=0, activation="softmax" if softmax else "sigmoid").eval()


def _pair(recipe):
    """Return transformers' model and ours with the same weights."""
    theirs, model = _theirs(recipe), _model(recipe)
    separate = recipe in ("deformable_refine", "deformable_two_stage")
    state = from_transformers(theirs.state_dict(), plain=recipe.startswith("detr"), one_head=not separate)
    model.load_state_dict(state)
    return theirs, model


def _outputs(theirs, model):
    """Return logits and boxes of the last layer of each on a padded batch of two sizes."""
    batch = _batch()
    pixels = ((batch.images.float() - model.backbone.mean) / model.backbone.std).masked_fill(
        batch.padding_mask[:, None], 0.0
    )
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, pixel_mask=(~batch.padding_mask).long())
        actual = model(batch)[-1]
    return (expected.logits, actual.logits), (expected.pred_boxes, actual.boxes)


@pytest.mark.parametrize(
    "recipe",
    [
        "detr",
        "detr_dc5",
        "deformable",
        "deformable_single_scale",
        "deformable_single_scale_dc5",
        "deformable_refine",
        "deformable_two_stage",
    ],
)
def test_forward_pass_equals_transformers(recipe):
    """Logits and boxes agree to 1e-4 on a padded batch of two sizes, and differ between queries and pictures."""
    for expected, actual in _outputs(*_pair(recipe)):
        if recipe == "deformable_two_stage":  # proposals whose scores nearly tie may come in another order
            apart = torch.cdist(actual, expected, p=torch.inf)
            assert max(apart.amin(1).max(), apart.amin(2).max()) < 1e-4
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert expected.std(1).mean() > 2e-4
        assert (expected[0] - expected[1]).abs().max() > 2e-3


@pytest.mark.parametrize("quirk", ["offset", "padding"])
@pytest.mark.parametrize("recipe", ["detr", "deformable_refine"])
def test_a_small_deviation_would_be_noticed(recipe, quirk):
    """Another offset of the sine, or padding that is not masked, breaks the agreement."""
    theirs, model = _pair(recipe)
    if quirk == "offset":
        model.encoder.position.offset += 0.5
    else:
        forward = model.backbone.forward
        model.backbone.forward = lambda images, padding_mask: forward(images, torch.zeros_like(padding_mask))
    (expected, actual), _ = _outputs(theirs, model)
    assert (expected - actual).abs().max() > 1e-3
