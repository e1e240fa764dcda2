"""The model as a whole: sizes of the published models, padding, starting weights, gradients."""

import pytest
import torch

from core.config import (
    Decoder,
    Deformable,
    DeformableSelf,
    Dense,
    Encoder,
    EncoderSupervision,
    LearnedQueries,
    LossConfig,
    ModelConfig,
    Refinement,
    SelectedQueries,
    SmallResNet,
    Window,
)
from core.loss.criterion import build_criterion
from core.model.build import build_model
from core.model.detr import blocked_mask, join
from core.types import Batch, FeaturePyramid, QuerySet, Target

SMALL = {
    "hidden_dim": 32,
    "num_heads": 4,
    "ffn_dim": 48,
    "dropout": 0.0,
    "backbone": SmallResNet(width=4),
    "encoder": Encoder(num_layers=2, attention=DeformableSelf(num_points=2)),
    "decoder": Decoder(num_layers=2, attention=Deformable(num_points=2)),
    "queries": LearnedQueries(num_queries=6),
}
DETACHED = Refinement(residual_base="detached", sampling_reference="detached")
KINDS = {
    "points": {},
    "points_refined": {"refinement": DETACHED, "heads": "separate"},
    "boxes": {
        "queries": LearnedQueries(num_queries=6, reference="box"),
        "query_position": "sine_of_reference",
        "refinement": DETACHED,
        "heads": "separate",
    },
    "boxes_static": {"queries": LearnedQueries(num_queries=6, reference="box")},
    "two_stage": {
        "queries": SelectedQueries(num_queries=6),
        "encoder_supervision": EncoderSupervision(),
        "refinement": DETACHED,
        "heads": "separate",
    },
    "two_stage_sine": {
        "queries": SelectedQueries(num_queries=6),
        "query_position": "sine_of_reference",
        "encoder_supervision": EncoderSupervision(labels="class_aware", tokens="selected"),
        "refinement": DETACHED,
    },
    "supervised_encoder": {"encoder_supervision": EncoderSupervision(labels="class_aware")},
}


def _model(kind="boxes", *, seed=0, **changes):
    return build_model(ModelConfig(**{**SMALL, **KINDS[kind], **changes}), num_classes=3, seed=seed)


def _batch(*sizes, seed=0):
    """Pictures of the given (H, W), padded to the largest."""
    generator = torch.Generator().manual_seed(seed)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    images = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    targets = []
    for index, (h, w) in enumerate(sizes):
        images[index, :, :h, :w] = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
        padding_mask[index, :h, :w] = False
        boxes = torch.rand(2, 4, generator=generator) * 0.3 + 0.2
        labels = torch.randint(0, 3, (2,), generator=generator)
        targets.append(
            Target(
                labels=labels,
                boxes=boxes,
                annotation_ids=torch.arange(2),
                picture_id=index,
                original_size=(h, w),
            )
        )
    return Batch(images=images, padding_mask=padding_mask, targets=tuple(targets))


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient(kind):
    """Nothing is built that the loss cannot reach, whatever the queries."""
    model = _model(kind)
    for module in model.modules():  # last layers start at zero, where earlier ones get an exactly zero gradient
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.1)
    batch = _batch((64, 96), (96, 64))
    supervision = KINDS[kind].get("encoder_supervision")
    criterion = build_criterion(LossConfig(), encoder_supervision=supervision)
    sum(term.value for term in criterion(model(batch), batch.targets, batch.counts)).backward()
    unreached = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert unreached == []


class _Given(torch.nn.Module):
    """Stands where the backbone and the neck stand, and gives a pyramid."""

    def __init__(self, pyramid):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, *_inputs, **_named):
        """Give it."""
        return self.pyramid


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_predictions(kind):
    """Encoder, queries and decoder predict the same from a pyramid alone as from one padded with rubbish.

    (The backbone's convolutions and the neck's GroupNorm do see the padding, in the reference as here.)
    """
    model = _model(kind).eval()
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(1, 32, h, w, generator=generator) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2))]
    padded_maps, masks = [], []
    for level in maps:
        height, width = level.shape[-2:]
        larger = torch.full((1, 32, 2 * height, height + width), 7.0)
        larger[..., :height, :width] = level
        mask = torch.ones(1, 2 * height, height + width, dtype=torch.bool)
        mask[:, :height, :width] = False
        padded_maps.append(larger)
        masks.append(mask)
    alone = FeaturePyramid(
        features=tuple(maps), padding_masks=tuple(torch.zeros_like(level[:, 0], dtype=torch.bool) for level in maps)
    )
    padded = FeaturePyramid(features=tuple(padded_maps), padding_masks=tuple(masks))
    model.backbone = _Given(())
    batch = _batch((64, 96))
    outputs = []
    for pyramid in (alone, padded):
        model.neck = _Given(pyramid)
        outputs.append(model(batch)[-1])
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0].boxes, outputs[1].boxes, rtol=1e-4, atol=1e-5)


ATTENTIONS = {
    **KINDS,
    "dense": {"encoder": Encoder(num_layers=1, attention=Dense()), "decoder": Decoder(num_layers=2, attention=Dense())},
    "window": {"encoder": Encoder(num_layers=1, attention=Window(radius=1))},
    "own level": {"encoder": Encoder(num_layers=1, attention=DeformableSelf(num_points=2, levels="own"))},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_short_way_without_padding_gives_the_same(kind):
    """A batch that says that nothing is padded is computed with fewer operations, to the same numbers."""
    model = build_model(ModelConfig(**{**SMALL, **ATTENTIONS[kind]}), num_classes=3, seed=0)
    batch = _batch((64, 96), (64, 96))
    known = batch.to(torch.device("cpu"))
    assert batch.padded
    assert not known.padded
    for found, expected in zip(model(known), model(batch), strict=True):
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-6)


def test_padding_is_found_when_a_batch_is_moved():
    """A single padded picture makes the batch a padded one."""
    assert _batch((64, 96), (64, 95)).to(torch.device("cpu")).padded


def test_what_scoring_leaves_behind_serves_training():
    """Positions that were computed for scoring, and for pictures of another size, do not stand in training's way."""
    model = _model("points")
    sizes = [(64, 96), (96, 64)]
    batches = [_batch(size, size).to(torch.device("cpu")) for size in sizes]
    with torch.inference_mode():
        scored = [model(batch)[-1].boxes.clone() for batch in batches]
    for batch, boxes in zip(batches, scored, strict=True):
        trained = model(batch)[-1].boxes
        trained.sum().backward()
        fresh = _model("points")(batch)[-1].boxes
        torch.testing.assert_close(trained, fresh, rtol=0, atol=0)
        torch.testing.assert_close(trained, boxes, rtol=1e-4, atol=1e-4)  # batch norm learns in between


def test_start_depends_on_the_seed_alone():
    """The same seed gives the same weights, another seed others."""
    first, again, other = (_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["query_sources.0.content.weight"], other["query_sources.0.content.weight"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "points"])
def test_shared_parts_start_equal_whatever_the_toggles(kind):
    """A toggle that adds or removes a part leaves the starting weights of all common parts as they were."""
    base, other = _model("points").state_dict(), _model(kind).state_dict()
    shared = [name for name in base if name in other and base[name].shape == other[name].shape]
    assert len(shared) > 80
    different = [name for name in shared if not torch.equal(base[name], other[name])]
    assert all("box_head" in name and name.endswith("last.bias") for name in different)  # where the size is predicted


def test_global_random_state_is_left_alone():
    """Building a model draws nothing from torch's global generator."""
    state = torch.get_rng_state()
    _model()
    assert torch.equal(state, torch.get_rng_state())


def test_query_sets_are_joined_and_kept_apart():
    """Two groups are concatenated, each seeing what it may; a single one needs no mask."""
    sets = [
        QuerySet(
            content=torch.full((1, size, 4), float(size)),
            position=None,
            reference=torch.rand(1, size, 4),
            group=group,
            sees=sees,
        )
        for size, group, sees in [
            (2, "matched", frozenset({"matched"})),
            (3, "noised", frozenset({"matched", "noised"})),
        ]
    ]
    assert join(sets).content[0, :, 0].tolist() == [2, 2, 3, 3, 3]
    assert blocked_mask(sets).int().tolist() == [[0, 0, 1, 1, 1]] * 2 + [[0, 0, 0, 0, 0]] * 3
    assert blocked_mask(sets[:1]) is None


def test_too_few_tokens_are_told():
    """Selecting more queries than a picture has valid tokens is an error that says what to change."""
    model = _model("two_stage", queries=SelectedQueries(num_queries=300))
    with pytest.raises(ValueError, match=r"300 queries are asked of \d+ valid tokens: lower model.queries.num_queries"):
        model(_batch((64, 64)))
