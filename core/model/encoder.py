"""The encoder: self-attention over the tokens of all levels (DETR, A.3; Deformable DETR, section 4.1)."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.model.attention import QuestionAttention
from core.model.layers import FeedForward
from core.model.position import LevelPosition
from core.types import FeaturePyramid, Memory


class EncoderLayer(nn.Module):
    """Self-attention, perhaps a look at the question, and feed-forward; each residual, LayerNorm after the sum."""

    def __init__(
        self,
        *,
        attention: nn.Module,
        question: QuestionAttention | None,
        feed_forward: FeedForward,
        dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.question = question
        self.feed_forward = feed_forward

    def forward(self, tokens: Tensor, centres: Tensor, memory: Memory, question: Tensor | None) -> Tensor:
        """Map `tokens` (B, S, C) at `centres` (B, S, 2) to (B, S, C); `memory` gives positions, shapes and padding."""
        memory = replace(memory, tokens=tokens)
        attended = self.attention(tokens, memory.position, centres, memory)
        tokens = self.norm(tokens + self.dropout(attended))
        if self.question is not None:
            if question is None:
                raise ValueError("an encoder that reads a question needs one: set model.queries.kind to learned")
            tokens = self.question(tokens, memory.position, question)
        return self.feed_forward(tokens)


class Encoder(nn.Module):
    """A stack of layers; keeps every layer's output. With `local`, no gradient passes to the layer before."""

    def __init__(
        self, *, position: LevelPosition, layers: list[EncoderLayer], local: bool, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.position = position
        self.layers = nn.ModuleList(layers)
        self.local = local
        self.activation_checkpointing = activation_checkpointing

    def forward(self, pyramid: FeaturePyramid, question: Tensor | None = None) -> Memory:
        """Flatten the pyramid and encode it; `question` (Q, C) is what layers may also attend to."""
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in pyramid.features], dim=1)  # (B, S, C)
        spatial_shapes = tuple((level.shape[-2], level.shape[-1]) for level in pyramid.features)
        memory = Memory(
            tokens=tokens,
            position=self.position(pyramid.padding_masks, padded=pyramid.padded),
            padding_mask=torch.cat([mask.flatten(1) for mask in pyramid.padding_masks], dim=1),
            spatial_shapes=spatial_shapes,
            valid_ratios=valid_ratios(pyramid),
            layers=(),
            padded=pyramid.padded,
        )
        centres = cell_centres(memory)
        outputs: list[Tensor] = []
        for layer in self.layers:
            start = tokens.detach() if self.local and outputs else tokens
            inputs = (start, centres, memory, question)
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                tokens = layer(*inputs)
            outputs.append(tokens)
        return replace(memory, tokens=tokens, layers=tuple(outputs))


def valid_ratios(pyramid: FeaturePyramid) -> Tensor:
    """Return the share of columns and of rows of each level that are not padding: (B, L, 2) as (w, h)."""
    if not pyramid.padded:
        like = pyramid.padding_masks[0]
        return torch.ones(len(like), len(pyramid.padding_masks), 2, device=like.device)
    return torch.stack([_valid_ratio(mask) for mask in pyramid.padding_masks], dim=1)


def _valid_ratio(padding_mask: Tensor) -> Tensor:
    inside = ~padding_mask
    height, width = padding_mask.shape[1:]
    return torch.stack([inside[:, 0].sum(1) / width, inside[:, :, 0].sum(1) / height], dim=-1)


def cell_centres(memory: Memory) -> Tensor:
    """Return each token's centre as (x, y) in [0, 1] of the unpadded picture: (B, S, 2); above 1 in the padding."""
    ratios = memory.valid_ratios
    grids = _grids(memory.spatial_shapes, dtype=ratios.dtype, device=ratios.device)
    if not memory.padded:
        return torch.cat(grids).expand(len(ratios), -1, -1)
    return torch.cat([grid / ratios[:, None, level] for level, grid in enumerate(grids)], dim=1)


@lru_cache(maxsize=8)
def _grids(
    spatial_shapes: tuple[tuple[int, int], ...], *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the centres of each level's cells as (x, y) in [0, 1] of the level: L x (H_l * W_l, 2)."""
    grids: list[Tensor] = []
    with torch.inference_mode(mode=False):  # they serve training, too
        for height, width in spatial_shapes:
            rows, columns = (torch.arange(side, dtype=dtype, device=device) + 0.5 for side in (height, width))
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            grids.append(torch.stack([x / width, y / height], -1).view(-1, 2))
    return tuple(grids)
