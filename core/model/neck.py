"""From backbone maps to a pyramid of equal width: 1x1 convolutions and strided extra levels (Deformable DETR, 4.1)."""

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from core.model.linear import PointwiseConv
from core.types import FeaturePyramid


class _Projection(nn.Conv2d):
    """A convolution that starts as Xavier uniform with zero bias (Deformable DETR)."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Lateral(_Projection, PointwiseConv):
    """One of a single cell."""


class Neck(nn.Module):
    """One projection a level, each followed by GroupNorm; without `norm` a bare convolution by torch's default (DETR).

    The first extra level is a 3x3 stride-2 convolution of the last backbone map, each further one of the level before
    it.
    """

    def __init__(self, *, channels: tuple[int, ...], dim: int, extra_levels: int, norm: bool) -> None:
        super().__init__()
        lateral = [_level(c, dim, norm=norm, extra=False) for c in channels]
        extra_inputs = [channels[-1], *[dim] * extra_levels][:extra_levels]
        extra = [_level(c, dim, norm=norm, extra=True) for c in extra_inputs]
        self.projections = nn.ModuleList(lateral + extra)

    def forward(self, features: tuple[Tensor, ...], padding_mask: Tensor, *, padded: bool = True) -> FeaturePyramid:
        """Project `features`, L' maps (B, channels_l, H_l, W_l), and shrink `padding_mask` (B, H, W) to each level.

        `padded` False says that nothing is padded.
        """
        levels: list[Tensor] = []
        for index, projection in enumerate(self.projections):
            if index < len(features):
                source = features[index]
            else:
                source = features[-1] if index == len(features) else levels[-1]
            levels.append(projection(source))
        sizes = [level.shape[-2:] for level in levels]
        if padded:
            mask = padding_mask[:, None].float()
            masks = tuple(F.interpolate(mask, size=size).bool()[:, 0] for size in sizes)
        else:
            masks = tuple(padding_mask.new_zeros(1, *size).expand(len(padding_mask), -1, -1) for size in sizes)
        return FeaturePyramid(features=tuple(levels), padding_masks=masks, padded=padded)


def _level(channels: int, dim: int, *, norm: bool, extra: bool) -> nn.Module:
    if extra:
        conv = (_Projection if norm else nn.Conv2d)(channels, dim, 3, stride=2, padding=1)
    else:
        conv = (_Lateral if norm else PointwiseConv)(channels, dim, 1)
    groups = max(1, dim // 8)  # of 8 channels: 32 at the reference's 256
    return nn.Sequential(conv, nn.GroupNorm(groups, dim)) if norm else nn.Sequential(conv)
