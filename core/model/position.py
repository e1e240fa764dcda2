"""Position embeddings: sine of grid cells with a level embedding, and sine of reference boxes."""

import math

import torch
from torch import Tensor, nn

from core.model.layers import MLP


class LevelPosition(nn.Module):
    """Sine embedding of each cell of each level, in the unpadded part, plus a learned vector a level.

    DETR (arXiv:2005.12872, A.4) without shift; Deformable DETR shifts by `offset` -0.5 cells before normalising.
    """

    level_embed: nn.Parameter | None

    def __init__(self, *, dim: int, num_levels: int, temperature: float, offset: float, level_embed: bool) -> None:
        super().__init__()
        self.offset = offset
        self._kept: tuple[tuple[object, ...], tuple[Tensor, ...]] | None = None
        self.register_buffer("frequencies", sine_frequencies(dim // 2, temperature), persistent=False)
        self.register_parameter("level_embed", nn.Parameter(torch.empty(num_levels, dim)) if level_embed else None)
        self.reset_parameters()

    frequencies: Tensor

    def reset_parameters(self) -> None:
        """Start the level embedding as N(0, 1)."""
        if self.level_embed is not None:
            nn.init.normal_(self.level_embed)

    def forward(self, padding_masks: tuple[Tensor, ...], *, padded: bool = True) -> Tensor:
        """Map `padding_masks` L x (B, H_l, W_l) to the embeddings of all tokens (B, S, C).

        `padded` False says that nothing is padded: then all pictures share what is computed once for their size.
        """
        sines = tuple(map(self._sine, padding_masks)) if padded else self._unpadded(padding_masks)
        if self.level_embed is not None:
            sines = tuple(sine + own for sine, own in zip(sines, self.level_embed, strict=False))
        return torch.cat(sines, dim=1).expand(len(padding_masks[0]), -1, -1)

    def _unpadded(self, padding_masks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the pictures of this size have in common, L x (1, H_l * W_l, C); the last size is kept."""
        shapes, device = tuple(mask.shape[1:] for mask in padding_masks), self.frequencies.device
        known_by = (shapes, device, self.frequencies.dtype, self.offset)
        if self._kept is None or self._kept[0] != known_by:
            with torch.inference_mode(mode=False):  # they serve training, too
                inside = [torch.zeros(1, *shape, dtype=torch.bool, device=device) for shape in shapes]
                self._kept = known_by, tuple(map(self._sine, inside))
        return self._kept[1]

    def _sine(self, padding_mask: Tensor) -> Tensor:
        """Map `padding_mask` (B, H, W) to (B, H * W, C): y first, then x."""
        inside = ~padding_mask
        axes = []
        for dim in (1, 2):
            cells = inside.cumsum(dim, dtype=torch.float32)
            last = cells.narrow(dim, cells.shape[dim] - 1, 1)
            axes.append((cells + self.offset) / (last + 1e-6) * (2 * math.pi))
        return torch.cat([_sine(axis, self.frequencies) for axis in axes], dim=-1).flatten(1, 2)


class StaticQueryPosition(nn.Module):
    """The query's own position embedding, the same for every layer."""

    def forward(self, reference: Tensor, position: Tensor | None) -> Tensor:  # noqa: ARG002 - one signature for both
        """Return `position` (B, Q, C)."""
        if position is None:
            raise ValueError("static query positions need query sets that bring one")
        return position


class SineQueryPosition(nn.Module):
    """An MLP of the sine of the box that the layer looks at (DAB-DETR, arXiv:2201.12329, eq. 2)."""

    def __init__(self, *, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", sine_frequencies(dim // 2, temperature), persistent=False)
        self.mlp = MLP(2 * dim, dim, dim)

    frequencies: Tensor

    def forward(self, reference: Tensor, position: Tensor | None) -> Tensor:  # noqa: ARG002 - one signature for both
        """Map `reference` (B, Q, 4) to (B, Q, C)."""
        return self.mlp(sine_of_boxes(reference, self.frequencies))


def sine_of_boxes(boxes: Tensor, frequencies: Tensor) -> Tensor:
    """Map (B, Q, 4) in [0, 1] to (B, Q, 4 * len(frequencies)): the sine embedding of each coordinate in turn."""
    return _sine(boxes * (2 * math.pi), frequencies).flatten(-2)


def sine_frequencies(num: int, temperature: float) -> Tensor:
    """Return the `num` angular frequencies of a sine embedding, each twice: for the sine and for the cosine."""
    pairs = torch.arange(num, dtype=torch.float32) // 2 * 2
    return temperature ** (-pairs / num)


def _sine(angle: Tensor, frequencies: Tensor) -> Tensor:
    """Interleave sine and cosine: (...,) to (..., num)."""
    phases = angle[..., None] * frequencies
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], dim=-1).flatten(-2)
