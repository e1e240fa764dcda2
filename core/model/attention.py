"""Attention: dense among queries, and multi-scale deformable (Deformable DETR, arXiv:2010.04159, eq. 3)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from core.model.layers import Linear


class SelfAttention(nn.MultiheadAttention):
    """Dense attention among queries, batch first; positions join queries and keys, not values."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout=dropout, batch_first=True)

    def reset_parameters(self) -> None:
        """Start every matrix as Xavier uniform and every bias as zero."""
        self._reset_parameters()
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(self, x: Tensor, position: Tensor, blocked_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """Map `x` and `position` (B, Q, C) to (B, Q, C); `blocked_mask` (Q, Q) bool, True = may not attend."""
        where = x + position  # (the signature is narrower than torch's on purpose: nobody else calls this)
        return super().forward(where, where, x, attn_mask=blocked_mask, need_weights=False)[0]


class DeformableAttention(nn.Module):
    """Each query samples P points a head and level around its reference, weighted by one softmax over all L * P."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
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

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        padding_mask: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Attend from `query` (B, Q, C) to `memory` (B, S, C).

        Args:
            query: content plus position.
            reference: (B, Q, L, 2 or 4) in [0, 1] of each *padded* level.
            memory: tokens of all levels, without position.
            padding_mask: (B, S), True = padding; its values count as zero, the softmax is not renormalised.
            spatial_shapes: (H, W) of each level.

        Returns:
            (B, Q, C).
        """
        batch, num_queries, _ = query.shape
        value = self.value_proj(memory).masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D)
        samples = (batch, num_queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        weights = self.attention_weights(query).view(*samples[:3], -1).softmax(-1).view(samples)
        locations = self._locations(reference[:, :, None, :, None], offsets, spatial_shapes)
        return self.output_proj(sample_and_sum(value, spatial_shapes, locations, weights))

    def _locations(self, reference: Tensor, offsets: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> Tensor:
        """Around a point, offsets count in cells of each level; around a box, P of them reach half its side."""
        if reference.shape[-1] == 2:
            sizes = offsets.new_tensor([[w, h] for h, w in spatial_shapes])  # (x, y), from rows of (H, W)
            return reference + offsets / sizes[:, None]
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5


def sample_and_sum(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample `value` bilinearly at `locations`, zero outside, and sum with `weights`.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (H, W) of each level.
        locations: (B, Q, M, L, P, 2), (x, y) in [0, 1] of the padded level; cell centres lie at (i + 0.5) / size.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D).
    """
    batch, _, num_heads, dim = value.shape
    num_queries = locations.shape[1]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
    sampled = []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        level_map = maps[..., start : start + height * width].unflatten(-1, (height, width))
        sampled.append(
            F.grid_sample(level_map, grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        )
        start += height * width
    columns = torch.cat(sampled, dim=-1)  # (B*M, D, Q, L*P)
    factors = weights.transpose(1, 2).reshape(batch * num_heads, 1, num_queries, -1)
    summed = (columns * factors).sum(-1)  # (B*M, D, Q)
    return summed.view(batch, num_heads * dim, num_queries).transpose(1, 2)
