"""The decoder: queries attend to one another and read the memory, layer by layer."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.model.attention import SelfAttention
from core.model.layers import FeedForward
from core.model.refinement import RefinementStep
from core.types import Memory, QuerySet


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """`hidden` (B, Q, C) and `boxes` (B, Q, 4) of one layer."""

    hidden: Tensor
    boxes: Tensor


class DecoderLayer(nn.Module):
    """Self-attention unless there is none, cross-attention, feed-forward; each residual, LayerNorm after the sum."""

    def __init__(
        self,
        *,
        self_attention: SelfAttention | None,
        cross_attention: nn.Module,
        feed_forward: FeedForward,
        dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.dropout_self = nn.Dropout(dropout)
        self.norm_self = None if self_attention is None else nn.LayerNorm(dim)
        self.cross_attention = cross_attention
        self.dropout_cross = nn.Dropout(dropout)
        self.norm_cross = nn.LayerNorm(dim)
        self.feed_forward = feed_forward

    def forward(
        self, hidden: Tensor, position: Tensor, reference: Tensor | None, memory: Memory, blocked_mask: Tensor | None
    ) -> Tensor:
        """Map `hidden` with `position` (B, Q, C), which looks at `reference` (B, Q, 2 or 4), to (B, Q, C)."""
        if self.self_attention is not None and self.norm_self is not None:
            attended = self.self_attention(hidden, position, blocked_mask)
            hidden = self.norm_self(hidden + self.dropout_self(attended))
        read = self.cross_attention(hidden, position, reference, memory)
        return self.feed_forward(self.norm_cross(hidden + self.dropout_cross(read)))


class Decoder(nn.Module):
    """`num_steps` layers, or one applied as often. After each, the box head says what the boxes are and where to look.

    `norm` comes before all heads of the output; with `norm_carried` also before the boxes that the next layer starts
    from. What flows to the next layer's attention is never normalised by it (DETR, A.3).
    """

    def __init__(
        self,
        *,
        layers: list[DecoderLayer],
        num_steps: int,
        norm: nn.LayerNorm | None,
        norm_carried: bool,
        box_head: nn.Module,
        query_position: nn.Module,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.num_steps = num_steps
        self.norm = norm
        self.norm_carried = norm_carried
        self.box_head = box_head
        self.query_position = query_position
        self.activation_checkpointing = activation_checkpointing

    def forward(
        self, queries: QuerySet, memory: Memory, blocked_mask: Tensor | None, num_steps: int | None = None
    ) -> list[LayerOutput]:
        """Return each layer's output, first to last; `num_steps` other than in training need a repeated layer."""
        hidden = queries.content
        step = RefinementStep(queries.reference, queries.reference, queries.reference)
        outputs = []
        for index in range(num_steps or self.num_steps):
            layer = self.layers[index % len(self.layers)]
            looked_at = step.sampling_reference
            inputs = (hidden, self.query_position(looked_at, queries.position), looked_at, memory, blocked_mask)
            if self.activation_checkpointing and self.training:
                hidden = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                hidden = layer(*inputs)
            output = hidden if self.norm is None else self.norm(hidden)
            step = self.box_head(index, output if self.norm_carried else hidden, output, step, queries.reference)
            outputs.append(LayerOutput(output, step.boxes))
        return outputs
