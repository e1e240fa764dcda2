"""Published detectors as configurations: what a study builds on and official checkpoints need. Loads without torch.

Each has its paper's and official code's values, schedule included. Where both differ, the official code's; further
deviations are listed in docs/design.md.
"""

from collections.abc import Mapping
from typing import Any

from core.config import ExperimentConfig

REFINED = {
    "heads": "separate",
    "refinement": {"residual_base": "detached", "sampling_reference": "detached"},
}
SINGLE_SCALE = {"strides": (32,), "extra_levels": 0}
DC5 = {"backbone": {"kind": "resnet", "depth": 50, "dilation": True}}

# facebookresearch/detr: 500 epochs with the rate / 10 after 400, batch 64.
PLAIN_DETR: dict[str, Any] = {
    "ffn_dim": 2048,
    **SINGLE_SCALE,
    "neck_norm": "none",
    "position": {"offset": 0.0, "level_embed": False},
    "encoder": {"attention": {"kind": "dense"}},
    "decoder": {"attention": {"kind": "dense"}, "norm": "output_only"},
    "queries": {"kind": "learned", "num_queries": 100, "content": "zeros", "reference": "none"},
    "head_init": "torch",
}
DETR_REST: dict[str, Any] = {
    "loss": {
        "classification": {"kind": "cross_entropy"},
        "matcher": {"cost": "probability", "cost_class": 1.0},
        "weight_class": 1.0,
    },
    "training": {
        "epochs": 500,
        "batch_size": 64,
        "lr": 1e-4,
        "lr_backbone": 1e-5,
        "lr_sampling_factor": 1.0,
        "schedule": {"kind": "step", "at": 0.8},
    },
    "evaluation": {"classes_per_query": "one", "batch_size": 1},
}

# IDEA-Research/DINO, 4 scales, 12 epochs: the rate / 10 after 11, batch 16.
DINO: dict[str, Any] = {
    "ffn_dim": 2048,
    "dropout": 0.0,
    "position": {"temperature": 20.0, "offset": 0.0, "box_temperature": 20.0},
    "decoder": {"norm": "output_only"},
    "queries": {"kind": "selected", "num_queries": 900, "content": "learned"},
    "query_position": "sine_of_reference",
    "refinement": {
        "residual_base": "look_forward_twice",
        "sampling_reference": "detached",
        "boxes": "recomputed",
    },
    "encoder_supervision": {"labels": "class_aware", "tokens": "selected"},
    "denoising": {"kind": "cdn"},
}
DINO_REST: dict[str, Any] = {
    "loss": {"weight_class": 1.0},
    "training": {
        "epochs": 12,
        "batch_size": 16,
        "lr": 1e-4,
        "lr_backbone": 1e-5,
        "lr_sampling_factor": 1.0,
        "schedule": {"kind": "step", "at": 11 / 12},
    },
    "evaluation": {"top_k": 300},
}


def _recipe(model: Mapping[str, Any], rest: Mapping[str, Any] | None = None) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"model": {"kind": "detr", **model}, **(rest or {})})


RECIPES: dict[str, ExperimentConfig] = {
    "deformable": ExperimentConfig(),
    "deformable_single_scale": _recipe(SINGLE_SCALE),
    "deformable_single_scale_dc5": _recipe({**SINGLE_SCALE, **DC5}),
    "deformable_refine": _recipe(REFINED),
    "deformable_two_stage": _recipe({**REFINED, "queries": {"kind": "selected"}, "encoder_supervision": {}}),
    "detr": _recipe(PLAIN_DETR, DETR_REST),
    "detr_dc5": _recipe({**PLAIN_DETR, **DC5}, DETR_REST),
    "dino": _recipe(DINO, DINO_REST),
    "faster_rcnn": ExperimentConfig.model_validate(
        {"model": {"kind": "faster_rcnn"}, "evaluation": {"nms_iou": 0.5}, "training": {"epochs": 26, "batch_size": 16}}
    ),
}
DEFAULT = "deformable"
