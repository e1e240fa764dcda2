"""Detection heads on the encoder's tokens: their loss supervises the encoder, their boxes may become queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.boxes import inverse_sigmoid
from core.model.encoder import cell_centres
from core.model.layers import BoxMLP, ClassHead, Linear
from core.types import Memory, Prediction


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a head reads: `features` (B, S, C) of encoder layer `layer`, `anchors` (B, S, 4) and which are `valid`."""

    features: Tensor
    anchors: Tensor
    valid: Tensor
    layer: int


class TokenHead(nn.Module):
    """Class logits, and a box refined from the anchor, for every token (Deformable DETR, section 4.2)."""

    def __init__(
        self,
        *,
        dim: int,
        num_logits: int,
        activation: Literal["sigmoid", "softmax"],
        class_agnostic: bool,
        prior: bool,
    ) -> None:
        super().__init__()
        self.project = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = ClassHead(dim, num_logits, prior=prior)
        self.box_mlp = BoxMLP(dim)
        self.activation: Literal["sigmoid", "softmax"] = activation
        self.class_agnostic = class_agnostic

    def forward(self, tokens: Tokens) -> Prediction:
        """Predict for all S tokens; invalid ones are read as zeros, as in the official code."""
        features = self.norm(self.project(tokens.features.masked_fill(~tokens.valid[..., None], 0.0)))
        return Prediction(
            logits=self.class_head(features),
            boxes=(self.box_mlp(features) + inverse_sigmoid(tokens.anchors)).sigmoid(),
            features=features,
            source="encoder",
            layer=tokens.layer,
            activation=self.activation,
            valid=tokens.valid,
            class_agnostic=self.class_agnostic,
        )


class EncoderHeads(nn.Module):
    """Heads after the last encoder layer, or after each, and the anchors that they share.

    Anchors are centred on the tokens' cells, `anchor_scale` x 2^level of the picture wide and high; with
    `learned_scale` width and height are parameters that start there (DINO). Tokens in the padding, or whose anchor
    leaves (0.01, 0.99), are invalid (Deformable DETR's official code).
    """

    def __init__(
        self, *, heads: Sequence[TokenHead], every_layer: bool, anchor_scale: float, learned_scale: bool
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.every_layer = every_layer
        self.anchor_scale = anchor_scale
        self.anchor_logits = nn.Parameter(torch.empty(2)) if learned_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start a learned scale at `anchor_scale`."""
        if self.anchor_logits is not None:
            scale = torch.full_like(self.anchor_logits, self.anchor_scale)
            with torch.no_grad():
                self.anchor_logits.copy_(inverse_sigmoid(scale))

    def forward(self, memory: Memory) -> tuple[Prediction, ...]:
        """Predict for all tokens of each supervised layer, the last one last."""
        anchors = self._anchors(memory)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding_mask
        outputs = memory.layers if self.every_layer else (memory.tokens,)
        first = len(memory.layers) - len(outputs) + 1
        return tuple(
            self.heads[index % len(self.heads)](Tokens(features, anchors, valid, max(0, first + index)))
            for index, features in enumerate(outputs)
        )

    def _anchors(self, memory: Memory) -> Tensor:
        """Return the anchor of each token, (B, S, 4)."""
        centres = cell_centres(memory)
        if self.anchor_logits is None:
            scale = torch.full((2,), self.anchor_scale, device=centres.device)
        else:
            scale = self.anchor_logits.sigmoid()
        sides = [
            (scale * 2.0**level).expand(height * width, 2)
            for level, (height, width) in enumerate(memory.spatial_shapes)
        ]
        return torch.cat([centres, torch.cat(sides).expand(len(centres), -1, -1)], dim=-1)
