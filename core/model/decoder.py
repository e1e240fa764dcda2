"""The decoder: queries attend to one another and sample the memory around their references."""

from dataclasses import dataclass

from torch import Tensor, nn

from core.model.attention import DeformableAttention, SelfAttention
from core.model.layers import FeedForward
from core.model.refinement import BoxHead, RefinementStep
from core.types import Memory, QuerySet


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """`hidden` (B, Q, C) and `boxes` (B, Q, 4) of one layer."""

    hidden: Tensor
    boxes: Tensor


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each residual with LayerNorm after the sum."""

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
        cross_attention: DeformableAttention,
        feed_forward: FeedForward,
        dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.dropout_self = nn.Dropout(dropout)
        self.norm_self = nn.LayerNorm(dim)
        self.cross_attention = cross_attention
        self.dropout_cross = nn.Dropout(dropout)
        self.norm_cross = nn.LayerNorm(dim)
        self.feed_forward = feed_forward

    def forward(
        self, hidden: Tensor, position: Tensor, reference: Tensor, memory: Memory, blocked_mask: Tensor | None
    ) -> Tensor:
        """Map `hidden` (B, Q, C) to (B, Q, C); `reference` (B, Q, L, 2 or 4) is relative to the padded levels."""
        attended = self.self_attention(hidden, position, blocked_mask)
        hidden = self.norm_self(hidden + self.dropout_self(attended))
        sampled = self.cross_attention(
            hidden + position, reference, memory.tokens, memory.padding_mask, memory.spatial_shapes
        )
        return self.feed_forward(self.norm_cross(hidden + self.dropout_cross(sampled)))


class Decoder(nn.Module):
    """A stack of layers. After each, the box head says what the boxes are and where the next layer looks."""

    def __init__(self, *, layers: list[DecoderLayer], box_head: BoxHead, query_position: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.box_head = box_head
        self.query_position = query_position

    def forward(self, queries: QuerySet, memory: Memory, blocked_mask: Tensor | None) -> list[LayerOutput]:
        """Return each layer's output, first to last."""
        hidden = queries.content
        step = RefinementStep(queries.reference, queries.reference, queries.reference)
        outputs = []
        for index, layer in enumerate(self.layers):
            looked_at = step.sampling_reference
            position = self.query_position(looked_at, queries.position)
            ratios = memory.valid_ratios.repeat(1, 1, looked_at.shape[-1] // 2)  # (B, L, 2 or 4)
            hidden = layer(hidden, position, looked_at[:, :, None] * ratios[:, None], memory, blocked_mask)
            step = self.box_head(index, hidden, step, queries.reference)
            outputs.append(LayerOutput(hidden, step.boxes))
        return outputs
