"""Where queries come from.

A source is a module called with (memory, proposals or None, targets or None, generator or None): targets and generator
come in training only. It returns a QuerySet, or None where it has none to give.
"""

import torch
from torch import Tensor, nn

from core.boxes import inverse_sigmoid
from core.model.encoder import cell_centres
from core.model.layers import BoxMLP, Linear
from core.model.position import sine_frequencies, sine_of_boxes
from core.types import Memory, Prediction, QuerySet


class LearnedPoints(nn.Module):
    """Learned position and content; the reference point is a linear map of the position (Deformable DETR)."""

    def __init__(self, *, num_queries: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Embedding(num_queries, dim)
        self.content = nn.Embedding(num_queries, dim)
        self.reference_points = Linear(dim, 2)

    def reset_parameters(self) -> None:
        """Start the map's bias at zero."""
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory, *_: object) -> QuerySet:
        """Return the same queries for every picture."""
        batch = len(memory.tokens)
        return QuerySet(
            content=self.content.weight.expand(batch, -1, -1),
            position=self.position.weight.expand(batch, -1, -1),
            reference=self.reference_points(self.position.weight).sigmoid().expand(batch, -1, -1),
        )


class LearnedBoxes(nn.Module):
    """Learned content and 4-d anchors (DAB-DETR, arXiv:2201.12329), and a learned position where it is static."""

    def __init__(self, *, num_queries: int, dim: int, anchor_size: float, static_position: bool) -> None:
        super().__init__()
        self.content = nn.Embedding(num_queries, dim)
        self.position = nn.Embedding(num_queries, dim) if static_position else None
        self.anchors = Anchors(num_queries, anchor_size)

    def forward(self, memory: Memory, *_: object) -> QuerySet:
        """Return the same queries for every picture."""
        batch = len(memory.tokens)
        return QuerySet(
            content=self.content.weight.expand(batch, -1, -1),
            position=None if self.position is None else self.position.weight.expand(batch, -1, -1),
            reference=self.anchors.logits.sigmoid().expand(batch, -1, -1),
        )


class Anchors(nn.Module):
    """Boxes as learned logits (Q, 4): centres start uniform over the picture, sides at one size."""

    def __init__(self, num_queries: int, size: float) -> None:
        super().__init__()
        self.size = size
        self.logits = nn.Parameter(torch.empty(num_queries, 4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centres."""
        with torch.no_grad():
            centres = torch.rand_like(self.logits[:, :2])
            self.logits.copy_(inverse_sigmoid(torch.cat([centres, torch.full_like(centres, self.size)], dim=-1)))


class SelectedFromEncoder(nn.Module):
    """The best-scored encoder proposals (two-stage, Deformable DETR section 4.2 and A.4).

    Boxes are detached; content (and a static position) are a linear map of their sine embedding.
    """

    def __init__(self, *, num_queries: int, dim: int, temperature: float, static_position: bool) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.register_buffer("frequencies", sine_frequencies(dim // 2, temperature), persistent=False)
        width = 2 * dim if static_position else dim
        self.projection = Linear(2 * dim, width)
        self.norm = nn.LayerNorm(width)
        self.static_position = static_position

    frequencies: Tensor

    def forward(self, memory: Memory, proposals: Prediction | None, *_: object) -> QuerySet:  # noqa: ARG002 - one signature
        """Return the top `num_queries` proposals of each picture."""
        if proposals is None:
            raise ValueError("selected queries need encoder heads: set model.encoder_supervision")
        boxes = proposals.best(self.num_queries).boxes.detach()
        embedded = self.norm(self.projection(sine_of_boxes(boxes, self.frequencies)))
        if not self.static_position:
            return QuerySet(content=embedded, position=None, reference=boxes)
        position, content = embedded.chunk(2, dim=-1)
        return QuerySet(content=content, position=position, reference=boxes)


class EncoderHeads(nn.Module):
    """A detection head on every token: class logits, and a box refined from an anchor at the token's cell.

    Anchors are squares of `anchor_scale` x 2^level of the picture. Tokens in the padding, or whose anchor leaves
    (0.01, 0.99), are invalid (Deformable DETR's `gen_encoder_output_proposals`).
    """

    def __init__(self, *, dim: int, num_classes: int, anchor_scale: float, class_agnostic: bool) -> None:
        super().__init__()
        self.project = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = ClassHead(dim, num_classes)
        self.box_mlp = BoxMLP(dim)
        self.anchor_scale = anchor_scale
        self.class_agnostic = class_agnostic

    def forward(self, memory: Memory) -> Prediction:
        """Predict for all S tokens."""
        centres = cell_centres(memory)
        sides = [
            torch.full((h * w,), self.anchor_scale * 2.0**level, device=centres.device)
            for level, (h, w) in enumerate(memory.spatial_shapes)
        ]
        side = torch.cat(sides)[None, :, None].expand(len(centres), -1, 2)
        anchors = torch.cat([centres, side], dim=-1)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding_mask
        tokens = self.norm(self.project(memory.tokens.masked_fill(~valid[..., None], 0.0)))
        boxes = (self.box_mlp(tokens) + inverse_sigmoid(anchors)).sigmoid()
        return Prediction(
            logits=self.class_head(tokens),
            boxes=boxes,
            source="encoder",
            layer=len(memory.layers),
            valid=valid,
            class_agnostic=self.class_agnostic,
        )


class ClassHead(nn.Linear):
    """Class logits whose bias starts at a probability of 0.01 (focal loss, arXiv:1708.02002, section 3.3)."""

    PRIOR_LOGIT = -4.595119850134589  # log(0.01 / 0.99)

    def reset_parameters(self) -> None:
        """Draw the weight, set the bias."""
        super().reset_parameters()
        nn.init.constant_(self.bias, self.PRIOR_LOGIT)
