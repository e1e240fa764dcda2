"""A box head that moves boxes as R-CNN does: the centre by shares of the box's sides, the sides by a factor."""

import math
from typing import Any

import torch
from torch import Tensor

from core.model.refinement import BoxHead


class RelativeBoxHead(BoxHead):
    """DETR adds to the logits of a box; here a small box moves in small steps (arXiv:1311.2524, appendix C)."""

    def __init__(self, *, largest_factor: float, **values: Any) -> None:
        super().__init__(**values)
        self.largest_change = math.log(largest_factor)

    def apply_to(self, delta: Tensor, reference: Tensor) -> Tensor:
        """Return `reference` (B, Q, 4; cxcywh in [0, 1]), moved by `delta` (B, Q, 4)."""
        if reference.shape[-1] != 4:
            raise ValueError("RelativeBoxHead needs boxes to move: set model.queries.reference to box")
        centres, sides = reference.split(2, dim=-1)
        moved = centres + delta[..., :2] * sides
        scaled = sides * delta[..., 2:].clamp(-self.largest_change, self.largest_change).exp()
        return torch.cat([moved, scaled], dim=-1).clamp(0.0, 1.0)
