"""Which backbone a configuration names. DETR and Faster R-CNN build theirs here."""

from typing import assert_never

from core import config as c
from core.custom import build_custom
from core.model.backbone import Backbone
from core.model.backbones.resnets import ResNet, SmallResNet
from core.model.backbones.swin_v2 import SwinV2
from core.model.backbones.timm_extractor import Timm


def build_backbone(config: c.Backbone, *, strides: tuple[int, ...]) -> Backbone:
    """Build a backbone that gives the stages called `strides`, finest first; the weights are not yet initialised."""
    match config:
        case c.SmallResNet(width=width, dilation=dilation):
            return SmallResNet(width=width, strides=strides, dilation=dilation)
        case c.ResNet() as part:
            return ResNet(
                depth=part.depth,
                frozen_batch_norm=part.frozen_batch_norm,
                frozen_stages=part.frozen_stages,
                weights=part.weights,
                strides=strides,
                dilation=part.dilation,
            )
        case c.SwinV2() as part:
            return SwinV2(size=part.size, frozen_stages=part.frozen_stages, weights=part.weights, strides=strides)
        case c.Timm() as part:
            return Timm(
                name=part.name,
                frozen_batch_norm=part.frozen_batch_norm,
                frozen_stages=part.frozen_stages,
                weights=part.weights,
                strides=strides,
                dilation=part.dilation,
            )
        case c.Custom() as part:
            return build_custom(part, strides=strides)
        case other:
            assert_never(other)
