"""The encoder: self-attention over the tokens of all levels (DETR, A.3; Deformable DETR, section 4.1)."""

from dataclasses import replace

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
        memory = Memory(
            tokens=tokens,
            position=torch.cat([self.position(mask, level) for level, mask in enumerate(pyramid.padding_masks)], dim=1),
            padding_mask=torch.cat([mask.flatten(1) for mask in pyramid.padding_masks], dim=1),
            spatial_shapes=tuple((level.shape[-2], level.shape[-1]) for level in pyramid.features),
            valid_ratios=torch.stack([_valid_ratio(mask) for mask in pyramid.padding_masks], dim=1),
            layers=(),
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
