"""Each kind of detector can learn: it finds every object of eight drawn pictures after a few minutes on one core.

What held-out pictures would show takes hours. A detector that cannot even learn eight pictures by heart is wired wrong.
"""

import json
from dataclasses import replace

import pytest
import torch
from torchvision.ops import batched_nms

from core.config import ExperimentConfig
from core.data.batching import collate
from core.data.splits import open_data
from core.evaluation.coco_ap import coco_metrics
from core.trainer import Trainer

PICTURES = 8
TRAINING = {
    "epochs": 10_000,
    "batch_size": PICTURES,
    "lr": 1e-3,
    "lr_backbone": 1e-3,
    "warmup_steps": 20,
    "schedule": {"kind": "step", "at": 1.0},
}
FASTER_RCNN = {
    "kind": "faster_rcnn",
    "backbone": {"kind": "small_resnet", "width": 8},
    "fpn_dim": 32,
    "head_dim": 64,
    "anchor_scale": 0.08,
    "proposals": 100,
}

TWO_STAGE = {  # the laptop profile's detector with an encoder layer, selection and refinement
    "kind": "detr",
    "hidden_dim": 64,
    "num_heads": 4,
    "ffn_dim": 192,
    "dropout": 0.0,
    "extra_levels": 0,
    "encoder": {"num_layers": 1, "attention": {"kind": "deformable", "num_points": 2}},
    "decoder": {"num_layers": 3, "attention": {"kind": "deformable", "num_points": 2}},
    "queries": {"kind": "selected", "num_queries": 24},
    "encoder_supervision": {},
    "query_position": "sine_of_reference",
    "heads": "separate",
    "refinement": {"residual_base": "detached", "sampling_reference": "detached"},
}

SMALL = {"backbone": {"kind": "small_resnet", "width": 16}}
LEARNED_BOXES = {"kind": "learned", "num_queries": 24, "reference": "box", "anchor_size": 0.25}
DENOISED = {**TWO_STAGE, **SMALL, "queries": LEARNED_BOXES, "encoder_supervision": None}
BASE = {  # Deformable DETR without refinement and selection
    **TWO_STAGE,
    **SMALL,
    "queries": {"kind": "learned", "num_queries": 24},
    "encoder_supervision": None,
    "query_position": "static",
    "refinement": {},
    "heads": "shared",
}
PLAIN = {  # DETR: dense attention on one level, zero content, no references
    **BASE,
    "strides": [8],
    "neck_norm": "none",
    "position": {"offset": 0.0, "level_embed": False},
    "encoder": {"num_layers": 1, "attention": {"kind": "dense"}},
    "decoder": {"num_layers": 3, "attention": {"kind": "dense"}, "norm": "output_only"},
    "queries": {"kind": "learned", "num_queries": 24, "content": "zeros", "reference": "none"},
    "head_init": "torch",
}
FAST = {"lr": 2e-3, "lr_backbone": 2e-3}
IOU_AWARE = {"classification": {"kind": "iou_aware"}}
CROSS_ENTROPY = {
    "classification": {"kind": "cross_entropy"},
    "matcher": {"cost": "probability", "cost_class": 1.0},
    "weight_class": 1.0,
}


def configured(model, *, side=64, training=None, **parts):
    """Return a configuration of eight drawn pictures, not augmented, at a constant learning rate."""
    return ExperimentConfig.model_validate_json(
        json.dumps(
            {
                "model": model,
                "data": {"kind": "shapes", "side": side, "num_train": 1, "num_val": PICTURES, "augmentation": "none"},
                "training": {**TRAINING, **(training or {})},
                **parts,
            }
        )
    )


def overfit(config, steps, *, seed=0):
    """Train for `steps` on the scored pictures themselves; return their metrics, after NMS where the config asks."""
    data = open_data(config.data, root=None, cache=None)
    data = replace(data, train=data.scored)
    trainer = Trainer(config, seed=seed, data=data, device=torch.device("cpu"))
    for _ in range(steps):
        trainer.step()
    return metrics(trainer.detector.eval(), config, data)


def metrics(detector, config, data):
    """Score a detector on the scored pictures."""
    batch = collate([data.scored.read(index) for index in range(len(data.scored))])
    found = detector.detect(batch, top_k=300)
    if (iou := config.evaluation.nms_iou) is not None:
        found = [d.keep(batched_nms(d.boxes_xyxy_px, d.scores, d.labels, iou).sort().values) for d in found]
    return coco_metrics(
        [detections.best(config.evaluation.top_k) for detections in found],
        data.ground_truth,
        class_names=data.class_names,
        picture_ids=data.scored.picture_ids,
    )


@pytest.mark.slow
def test_faster_rcnn_with_nms():
    """Faster R-CNN from a small backbone, with NMS at .5."""
    config = configured(FASTER_RCNN, evaluation={"nms_iou": 0.5})
    assert overfit(config, 250).ap50 >= 0.95


@pytest.mark.slow
def test_two_stage_detr_on_swin_v2():
    """Two-stage Deformable DETR on a Swin v2 tiny that starts from random weights."""
    config = configured(
        {**TWO_STAGE, "backbone": {"kind": "swin_v2", "size": "tiny"}},
        training={"lr_backbone": 3e-4},
        loss={"classification": {"kind": "iou_aware"}},
    )
    assert overfit(config, 120).ap50 >= 0.95


@pytest.mark.slow
def test_two_stage():
    """Two-stage Deformable DETR learns the boxes themselves: AP .9 and more."""
    assert overfit(configured({**TWO_STAGE, **SMALL}, training=FAST, loss=IOU_AWARE), 400).ap >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "steps"),
    [
        pytest.param(
            configured(
                PLAIN,
                training={"lr": 5e-4, "lr_backbone": 5e-4},
                loss=CROSS_ENTROPY,
                evaluation={"classes_per_query": "one"},
            ),
            800,
            id="detr",
        ),
        pytest.param(configured(BASE), 400, id="deformable"),
        pytest.param(
            configured({**DENOISED, "denoising": {"kind": "dn", "groups": 3}}, training=FAST, loss=IOU_AWARE),
            300,
            id="dn",
        ),
        pytest.param(
            configured({**DENOISED, "denoising": {"kind": "cdn", "num_queries": 30}}, training=FAST, loss=IOU_AWARE),
            300,
            id="cdn",
        ),
    ],
)
def test_detr_family(config, steps):
    """Plain and Deformable DETR, with and without denoising, find every object."""
    assert overfit(config, steps).ap50 >= 0.95
