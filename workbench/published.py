"""What official checkpoints score on COCO 2017 val, as published with the files: what `doctor` compares with.

Sources are the tables of the official repositories' READMEs, which are of the files themselves. Where a paper prints
another number (Deformable DETR's: 43.8, 45.4, 46.2), it is of another run.
"""

from dataclasses import dataclass

_DETR = "facebookresearch/detr, README, Model Zoo"
_DEFORMABLE = "fundamentalvision/Deformable-DETR, README, Main Results"
COCO_VAL_PICTURES = 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """AP as a fraction, rounded to .001 there, on so many pictures."""

    ap: float
    source: str
    num_pictures: int = COCO_VAL_PICTURES


PUBLISHED: dict[tuple[str, int], Published] = {  # (recipe, depth of the ResNet)
    ("detr", 50): Published(ap=0.420, source=_DETR),
    ("detr_dc5", 50): Published(ap=0.433, source=_DETR),
    ("detr", 101): Published(ap=0.435, source=_DETR),
    ("detr_dc5", 101): Published(ap=0.449, source=_DETR),
    ("deformable_single_scale", 50): Published(ap=0.394, source=_DEFORMABLE),
    ("deformable_single_scale_dc5", 50): Published(ap=0.415, source=_DEFORMABLE),
    ("deformable", 50): Published(ap=0.445, source=_DEFORMABLE),
    ("deformable_refine", 50): Published(ap=0.462, source=_DEFORMABLE),
    ("deformable_two_stage", 50): Published(ap=0.469, source=_DEFORMABLE),
}
