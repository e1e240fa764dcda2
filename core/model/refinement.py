"""The box head, and what flows back through it: the gradient modes of refinement (Deformable DETR, A.4; DINO, 3.5).

With r0 the first reference, d_k the head's output in layer k and b_k = sigmoid(d_k + logit(base_k)):

    residual_base        base_1   base_k, k > 1                                          heads that b_k's loss trains
    initial              r0       r0                                                     k
    detached             r0       cut(b_{k-1})                                           k
    look_forward_twice   r0       sigmoid(d_{k-1} + logit(cut(base_{k-1})))              k-1, k
    kept                 r0       b_{k-1}                                                1..k

The boxes' values do not depend on what is cut. r0 itself is never cut, as in the official code.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.boxes import inverse_sigmoid
from core.model.layers import BoxMLP


@dataclass(frozen=True, slots=True)
class RefinementStep:
    """`boxes` (B, Q, 4) of the layer before; what the next box is predicted from; where the next layer looks."""

    boxes: Tensor
    reference: Tensor
    sampling_reference: Tensor


class BoxHead(nn.Module):
    """One MLP shared by all layers, or one for each, with the two choices of `core.config.Refinement`."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        residual_base: Literal["initial", "detached", "look_forward_twice", "kept"],
        sampling_reference: Literal["initial", "detached", "kept"],
        predicts_size: Literal["nowhere", "first", "everywhere"],
    ) -> None:
        """Create `num_heads` MLPs.

        `predicts_size` says which heads give width and height from nothing, because their reference is a point; their
        bias starts so that boxes are about 0.12 of the picture wide and high.
        """
        super().__init__()
        self.mlps = nn.ModuleList(BoxMLP(dim) for _ in range(num_heads))
        self.residual_base = residual_base
        self.sampling_reference = sampling_reference
        self.predicts_size = predicts_size

    def reset_parameters(self) -> None:
        """Start sizes that are predicted from nothing at sigmoid(-2) of the picture; all else stays at zero."""
        for index, mlp in enumerate(self.mlps):
            if self.predicts_size == "everywhere" or (self.predicts_size == "first" and index == 0):
                nn.init.constant_(mlp.get_parameter("last.bias")[2:], -2.0)

    def apply_to(self, delta: Tensor, reference: Tensor) -> Tensor:
        """Add `delta` (B, Q, 4) to the logits of a point or box; a point leaves the size to `delta` alone."""
        logits = inverse_sigmoid(reference)
        if reference.shape[-1] == 2:
            logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
        return (delta + logits).sigmoid()

    def forward(self, layer: int, hidden: Tensor, step: RefinementStep, initial: Tensor) -> RefinementStep:
        """Predict the boxes of `layer` (0 is the first) from `hidden` (B, Q, C); `initial` is r0."""
        delta = self.mlps[layer % len(self.mlps)](hidden)
        boxes = self.apply_to(delta, step.reference)
        carried = {"initial": initial, "detached": boxes.detach(), "kept": boxes}
        if self.residual_base == "look_forward_twice":
            reference = self.apply_to(delta, step.reference if layer == 0 else step.reference.detach())
        else:
            reference = carried[self.residual_base]
        return RefinementStep(boxes, reference, carried[self.sampling_reference])
