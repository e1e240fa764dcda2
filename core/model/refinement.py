"""The box head, and what flows back through it: the gradient modes of refinement (Deformable DETR, A.4; DINO, 3.5).

With r0 the first reference, d_k the head's output in layer k and b_k = sigmoid(d_k + logit(base_k)):

    residual_base        base_1   base_k, k > 1                                          heads that b_k's loss trains
    initial              r0       r0                                                     k
    detached             r0       cut(b_{k-1})                                           k
    look_forward_twice   r0       sigmoid(d_{k-1} + logit(cut(base_{k-1})))              k-1, k
    kept                 r0       b_{k-1}                                                1..k

The boxes' values do not depend on what is cut. r0 itself is never cut, as in the official code. Where the decoder's
last LayerNorm stands before the output only (DINO), the output's boxes are `recomputed` from other features than the
boxes that are carried on.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.boxes import inverse_sigmoid
from core.model.layers import BoxMLP


@dataclass(frozen=True, slots=True)
class RefinementStep:
    """The boxes (B, Q, 4) of a layer's output; what the next box is predicted from; where the next layer looks.

    References are (B, Q, 2 or 4), or None where there are none.
    """

    boxes: Tensor | None
    reference: Tensor | None
    sampling_reference: Tensor | None


class BoxHead(nn.Module):
    """One MLP shared by all layers, or one for each, with the choices of `core.config.Refinement`.

    For a head of your own override `delta`, or `apply_to` for other coordinates: docs/your-own-idea.md.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        residual_base: Literal["initial", "detached", "look_forward_twice", "kept"],
        sampling_reference: Literal["initial", "detached", "kept"],
        recomputed: bool,
        predicts_size: Literal["nowhere", "first", "everywhere"],
        zero_start: bool,
    ) -> None:
        """Create `num_heads` MLPs.

        `predicts_size` says which heads give width and height from nothing, because their reference is a point; with
        `zero_start` their bias starts so that boxes are about 0.12 of the picture wide and high.
        """
        super().__init__()
        self.mlps = nn.ModuleList(BoxMLP(dim, zero_start=zero_start) for _ in range(num_heads))
        self.residual_base = residual_base
        self.sampling_reference = sampling_reference
        self.recomputed = recomputed
        self.predicts_size = predicts_size if zero_start else "nowhere"

    def reset_parameters(self) -> None:
        """Start sizes that are predicted from nothing at sigmoid(-2) of the picture; all else stays as it is."""
        for index, mlp in enumerate(self.mlps):
            if self.predicts_size == "everywhere" or (self.predicts_size == "first" and index == 0):
                nn.init.constant_(mlp.get_parameter("last.bias")[2:], -2.0)

    def delta(self, layer: int, hidden: Tensor) -> Tensor:
        """Map the features (B, Q, C) of `layer` to what is added to the reference's logits, (B, Q, 4)."""
        return self.mlps[layer % len(self.mlps)](hidden)

    def apply_to(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        """Return the boxes (B, Q, 4): `delta` added to the logits of a point, a box, or nothing.

        A point leaves the size to `delta` alone.
        """
        if reference is None:
            return delta.sigmoid()
        logits = inverse_sigmoid(reference)
        if reference.shape[-1] == 2:
            logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
        return (delta + logits).sigmoid()

    def forward(
        self, layer: int, hidden: Tensor, output: Tensor, step: RefinementStep, initial: Tensor | None
    ) -> RefinementStep:
        """Predict the boxes of `layer` (0 is the first).

        Args:
            layer: the number of the layer.
            hidden: (B, Q, C), the features that the next layer's reference is predicted from.
            output: (B, Q, C), the features of the output; the same tensor, unless boxes are recomputed.
            step: what the layer before left.
            initial: r0, (B, Q, 2 or 4), or None.
        """
        delta = self.delta(layer, hidden if self.recomputed else output)
        carried = self.apply_to(delta, step.reference)
        boxes = self.apply_to(self.delta(layer, output), step.reference) if self.recomputed else carried
        choices = {"initial": initial, "detached": carried.detach(), "kept": carried}
        if self.residual_base == "look_forward_twice":
            cut = step.reference if layer == 0 or step.reference is None else step.reference.detach()
            reference: Tensor | None = self.apply_to(delta, cut)
        else:
            reference = choices[self.residual_base]
        return RefinementStep(boxes, reference, choices[self.sampling_reference])
