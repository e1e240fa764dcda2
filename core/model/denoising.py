"""Denoising: extra queries made from noisy true boxes, in training only (DN-DETR, DINO), and their control.

Every set holds groups of equal size side by side, one slot a group for each box of the fullest picture of the step. The
groups see themselves and the matched queries, which see none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from core.model.queries import picture_stream, random_boxes
from core.types import Assignment, Batch, Memory, Prediction, QuerySet

SEES = frozenset({"denoising", "matched"})


@dataclass(frozen=True, slots=True)
class Noisy:
    """Noisy copies of one picture's N boxes in G groups: `boxes` (G, N, 4), `labels` (G, N)."""

    boxes: Tensor
    labels: Tensor


class Denoising(nn.Module):
    """Noisy copies of the true boxes that know which box they come from (DN-DETR, arXiv:2203.01305, section 4).

    A copy's centre moves by up to `box_noise` of half its sides, its sides change by up to `box_noise` of themselves,
    and with probability `label_noise` its label is a random class. The content is an embedding of the label.
    """

    def __init__(self, *, dim: int, num_classes: int, groups: int, label_noise: float, box_noise: float) -> None:
        super().__init__()
        self.num_classes, self.groups = num_classes, groups
        self.label_noise, self.box_noise = label_noise, box_noise
        self.labels = nn.Embedding(num_classes, dim)

    def forward(
        self, memory: Memory, proposals: Prediction | None, batch: Batch | None, generator: Generator | None
    ) -> QuerySet | None:
        """Return the noisy queries; None in scoring, and where the step has no true box."""
        if batch is None or generator is None or not max(batch.counts):
            return None
        slots, groups = max(batch.counts), self.groups
        pictures = [
            self._noisy(
                target.boxes.cpu(), target.labels.cpu(), picture_stream(generator, "denoising", target.picture_id)
            )
            for target in batch.targets
        ]
        valid = torch.zeros(len(pictures), groups, slots, dtype=torch.bool)
        for row, target in zip(valid, batch.targets, strict=True):
            row[:, : len(target.labels)] = True
        return self._query_set(pictures, batch, groups=groups, slots=slots, valid=valid.flatten(1))

    def _noisy(self, boxes: Tensor, labels: Tensor, generator: Generator) -> Noisy:
        shape = (self.groups, len(boxes), 4)
        shift = (2 * torch.rand(shape, generator=generator) - 1) * self.box_noise
        sides = boxes[:, 2:]
        moved = torch.cat([boxes[:, :2] + shift[..., :2] * sides / 2, sides * (1 + shift[..., 2:])], dim=-1)
        return Noisy(moved.clamp(0, 1), self._flip(labels.expand(self.groups, -1), generator))

    def _flip(self, labels: Tensor, generator: Generator) -> Tensor:
        """Replace labels by random classes, each with probability `label_noise`."""
        drawn = torch.randint(self.num_classes, labels.shape, generator=generator)
        return torch.where(torch.rand(labels.shape, generator=generator) < self.label_noise, drawn, labels)

    def _query_set(
        self, pictures: list[Noisy], batch: Batch, *, groups: int, slots: int, valid: Tensor | None
    ) -> QuerySet:
        """Lay the copies of each picture into the first slots of its groups; the other slots have zero content."""
        device = self.labels.weight.device
        copies = _laid_out(pictures, groups, slots, lambda noisy: noisy.boxes, fill=0.5)
        labels = _laid_out(pictures, groups, slots, lambda noisy: noisy.labels, fill=-1).to(device)
        content = self.labels(labels.clamp(min=0)) * (labels >= 0)[..., None]
        return QuerySet(
            content=content,
            position=None,
            reference=copies.to(device),
            group="denoising",
            sees=SEES,
            matching="given",
            assignments=tuple(_given(len(target.labels), groups, slots, device) for target in batch.targets),
            valid=None if valid is None else valid.to(device),
            repeats=groups,
        )


class ContrastiveDenoising(Denoising):
    """Each noisy copy has a noisier twin that is to be "no object" (DINO, arXiv:2203.03605, section 3.3).

    Corners move by up to `box_noise` of half the sides, those of a twin by once to twice that. The number of groups is
    `num_queries` over the boxes of the step's fullest picture. As in the official code, slots without a box take part
    as "no object".
    """

    def __init__(self, *, dim: int, num_classes: int, num_queries: int, label_noise: float, box_noise: float) -> None:
        super().__init__(dim=dim, num_classes=num_classes, groups=1, label_noise=label_noise, box_noise=box_noise)
        self.num_queries = num_queries

    def forward(
        self, memory: Memory, proposals: Prediction | None, batch: Batch | None, generator: Generator | None
    ) -> QuerySet | None:
        """Return the noisy queries, in each group first the copies, then their twins."""
        if batch is None or generator is None or not max(batch.counts):
            return None
        most = max(batch.counts)
        groups = max(1, self.num_queries // most)
        pictures = []
        for target in batch.targets:
            stream = picture_stream(generator, "denoising", target.picture_id)
            boxes, labels = target.boxes.cpu(), target.labels.cpu()
            copies = self._moved(boxes, groups, stream, least=0.0)
            twins = self._moved(boxes, groups, stream, least=1.0)
            flipped = self._flip(labels.expand(groups, -1), stream), self._flip(labels.expand(groups, -1), stream)
            pad = most - len(labels)
            pictures.append(
                Noisy(
                    torch.cat([nn.functional.pad(copies, (0, 0, 0, pad), value=0.5), twins], dim=1),
                    torch.cat([nn.functional.pad(flipped[0], (0, pad), value=-1), flipped[1]], dim=1),
                )
            )
        return self._query_set(pictures, batch, groups=groups, slots=2 * most, valid=None)

    def _moved(self, boxes: Tensor, groups: int, generator: Generator, *, least: float) -> Tensor:
        shape = (groups, len(boxes), 4)
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        shift = (torch.rand(shape, generator=generator) + least) * sign * self.box_noise
        centre, sides = boxes[:, :2], boxes[:, 2:]
        corners = torch.cat([centre - sides / 2, centre + sides / 2], dim=-1) + shift * (sides / 2).repeat(1, 2)
        low, high = corners.clamp(0, 1).split(2, dim=-1)
        return torch.cat([(low + high) / 2, (high - low).clamp(min=0)], dim=-1)


class MatchedExtra(nn.Module):
    """The control of denoising: as many queries in as many groups, matched in each group.

    They start from one learned content and random boxes of up to half the picture's sides.
    """

    def __init__(self, *, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.content = nn.Embedding(1, dim)

    def forward(
        self, memory: Memory, proposals: Prediction | None, batch: Batch | None, generator: Generator | None
    ) -> QuerySet | None:
        """Return the random queries; None in scoring, and where the step has no true box."""
        if batch is None or generator is None or not max(batch.counts):
            return None
        slots = max(batch.counts)
        device = self.content.weight.device
        boxes, valid = [], torch.zeros(len(batch.targets), self.groups, slots, dtype=torch.bool)
        for row, target in zip(valid, batch.targets, strict=True):
            row[:, : len(target.labels)] = True
            stream = picture_stream(generator, "extra queries", target.picture_id)
            boxes.append(random_boxes(self.groups * slots, 0.25, stream))
        return QuerySet(
            content=self.content.weight.expand(len(boxes), self.groups * slots, -1),
            position=None,
            reference=torch.stack(boxes).to(device),
            group="denoising",
            sees=SEES,
            valid=valid.flatten(1).to(device),
            repeats=self.groups,
        )


def _laid_out(
    pictures: list[Noisy], groups: int, slots: int, part: Callable[[Noisy], Tensor], *, fill: float
) -> Tensor:
    """Return (B, groups * slots, ...) with each picture's values in the first slots of its groups."""
    example = part(pictures[0])
    laid = example.new_full((len(pictures), groups, slots, *example.shape[2:]), fill)
    for row, noisy in zip(laid, pictures, strict=True):
        values = part(noisy)
        row[:, : values.shape[1]] = values
    return laid.flatten(1, 2)


def _given(num_boxes: int, groups: int, slots: int, device: torch.device) -> Assignment:
    targets = torch.arange(num_boxes, device=device).repeat(groups)
    return Assignment(
        queries=torch.arange(groups, device=device).repeat_interleave(num_boxes) * slots + targets, targets=targets
    )
