"""Torchvision's Swin transformer v2 (arXiv:2111.09883) as a backbone."""

import math
from typing import Any

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2
from torchvision.ops import StochasticDepth

from core.model.backbone import Backbone, freeze, load_torchvision
from core.model.initialise import reset_parameters

PATCH = 4
LETTERS = {"tiny": "t", "small": "s", "base": "b"}


class SwinV2(Backbone):
    """Stages of strides 4, 8, 16, 32, each map with a LayerNorm of its own.

    Swin's own detectors put such norms on the maps. A stage of Swin v2 ends in a sum of residuals whose scale grows
    with depth, and nothing after it would take that away where the neck has no norm. They are new, not in the ImageNet
    weights. `frozen_stages` counts the patch embedding as 1 and each stage, with the merging before it, as one more.
    Stochastic depth is torchvision's (.2, .3, .5 by size); frozen stages have none.
    """

    def __init__(self, *, size: str, frozen_stages: int, weights: str | None, strides: tuple[int, ...]) -> None:
        architecture = f"swin_v2_{LETTERS[size]}"
        features: Any = torchvision.models.get_model(architecture, weights=None).features
        stages = tuple(stride.bit_length() - 3 for stride in strides)  # stride 4 is stage 0
        channels = tuple(features[0][0].out_channels * 2**stage for stage in stages)
        body = _Stages(features[: 2 * stages[-1] + 2], stages=stages, channels=channels)
        super().__init__(body, channels=channels, strides=strides)
        self.architecture = architecture
        self.weights = weights
        for module in body.features[: frozen_stages if frozen_stages < 2 else 2 * frozen_stages - 2]:
            freeze(module)
            for part in module.modules():
                if isinstance(part, StochasticDepth):
                    part.p = 0.0

    @staticmethod
    def reset_leaf(module: nn.Module) -> None:
        """Start as torchvision's: linear maps truncated normal (.02) with zero bias, attention scales 10."""
        reset_parameters(module)
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ShiftedWindowAttentionV2):
            nn.init.constant_(module.logit_scale, math.log(10))

    def load_pretrained(self) -> None:
        """Load torchvision's ImageNet weights or a state-dict file in torchvision's names."""
        if self.weights is not None:
            load_torchvision(self.body, self.weights, architecture=self.architecture, new=("norms.",))


class _Stages(nn.Module):
    """The patch embedding, then stages of blocks with mergings between; gives the maps of `stages`, normalised."""

    def __init__(self, features: nn.Sequential, *, stages: tuple[int, ...], channels: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in channels)
        self.places = tuple(2 * stage + 1 for stage in stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))  # as many cells as a ResNet has: ceil(side / stride)
        maps: list[Tensor] = []
        for place, module in enumerate(self.features):
            x = module(x)  # (B, H_l, W_l, C_l)
            if place in self.places:
                maps.append(self.norms[len(maps)](x).permute(0, 3, 1, 2))
        return maps
