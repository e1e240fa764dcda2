"""The encoder: deformable self-attention over the tokens of all levels (Deformable DETR, section 4.1)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from core.model.attention import DeformableAttention
from core.model.layers import FeedForward
from core.model.position import LevelPosition
from core.types import FeaturePyramid, Memory


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each residual with LayerNorm after the sum."""

    def __init__(self, *, attention: DeformableAttention, feed_forward: FeedForward, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = feed_forward

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Map tokens (B, S, C) to (B, S, C); `memory` gives the shapes and the padding."""
        attended = self.attention(tokens + position, reference, tokens, memory.padding_mask, memory.spatial_shapes)
        return self.feed_forward(self.norm(tokens + self.dropout(attended)))


class Encoder(nn.Module):
    """A stack of layers; keeps every layer's output."""

    def __init__(self, *, position: LevelPosition, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.position = position
        self.layers = nn.ModuleList(layers)

    def forward(self, pyramid: FeaturePyramid) -> Memory:
        """Flatten the pyramid and encode it."""
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in pyramid.features], dim=1)  # (B, S, C)
        position = torch.cat([self.position(mask, level) for level, mask in enumerate(pyramid.padding_masks)], dim=1)
        valid_ratios = torch.stack([_valid_ratio(mask) for mask in pyramid.padding_masks], dim=1)
        memory = Memory(
            tokens=tokens,
            position=position,
            padding_mask=torch.cat([mask.flatten(1) for mask in pyramid.padding_masks], dim=1),
            spatial_shapes=tuple((level.shape[-2], level.shape[-1]) for level in pyramid.features),
            valid_ratios=valid_ratios,
            layers=(),
        )
        centres = cell_centres(memory)[:, :, None] * valid_ratios[:, None]  # (B, S, L, 2) of the padded levels
        outputs = []
        for layer in self.layers:
            tokens = layer(tokens, position, centres, memory)
            outputs.append(tokens)
        return replace(memory, tokens=tokens, layers=tuple(outputs))


def cell_centres(memory: Memory) -> Tensor:
    """Return each token's centre as (x, y) in [0, 1] of the unpadded picture: (B, S, 2); above 1 in the padding."""
    centres = []
    for level, (height, width) in enumerate(memory.spatial_shapes):
        like = {"dtype": memory.valid_ratios.dtype, "device": memory.valid_ratios.device}
        y, x = torch.meshgrid(torch.arange(height, **like) + 0.5, torch.arange(width, **like) + 0.5, indexing="ij")
        grid = torch.stack([x / width, y / height], -1).view(1, -1, 2)
        centres.append(grid / memory.valid_ratios[:, None, level])
    return torch.cat(centres, dim=1)


def _valid_ratio(padding_mask: Tensor) -> Tensor:
    """Return the share of columns and rows that are not padding: (B, H, W) to (B, 2) as (w, h)."""
    inside = ~padding_mask
    height, width = padding_mask.shape[1:]
    return torch.stack([inside[:, 0].sum(1) / width, inside[:, :, 0].sum(1) / height], dim=-1)
