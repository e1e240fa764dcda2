"""Attention to the memory, in one signature: dense, multi-scale deformable, or within a window.

Each maps `content` (B, Q, C) with its `position` (B, Q, C) and `reference` (B, Q, 2 or 4, or None) to (B, Q, C),
reading a `Memory`. In the encoder the queries are the memory's own tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from core.model.layers import Linear
from core.model.linear import FastLinear, linear
from core.model.sampling import sample_around
from core.types import Memory


class Multihead(nn.MultiheadAttention):
    """Torch's attention, batch first, with DETR's start: every matrix Xavier uniform, every bias zero."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout=dropout, batch_first=True)

    def reset_parameters(self) -> None:
        """Start every matrix as Xavier uniform and every bias as zero."""
        self._reset_parameters()
        nn.init.xavier_uniform_(self.out_proj.weight)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, allowed: Tensor | None = None) -> Tensor:
        """Map queries (B, Q, C), keys and values (B, T, C) to (B, Q, C) by torch's fused kernels.

        `allowed` broadcasts to (B, M, Q, T), False = may not attend; None = all may.
        """
        dim = self.embed_dim
        of_query, of_key, of_value = self.in_proj_weight.split(dim)
        bias_query, bias_key, bias_value = self.in_proj_bias.split(dim)
        if query is key:
            both = linear(query, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim])
            queries, keys = both.split(dim, dim=-1)
        else:
            queries, keys = linear(query, of_query, bias_query), linear(key, of_key, bias_key)
        heads = (queries, keys, linear(value, of_value, bias_value))
        attended = F.scaled_dot_product_attention(
            *(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in heads),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class SelfAttention(Multihead):
    """Dense attention among queries; positions join queries and keys, not values."""

    def forward(self, x: Tensor, position: Tensor, blocked_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """Map `x` and `position` (B, Q, C) to (B, Q, C); `blocked_mask` (Q, Q) bool, True = may not attend."""
        where = x + position  # (the signature is narrower than torch's on purpose: nobody else calls this)
        return self.attend(where, where, x, allowed=None if blocked_mask is None else ~blocked_mask)


class DenseAttention(Multihead):
    """Every query attends to every token that is not padding (DETR, arXiv:2005.12872, A.1); references play no part."""

    def forward(self, content: Tensor, position: Tensor, reference: Tensor | None, memory: Memory) -> Tensor:  # type: ignore[override]
        """Attend; positions join queries and keys, not values."""
        keys = memory.tokens + memory.position
        own = content is memory.tokens and position is memory.position
        allowed = ~memory.padding_mask[:, None, None] if memory.padded else None
        return self.attend(keys if own else content + position, keys, memory.tokens, allowed=allowed)


class QuestionAttention(Multihead):
    """A residual step in which tokens attend to a question: embeddings that are the same for all pictures."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        self.residual_dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, position: Tensor, question: Tensor) -> Tensor:  # type: ignore[override]
        """Map `tokens` with their `position` (B, S, C), given `question` (Q, C), to (B, S, C)."""
        words = question.expand(len(tokens), -1, -1)
        return self.norm(tokens + self.residual_dropout(self.attend(tokens + position, words, words)))


class WindowAttention(nn.Module):
    """Every token attends to the cells at most `radius` away on its own level, if they are not padding."""

    def __init__(self, *, dim: int, num_heads: int, radius: int) -> None:
        super().__init__()
        self.num_heads, self.radius = num_heads, radius
        self.query_proj, self.key_proj, self.value_proj, self.output_proj = (Linear(dim, dim) for _ in range(4))

    def reset_parameters(self) -> None:
        """Start every bias as zero."""
        for projection in (self.query_proj, self.key_proj, self.value_proj, self.output_proj):
            nn.init.zeros_(projection.bias)

    def forward(self, content: Tensor, position: Tensor, reference: Tensor | None, memory: Memory) -> Tensor:
        """Attend; the queries are the memory's own tokens in their order."""
        projected = (
            self.query_proj(content + position),
            self.key_proj(memory.tokens + memory.position),
            self.value_proj(memory.tokens),
        )
        levels = []
        start = 0
        for shape in memory.spatial_shapes:
            end = start + shape[0] * shape[1]
            query, key, value = (tensor[:, start:end] for tensor in projected)
            levels.append(self._within_level(query, key, value, memory.padding_mask[:, start:end], shape))
            start = end
        return self.output_proj(torch.cat(levels, dim=1))

    def _within_level(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        query = query.unflatten(-1, (self.num_heads, -1))  # (B, T, M, D)
        keys, values = (self._around(tensor, shape).unflatten(1, (self.num_heads, -1)) for tensor in (key, value))
        inside = self._around((~padding)[..., None].to(query.dtype), shape)[:, 0] > 0  # (B, window, T)
        scores = torch.einsum("btmd,bmdwt->bmwt", query, keys) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~inside[:, None], torch.finfo(scores.dtype).min)
        return torch.einsum("bmwt,bmdwt->btmd", scores.softmax(2), values).flatten(2)

    def _around(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the neighbours of each token of (B, T, C), zero outside the level: (B, C, window, T)."""
        side = 2 * self.radius + 1
        level = tokens.transpose(1, 2).unflatten(-1, shape)
        return F.unfold(level, side, padding=self.radius).unflatten(1, (tokens.shape[-1], side * side))


class DeformableAttention(nn.Module):
    """Each query samples P points a head and level around its reference, weighted by one softmax over all L * P.

    Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, eq. 3). With `own_level` the queries are the
    memory's own tokens and sample their own level alone.
    """

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int, own_level: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_points, self.own_level = num_heads, num_points, own_level
        self.num_levels = 1 if own_level else num_levels
        samples = num_heads * self.num_levels * num_points
        self.sampling_offsets = FastLinear(dim, samples * 2)
        self.attention_weights = FastLinear(dim, samples)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Start the offsets on squares around the reference, point p at distance p + 1, all weights equal (A.4)."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (M, 2)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        grid = directions[:, None, None] * distances[:, None]  # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.zeros_(self.value_proj.bias)
        nn.init.zeros_(self.output_proj.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(self, content: Tensor, position: Tensor, reference: Tensor | None, memory: Memory) -> Tensor:
        """Attend around `reference` (B, Q, 2 or 4), in [0, 1] of the unpadded picture.

        Values in the padding count as zero; the softmax is not renormalised.
        """
        if reference is None:
            raise ValueError("deformable attention needs references: set model.queries.reference to point or box")
        query = content + position
        value = self.value_proj(memory.tokens)
        if memory.padded:
            value = value.masked_fill(memory.padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D)
        samples = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        logits = self.attention_weights(query).view(samples)
        around = reference[:, :, None].expand(-1, -1, len(memory.spatial_shapes), -1)  # (B, Q, L, 2 or 4) of the levels
        if memory.padded:
            around = around * memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]
        if not self.own_level:
            return self.output_proj(sample_around(value, memory.spatial_shapes, around, offsets, logits))
        levels = []
        start = 0
        for level, shape in enumerate(memory.spatial_shapes):
            own = slice(start, start + shape[0] * shape[1])
            of_level = around[:, own, level : level + 1]
            levels.append(sample_around(value[:, own], (shape,), of_level, offsets[:, own], logits[:, own]))
            start = own.stop
        return self.output_proj(torch.cat(levels, dim=1))
