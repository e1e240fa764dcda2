"""Denoising queries: what they are made of, whom they see, and that nothing of them is left in scoring."""

from dataclasses import replace

import pytest
import torch

from core.config import (
    DN,
    ContrastiveDN,
    Decoder,
    Deformable,
    DeformableSelf,
    Encoder,
    LearnedQueries,
    MatchedExtra,
    ModelConfig,
    SmallResNet,
)
from core.model.build import build_model
from core.model.denoising import ContrastiveDenoising, Denoising
from core.model.detr import blocked_mask
from core.seeding import torch_stream
from core.types import Batch, Target

COUNTS = (3, 1, 0)
KINDS = {"dn": DN(groups=4), "cdn": ContrastiveDN(num_queries=12), "matched": MatchedExtra(groups=4)}


def _batch(counts=COUNTS, *, first_id=0):
    generator = torch.Generator().manual_seed(0)
    targets = tuple(
        Target(
            labels=torch.randint(0, 5, (count,), generator=generator),
            boxes=torch.rand(count, 4, generator=generator) * torch.tensor([0.3, 0.3, 0.2, 0.2])
            + torch.tensor([0.3, 0.3, 0.1, 0.1]),
            annotation_ids=torch.arange(count),
            picture_id=first_id + index,
            original_size=(64, 64),
        )
        for index, count in enumerate(counts)
    )
    images = torch.randint(0, 256, (len(counts), 3, 64, 64), dtype=torch.uint8, generator=generator)
    return Batch(images=images, padding_mask=torch.zeros(len(counts), 64, 64, dtype=torch.bool), targets=targets)


def _model(denoising):
    config = ModelConfig(
        hidden_dim=32,
        num_heads=4,
        ffn_dim=48,
        dropout=0.0,
        backbone=SmallResNet(width=4),
        extra_levels=0,
        encoder=Encoder(num_layers=1, attention=DeformableSelf(num_points=2)),
        decoder=Decoder(num_layers=2, attention=Deformable(num_points=2)),
        queries=LearnedQueries(num_queries=6, reference="box"),
        query_position="sine_of_reference",
        denoising=denoising,
    )
    return build_model(config, num_classes=5, seed=0)


def _queries(kind, batch=None, *, step=0):
    source = _model(KINDS[kind]).query_sources[1]
    return source(None, None, batch or _batch(), torch_stream(7, "loss", step))


@pytest.mark.parametrize(("kind", "queries", "repeats"), [("dn", 12, 4), ("cdn", 24, 4), ("matched", 12, 4)])
def test_number_of_queries(kind, queries, repeats):
    """A group has a slot, or with twins two, for each box of the fullest picture; the control has as many as DN."""
    made = _queries(kind)
    assert made.content.shape == (3, queries, 32)
    assert made.reference.shape == (3, queries, 4)
    assert made.repeats == repeats


def test_groups_follow_the_fullest_picture_of_the_step():
    """Pictures of other processes and parts of the batch count too, so every part makes equal groups."""
    batch = replace(_batch(), box_counts=(*COUNTS, 6))
    assert _queries("dn", batch).content.shape[1] == 4 * 6
    assert _queries("cdn", batch).repeats == 2


@pytest.mark.parametrize("kind", KINDS)
def test_noise_depends_on_the_step_and_the_picture_alone(kind):
    """A picture gets the same queries in other company, and others in another step."""
    whole, alone = _batch(), _batch()
    alone = replace(
        alone,
        images=alone.images[1:2],
        padding_mask=alone.padding_mask[1:2],
        targets=alone.targets[1:2],
        box_counts=COUNTS,
    )
    assert torch.equal(_queries(kind, whole).reference[1:2], _queries(kind, alone).reference)
    assert not torch.equal(_queries(kind, whole).reference, _queries(kind, whole, step=1).reference)


def test_dn_copies_stay_within_the_noise():
    """Centres move by up to the noise times half the sides, sides change by up to the noise, and both do move."""
    source = Denoising(dim=8, num_classes=5, groups=200, label_noise=0.2, box_noise=0.4)
    batch = _batch((3,))
    made = source(None, None, batch, torch_stream(0, "loss", 0))
    truth = batch.targets[0].boxes.repeat(200, 1)
    shift = (made.reference[0] - truth) / truth[:, 2:].repeat(1, 2)
    assert shift[:, :2].abs().max() <= 0.2 + 1e-6
    assert shift[:, 2:].abs().max() <= 0.4 + 1e-6
    assert shift[:, :2].abs().max() > 0.19
    assert shift[:, 2:].abs().max() > 0.38
    assert shift.mean(0).abs().max() < 0.03


def test_share_of_flipped_labels():
    """A label is replaced by a random class with the given probability, which may be the class itself."""
    source = Denoising(dim=8, num_classes=5, groups=4000, label_noise=0.3, box_noise=0.0)
    flipped = source._flip(torch.full((4000,), 2), torch_stream(0, "labels"))
    assert (flipped != 2).float().mean() == pytest.approx(0.3 * 4 / 5, abs=0.03)


def test_contrastive_twins_are_further_away():
    """A copy's corners move by less than the noise of half the sides, its twin's by one to two times that."""
    source = ContrastiveDenoising(dim=8, num_classes=5, num_queries=300, label_noise=0.0, box_noise=0.4)
    batch = _batch((3,))
    made = source(None, None, batch, torch_stream(0, "loss", 0))
    groups = made.reference[0].view(100, 2, 3, 4)
    truth = batch.targets[0].boxes

    def corners(boxes):
        return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)

    moved = (corners(groups) - corners(truth)).abs() / (truth[:, 2:].repeat(1, 2) / 2)
    assert moved[:, 0].max() <= 0.4 + 1e-5
    assert moved[:, 1].min() >= 0.4 - 1e-5
    assert moved[:, 1].max() <= 0.8 + 1e-5


@pytest.mark.parametrize("kind", ["dn", "cdn"])
def test_each_copy_knows_its_box(kind):
    """Every true box is assigned once in each group, to the copy that was made of it; twins and empty slots to none."""
    batch, made = _batch(), _queries(kind)
    slots = made.content.shape[1] // made.repeats
    for picture, (target, assignment) in enumerate(zip(batch.targets, made.assignments, strict=True)):
        count = len(target.labels)
        assert len(assignment.queries) == made.repeats * count
        assert assignment.targets.tolist() == list(range(count)) * made.repeats
        groups, places = assignment.queries // slots, assignment.queries % slots
        assert groups.tolist() == [group for group in range(made.repeats) for _ in range(count)]
        assert (places < slots // (2 if kind == "cdn" else 1)).all()
        distance = (made.reference[picture, assignment.queries] - target.boxes[assignment.targets]).abs()
        assert not count or distance.max() < 0.3


def test_dn_leaves_empty_slots_out_and_cdn_takes_them_as_no_object():
    """As in the official codes: DN's loss is over real copies, contrastive DN's over all of its queries."""
    assert _queries("dn").valid.sum(1).tolist() == [12, 4, 0]
    assert _queries("cdn").valid is None


def test_who_sees_whom():
    """Matched queries see themselves alone; each group sees itself and the matched ones."""
    model = _model(DN(groups=2))
    batch = _batch((2, 1, 1))
    generator = torch_stream(0, "loss", 0)
    memory = model.encoder(model.neck(model.backbone(batch.images, batch.padding_mask), batch.padding_mask))
    sets = [source(memory, None, batch, generator) for source in model.query_sources]
    seen = ~blocked_mask(sets)
    assert seen[:6].tolist() == [[True] * 6 + [False] * 4] * 6
    assert seen[6:8].tolist() == [[True] * 8 + [False] * 2] * 2
    assert seen[8:].tolist() == [[True] * 6 + [False] * 2 + [True] * 2] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_matched_predictions_do_not_change(kind):
    """The same model without denoising starts from the same weights and predicts the same for its own queries."""
    batch = _batch()
    plain = _model(None)(batch, torch_stream(0, "loss", 0))
    with_noise = _model(KINDS[kind])(batch, torch_stream(0, "loss", 0))
    own = [prediction for prediction in with_noise if prediction.group == "matched"]
    assert len(with_noise) == 2 * len(plain)
    for ours, expected in zip(own, plain, strict=True):
        torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.boxes, expected.boxes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_in_scoring(kind):
    """Without a generator there are no extra queries, so scoring costs what it costs without denoising."""
    predictions = _model(KINDS[kind]).eval()(_batch())
    assert {prediction.group for prediction in predictions} == {"matched"}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_boxes_have_no_extra_queries(kind):
    """A batch of empty pictures trains on the matched queries alone."""
    assert _queries(kind, _batch((0, 0))) is None
