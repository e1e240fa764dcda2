"""Faster R-CNN: learns, detects within the picture, repeats itself, and looks at pictures of any size alike."""

import json
from dataclasses import replace

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, batched_nms, box_iou

from core.boxes import cxcywh_to_xyxy
from core.config import ExperimentConfig
from core.data.batching import collate
from core.data.splits import open_data
from core.detector import build_detector
from core.model.regions import FAR_PX, LevelPool, ScaledAnchors
from core.optimisation import parameter_groups
from core.seeding import torch_stream
from core.trainer import Trainer
from core.types import Batch, Target

CPU = torch.device("cpu")
SMALL = {"kind": "small_resnet", "width": 8}
RESNET18 = {"kind": "resnet", "depth": 18, "frozen_batch_norm": False, "frozen_stages": 0}


def _config(backbone=SMALL, **changes):
    model = {
        "kind": "faster_rcnn",
        "backbone": backbone,
        "fpn_dim": 16,
        "head_dim": 32,
        "anchor_scale": 0.1,
        "proposals": 50,
        **changes,
    }
    text = {
        "model": model,
        "data": {"kind": "shapes", "side": 64, "num_train": 8, "num_val": 8, "augmentation": "none"},
        "training": {"epochs": 100, "batch_size": 8, "lr": 3e-3, "lr_backbone": 3e-3, "warmup_steps": 20},
    }
    return ExperimentConfig.model_validate_json(json.dumps(text))


@pytest.fixture(scope="module")
def data():
    """Eight pictures to train on, and eight others."""
    return open_data(_config().data, root=None, cache=None)


@pytest.fixture(scope="module")
def trained(data):
    """A detector after sixty steps, and the total losses on the way."""
    trainer = Trainer(_config(), seed=0, data=data, device=CPU)
    totals = [trainer.step()[0]["total"] for _ in range(60)]
    return trainer.detector.eval(), totals


def _batch(*sizes, boxes=3):
    """Pictures of noise, of the given (H, W), padded to the largest, with `boxes` true boxes each."""
    generator = torch.Generator().manual_seed(0)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    images = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    targets = []
    for index, (h, w) in enumerate(sizes):
        images[index, :, :h, :w] = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
        padding_mask[index, :h, :w] = False
        targets.append(
            Target(
                labels=torch.arange(boxes) % 2,
                boxes=torch.rand(boxes, 4, generator=generator) * 0.3 + 0.3,
                annotation_ids=torch.arange(boxes) + 10,
                picture_id=index,
                original_size=(2 * h, 3 * w),
            )
        )
    return Batch(images=images, padding_mask=padding_mask, targets=tuple(targets))


def _loss(detector, batch, seed=0):
    return detector.loss(batch, torch_stream(seed, "loss"))


@pytest.mark.parametrize("model", [{"kind": "faster_rcnn"}, {"kind": "custom", "target": "mine:Detector"}])
def test_decoder_steps_are_refused_without_a_decoder(model):
    """What would repeat layers of DETR's decoder is an error where there is none, with the remedy."""
    plain = {"model": model, "evaluation": {"decoder_steps": 3}}
    message = f"evaluation.decoder_steps .* model.kind is {model['kind']}: set decoder_steps to null or model.kind to"
    with pytest.raises(ValidationError, match=message):
        ExperimentConfig.model_validate(plain)
    ExperimentConfig.model_validate(plain | {"evaluation": {"decoder_steps": None}})


@pytest.mark.parametrize("backbone", [SMALL, RESNET18], ids=["small_resnet", "resnet18"])
def test_two_steps_train_every_parameter(data, backbone):
    """Through the trainer, the four terms are finite and every trainable tensor moves, whatever the backbone."""
    trainer = Trainer(_config(backbone), seed=0, data=data, device=CPU)
    before = {name: p.detach().clone() for name, p in trainer.detector.named_parameters() if p.requires_grad}
    for _ in range(2):
        losses, norm = trainer.step()
    assert set(losses) == {"total", "encoder/class", "encoder/l1", "decoder/class", "decoder/l1"}
    assert losses["total"] == pytest.approx(sum(v for name, v in losses.items() if name != "total"), rel=1e-5)
    assert norm > 0
    after = dict(trainer.detector.named_parameters())
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


def test_the_loss_falls(trained):
    """Sixty steps on eight pictures bring the loss below a third."""
    totals = trained[1]
    assert sum(totals[-5:]) < sum(totals[:5]) / 3


def test_detections_are_sorted_and_within_the_picture(trained, data):
    """At most top_k a picture, best first, in pixels of the original picture, no pair twice."""
    detector = trained[0]
    batch = collate([data.train.read(index) for index in range(3)])
    batch = replace(batch, targets=tuple(replace(target, original_size=(128, 192)) for target in batch.targets))
    for found, target in zip(detector.detect(batch, top_k=40), batch.targets, strict=True):
        assert len(found.scores) == 40
        assert (found.scores.diff() <= 0).all()
        assert 0 <= found.scores.min() <= found.scores.max() <= 1
        assert found.boxes_xyxy_px.min() >= 0
        assert (found.boxes_xyxy_px <= torch.tensor([192.0, 128.0, 192.0, 128.0])).all()
        assert found.picture_id == target.picture_id
        assert found.layer == 0
        pairs = set(zip(found.queries.tolist(), found.labels.tolist(), strict=True))
        assert len(pairs) == 40
        assert max(found.queries) < 50


def test_detections_find_what_was_learned(trained, data):
    """The best detection of a learned picture lies on a true box of its class, in original pixels."""
    batch = collate([data.train.read(index) for index in range(8)])
    hits = 0
    for found, target in zip(trained[0].detect(batch, top_k=1), batch.targets, strict=True):
        height, width = target.original_size
        boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
        iou = box_iou(found.boxes_xyxy_px, boxes)[0]
        hits += bool(iou.max() > 0.5 and target.labels[iou.argmax()] == found.labels[0])
    assert hits >= 6


def test_each_true_box_is_matched_to_one_proposal(trained, data):
    """`gt_ids` names each annotation for one proposal, and where that is confident its box lies on the annotation."""
    batch = collate([data.train.read(index) for index in range(8)])
    overlaps = []
    for found, target in zip(trained[0].detect(batch, top_k=10_000), batch.targets, strict=True):
        owners = {query: gt for query, gt in zip(found.queries.tolist(), found.gt_ids.tolist(), strict=True) if gt >= 0}
        assert sorted(owners.values()) == sorted(target.annotation_ids.tolist())
        height, width = target.original_size
        for query, gt in owners.items():
            place = target.annotation_ids.tolist().index(gt)
            own = (found.queries == query) & (found.labels == target.labels[place])
            box = cxcywh_to_xyxy(target.boxes[place]) * torch.tensor([width, height, width, height])
            overlaps.append(float(box_iou(found.boxes_xyxy_px[own], box[None])))
    assert sum(overlaps) / len(overlaps) > 0.6


def test_one_class_per_query_keeps_the_best_class(trained, data):
    """With `one`, a proposal is detected once, as its best class."""
    detector = trained[0]
    batch = collate([data.train.read(0)])
    (every,) = detector.detect(batch, top_k=10_000)
    detector.classes_per_query = "one"
    try:
        (best,) = detector.detect(batch, top_k=10_000)
    finally:
        detector.classes_per_query = "all"
    assert sorted(best.queries.tolist()) == sorted(set(every.queries.tolist()))
    for query, score in zip(best.queries.tolist(), best.scores.tolist(), strict=True):
        assert score == every.scores[every.queries == query].max()


def test_a_seed_repeats_itself(data):
    """The same seed gives bitwise equal losses and weights, whatever ran before; another seed others."""
    runs = []
    for seed in (0, 0, 1):
        torch.rand(7)  # of the global stream, which nothing here may read
        trainer = Trainer(_config(), seed=seed, data=data, device=CPU)
        losses = [trainer.step()[0] for _ in range(3)]
        runs.append((losses, {k: v.clone() for k, v in trainer.detector.state_dict().items()}))
    (first, weights), (again, same), (other, _) = runs
    assert first == again
    assert first != other
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_the_generator_chooses_what_is_sampled(trained):
    """Which anchors and regions count depends on the given generator, not on the global stream."""
    detector, batch = trained[0], _batch((64, 64), (64, 64))
    values = []
    for state, seed in ((0, 0), (1, 0), (0, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            values.append([float(term.value.detach()) for term in _loss(detector, batch, seed)])
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_the_backbone_starts_as_detrs():
    """Parts of the same name start from the same weights in both detectors, so the two can be paired."""
    detr = {"kind": "detr", "hidden_dim": 32, "num_heads": 4, "backbone": SMALL, "strides": [4, 8, 16, 32]}
    config = ExperimentConfig.model_validate_json(json.dumps({"model": detr}))
    theirs = build_detector(config, num_classes=3, seed=4).state_dict()
    ours = build_detector(_config(), num_classes=3, seed=4)
    shared = [name for name in ours.state_dict() if ".backbone." in name]
    assert len(shared) > 50
    assert all(torch.equal(ours.state_dict()[name], theirs[name]) for name in shared)
    groups = parameter_groups(ours, _config().training.model_copy(update={"lr_backbone": 0.5}))
    slow = next(group for group in groups if group["full_lr"] == 0.5)
    assert len(slow["params"]) == len([name for name, _ in ours.named_parameters() if ".backbone." in name])


def test_starting_weights_are_the_published_ones():
    """Heads of the first stage are normal with .01, the pyramid is uniform in the fan in; nothing else is left over."""
    weights = build_detector(_config(fpn_dim=64), num_classes=3, seed=0).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        again = build_detector(_config(fpn_dim=64), num_classes=3, seed=0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    for name, value in weights.items():
        if ".rpn." in name and name.endswith("weight"):
            assert value.std().item() == pytest.approx(0.01, rel=0.2)
        if ".fpn." in name and name.endswith("weight"):
            bound = (3 / value[0].numel()) ** 0.5
            assert 0.9 * bound < value.abs().max().item() <= bound
        if (".rpn." in name or ".fpn." in name) and name.endswith("bias"):
            assert not value.any()


def test_detections_after_nms_are_torchvisions():
    """With the weights copied over, NMS leaves what torchvision's own Faster R-CNN detects with the same anchors."""
    config = _config({"kind": "resnet", "depth": 18}, fpn_dim=256, head_dim=1024, anchor_scale=1 / 8, proposals=1000)
    ours = build_detector(config, num_classes=3, seed=0).eval()
    for name, parameter in ours.model.named_parameters():
        if "cls_" in name or "bbox_pred" in name:  # scores and boxes that differ by more than rounding
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    theirs = torchvision.models.detection.FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d),
        num_classes=4,
        min_size=256,
        max_size=256,
        box_score_thresh=0.0,
        box_nms_thresh=0.5,
        box_detections_per_img=50,
    ).eval()
    moved = {"backbone.": "backbone.", "fpn.": "backbone.fpn.", "heads.": "roi_heads.", "rpn.": "rpn."}
    state = {
        new + name.removeprefix(old): value
        for name, value in ours.model.state_dict().items()
        for old, new in moved.items()
        if name.startswith(old)
    }
    theirs.load_state_dict(state)
    theirs.rpn.anchor_generator = ours.model.rpn.anchor_generator  # torchvision rounds its own to whole pixels
    batch = _batch((256, 256))
    batch = replace(batch, targets=tuple(replace(target, original_size=(256, 256)) for target in batch.targets))
    with torch.no_grad():
        (expected,) = theirs([batch.images[0] / 255])
    (found,) = ours.detect(batch, top_k=100_000)
    kept = batched_nms(found.boxes_xyxy_px, found.scores, found.labels, 0.5)[:50]
    assert expected["scores"].std() > 0.002
    torch.testing.assert_close(found.scores[kept], expected["scores"], rtol=0, atol=1e-5)
    assert (found.labels[kept] + 1 == expected["labels"]).float().mean() > 0.9  # equal scores may come in any order
    distance = torch.cdist(found.boxes_xyxy_px[kept].double(), expected["boxes"].double(), p=torch.inf)
    assert distance.amin(1).max() < 0.01


def test_pictures_without_boxes_are_background(trained):
    """A batch without any box gives finite losses with gradients, no box loss, and detections of nobody."""
    detector, batch = trained[0], _batch((64, 64), (48, 64), boxes=0)
    terms = {f"{term.source}/{term.name}": term.value for term in _loss(detector, batch)}
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms["encoder/l1"] == terms["decoder/l1"] == 0
    assert terms["encoder/class"] > 0
    sum(terms.values()).backward()
    detector.zero_grad()
    assert all((found.gt_ids == -1).all() for found in detector.eval().detect(batch, top_k=5))


def test_a_part_of_a_step_counts_by_its_share_of_the_pictures(trained):
    """Two of four pictures weigh half, so that the parts of a step add up to its mean."""
    detector, batch = trained[0], _batch((64, 64), (64, 64))
    whole = [float(term.value.detach()) for term in _loss(detector, batch)]
    part = [float(term.value.detach()) for term in _loss(detector, replace(batch, box_counts=(3, 3, 0, 5)))]
    assert part == pytest.approx([value / 2 for value in whole])


def test_evaluation_mode_gives_losses_too(trained):
    """The loss of a detector that is being evaluated is of the same terms; detecting after it is unchanged."""
    detector, batch = trained[0], _batch((64, 64))
    before = detector.detect(batch, top_k=9)[0]
    assert len(_loss(detector.eval(), batch)) == 4
    after = detector.detect(batch, top_k=9)[0]
    assert torch.equal(before.boxes_xyxy_px, after.boxes_xyxy_px)


def test_padding_proposes_nothing_and_crowds_nothing_out():
    """From maps padded with zeros come the same proposals, to a thousandth of a pixel, as from the maps alone.

    (The convolutions of backbone and pyramid, and pooling at the very border, do see the padding, in torchvision as
    here.)
    """
    rpn = build_detector(_config(proposals=200), num_classes=3, seed=0).model.rpn.eval()
    torch.nn.init.normal_(rpn.head.bbox_pred.weight, std=0.3)  # proposals that are no mere anchors
    rpn.head.cls_logits.weight.data.abs_().neg_()  # of what a ReLU gives: empty padding scores best of all
    generator = torch.Generator().manual_seed(0)
    maps, padded = {}, {}
    for stride in (4, 8, 16, 32, 64):
        level = torch.randn(1, 16, 64 // stride, 128 // stride, generator=generator)
        maps[str(stride)] = level
        padded[str(stride)] = torch.nn.functional.pad(level, (0, 64 // stride, 0, 128 // stride))
    (alone,), _ = rpn(ImageList(torch.zeros(1, 3, 64, 128), [(64, 128)]), maps)
    (wide,), _ = rpn(ImageList(torch.zeros(1, 3, 192, 192), [(64, 128)]), padded)
    assert len(alone) == len(wide) == 200
    distance = torch.cdist(alone.double(), wide.double(), p=torch.inf)  # rounding may swap two of equal score
    assert max(distance.amin(0).max(), distance.amin(1).max()) < 1e-3


def test_anchors_are_torchvisions_at_their_size_and_scale_with_the_picture():
    """Where 32 pixels are asked for, they are torchvision's before rounding; elsewhere a share of the shorter side."""
    strides = (4, 8, 16, 32, 64)
    published = AnchorGenerator(tuple((32 * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    features = [torch.zeros(1, 1, 768 // stride, 1280 // stride) for stride in strides]
    images = ImageList(torch.zeros(1, 3, 768, 1280), [(768, 1280)])
    ours = ScaledAnchors(scale=32 / 768, strides=strides)(images, features)[0]
    theirs = published(images, features)[0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 0.5
    both = ImageList(torch.zeros(2, 3, 128, 128), [(64, 128), (128, 96)])
    maps = [torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 8, 8)]
    first, second = ScaledAnchors(scale=0.1, strides=(8, 16))(both, maps)
    for anchors, side, share in ((first, 6.4, 1 / 2), (second, 9.6, 3 / 4)):
        inside = anchors[:, 0] < FAR_PX / 2
        areas = (anchors[:, 2:] - anchors[:, :2]).prod(1)
        for level, cells, scale in ((slice(768), 256, 1), (slice(768, None), 64, 2)):
            own = areas[level][inside[level]]
            assert len(own) == share * 3 * cells  # the rest is centred in the padding
            torch.testing.assert_close(own, torch.full_like(own, (scale * side) ** 2), rtol=1e-4, atol=0)


def test_regions_are_pooled_as_torchvisions():
    """At the published scale every region comes from torchvision's level with torchvision's values."""
    generator = torch.Generator().manual_seed(0)
    strides = (4, 8, 16, 32)
    features = {str(i): torch.randn(1, 3, 800 // s, 800 // s, generator=generator) for i, s in enumerate(strides)}
    low = torch.rand(60, 2, generator=generator) * 300
    size = torch.rand(60, 2, generator=generator) ** 2 * 490 + 5
    regions = [torch.cat([low, low + size], dim=1)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    ours = LevelPool(scale=0.04, strides=strides, cells=7)
    torch.testing.assert_close(ours(features, regions, [(800, 800)]), theirs(features, regions, [(800, 800)]))
    levels = ours._level(regions[0], 800)
    assert set(levels.tolist()) == {0, 1, 2, 3}
    half = LevelPool(scale=0.08, strides=strides, cells=7)  # the same anchors in a picture of half the size
    assert torch.equal(levels, half._level(regions[0], 400))
    padded = {name: torch.nn.functional.pad(level, (0, 4, 0, 4)) for name, level in features.items()}
    inside = [regions[0].clamp(max=760)]  # a cell of the coarsest level away from the padding
    torch.testing.assert_close(ours(padded, inside, [(800, 800)]), ours(features, inside, [(800, 800)]))
