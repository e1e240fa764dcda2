"""Where queries come from.

A source is a module called with (memory, proposals or None, batch or None, generator or None): batch and generator come
in training only. It returns a QuerySet, or None where it has none to give. Random sources draw from
`picture_stream`, so what a picture gets depends on the step and the picture, not on its company.
"""

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from core.boxes import inverse_sigmoid
from core.model.layers import Linear
from core.model.position import sine_frequencies, sine_of_boxes
from core.seeding import torch_stream
from core.types import Batch, Memory, Prediction, QuerySet


class LearnedQueries(nn.Module):
    """Learned position, content that is learned or zero, no reference (DETR, arXiv:2005.12872, section 3.2)."""

    def __init__(self, *, num_queries: int, dim: int, zero_content: bool, static_position: bool = True) -> None:
        super().__init__()
        self.num_queries, self.dim = num_queries, dim
        self.position = nn.Embedding(num_queries, dim) if static_position else None
        self.content = None if zero_content else nn.Embedding(num_queries, dim)

    def forward(
        self, memory: Memory, proposals: Prediction | None, batch: Batch | None, generator: Generator | None
    ) -> QuerySet:
        """Return the same queries for every picture, unless references are random."""
        like = memory.tokens
        zeros = like.new_zeros(len(like), self.num_queries, self.dim)
        return QuerySet(
            content=zeros if self.content is None else self.content.weight.expand(len(like), -1, -1),
            position=None if self.position is None else self.position.weight.expand(len(like), -1, -1),
            reference=self.reference(memory, batch, generator),
        )

    def reference(self, memory: Memory, batch: Batch | None, generator: Generator | None) -> Tensor | None:
        """Return the references, (B, Q, 2 or 4), or None."""
        return None

    def question(self) -> Tensor:
        """Return what the encoder may read, (Q, C): content and position, as far as there are any."""
        parts = [part.weight for part in (self.content, self.position) if part is not None]
        return torch.stack(parts).sum(0)


class LearnedPoints(LearnedQueries):
    """The reference point is a linear map of the learned position (Deformable DETR, section 4.1)."""

    def __init__(self, *, num_queries: int, dim: int, zero_content: bool) -> None:
        super().__init__(num_queries=num_queries, dim=dim, zero_content=zero_content)
        self.reference_points = Linear(dim, 2)

    def reset_parameters(self) -> None:
        """Start the map's bias at zero."""
        nn.init.zeros_(self.reference_points.bias)

    def reference(self, memory: Memory, batch: Batch | None, generator: Generator | None) -> Tensor:
        """Return points (B, Q, 2)."""
        assert self.position is not None  # LearnedPoints always has one
        points = self.reference_points(self.position.weight).float().sigmoid()
        return points.expand(len(memory.tokens), -1, -1)


class LearnedBoxes(LearnedQueries):
    """The reference is an anchor box (DAB-DETR, arXiv:2201.12329); the position is learned where it is static."""

    def __init__(
        self, *, num_queries: int, dim: int, zero_content: bool, static_position: bool, anchors: nn.Module
    ) -> None:
        super().__init__(num_queries=num_queries, dim=dim, zero_content=zero_content, static_position=static_position)
        self.anchors = anchors

    def reference(self, memory: Memory, batch: Batch | None, generator: Generator | None) -> Tensor:
        """Return boxes (B, Q, 4)."""
        return self.anchors(memory, batch, generator)


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

    def forward(self, memory: Memory, batch: Batch | None, generator: Generator | None) -> Tensor:
        """Return the same boxes for every picture."""
        return self.logits.sigmoid().expand(len(memory.tokens), -1, -1)


class FixedCentres(nn.Module):
    """Anchors whose centres stay where they were drawn; only their sides learn (DAB-DETR's fixed x, y)."""

    centres: Tensor

    def __init__(self, num_queries: int, size: float) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("centres", torch.empty(num_queries, 2))
        self.side_logits = nn.Parameter(torch.empty(num_queries, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centres."""
        with torch.no_grad():
            self.centres.copy_(torch.rand_like(self.centres))
            self.side_logits.copy_(inverse_sigmoid(torch.full_like(self.side_logits, self.size)))

    def forward(self, memory: Memory, batch: Batch | None, generator: Generator | None) -> Tensor:
        """Return the same boxes for every picture."""
        return torch.cat([self.centres, self.side_logits.sigmoid()], dim=-1).expand(len(memory.tokens), -1, -1)


class RandomBoxes(nn.Module):
    """Boxes drawn anew for each picture of each step; in scoring, one drawing serves all pictures.

    Centres are uniform over the picture, sides uniform up to twice `size` (the start of DiffusionDet,
    arXiv:2211.09788, draws Gaussian boxes instead).
    """

    def __init__(self, num_queries: int, size: float) -> None:
        super().__init__()
        self.num_queries, self.size = num_queries, size

    def forward(self, memory: Memory, batch: Batch | None, generator: Generator | None) -> Tensor:
        """Return boxes (B, Q, 4)."""
        device = memory.tokens.device
        if batch is None or generator is None:
            boxes = random_boxes(self.num_queries, self.size, torch_stream(0, "random boxes in scoring"))
            return boxes.to(device).expand(len(memory.tokens), -1, -1)
        streams = [picture_stream(generator, "random boxes", target.picture_id) for target in batch.targets]
        return torch.stack([random_boxes(self.num_queries, self.size, stream) for stream in streams]).to(device)


def random_boxes(count: int, size: float, generator: Generator) -> Tensor:
    """Draw `count` boxes (count, 4): centres uniform, sides uniform up to twice `size`, but within the picture."""
    drawn = torch.rand(count, 4, generator=generator)
    return torch.cat([drawn[:, :2], (drawn[:, 2:] * 2 * size).clamp(1e-3, 1.0)], dim=-1)


def picture_stream(generator: Generator, name: str, picture_id: int) -> Generator:
    """Return the generator of one picture in the step that `generator` was seeded for."""
    return torch_stream(generator.initial_seed(), name, picture_id)


class SelectedFromEncoder(nn.Module):
    """The best-ranked encoder proposals (two-stage, Deformable DETR section 4.2 and A.4); boxes are detached.

    Content: `box`, a linear map of the box's sine; `memory`, the token that the proposal comes from, detached (DINO's
    pure selection); `learned`, an embedding a rank (mixed selection); `zeros`. A static position is a linear map of the
    sine in every case.
    """

    frequencies: Tensor

    def __init__(
        self,
        *,
        num_queries: int,
        dim: int,
        temperature: float,
        content: Literal["box", "memory", "learned", "zeros"],
        static_position: bool,
    ) -> None:
        super().__init__()
        self.num_queries, self.dim = num_queries, dim
        self.content = content
        self.static_position = static_position
        self.learned = nn.Embedding(num_queries, dim) if content == "learned" else None
        self.register_buffer("frequencies", sine_frequencies(dim // 2, temperature), persistent=False)
        width = dim * (static_position + (content == "box"))
        self.projection = Linear(2 * dim, width) if width else None
        self.norm = nn.LayerNorm(width) if width else None

    def forward(
        self, memory: Memory, proposals: Prediction | None, batch: Batch | None, generator: Generator | None
    ) -> QuerySet:
        """Return the top `num_queries` proposals of each picture."""
        if proposals is None:
            raise ValueError("selected queries need encoder heads: set model.encoder_supervision")
        best = proposals.best(self.num_queries)
        boxes = best.boxes.detach()
        parts: list[Tensor] = []
        if self.projection is not None and self.norm is not None:
            embedded = self.norm(self.projection(sine_of_boxes(boxes, self.frequencies)))
            parts = list(embedded.split(self.dim, dim=-1))  # the position first, as in the official code
        return QuerySet(
            content=parts[-1] if self.content == "box" else self._content(best),
            position=parts[0] if self.static_position else None,
            reference=boxes,
        )

    def _content(self, best: Prediction) -> Tensor:
        if self.learned is not None:
            return self.learned.weight.expand(len(best.boxes), -1, -1)
        if self.content == "memory" and best.features is not None:
            return best.features.detach()
        return best.boxes.new_zeros(len(best.boxes), self.num_queries, self.dim)
