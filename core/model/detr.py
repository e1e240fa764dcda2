"""DETR as its papers draw it: backbone, neck, encoder, query sources, decoder, heads. No toggle is asked here."""

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from core.model.backbone import Backbone
from core.model.decoder import Decoder
from core.model.encoder import Encoder
from core.model.neck import Neck
from core.model.proposals import EncoderHeads
from core.types import Batch, Memory, Prediction, QuerySet


class DETR(nn.Module):
    """The model of DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159), from parts built outside.

    Without a decoder the encoder's heads are the output. `question` is what the encoder reads besides the picture.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: Neck,
        encoder: Encoder,
        question: nn.Module | None,
        encoder_heads: EncoderHeads | None,
        query_sources: list[nn.Module],
        decoder: Decoder | None,
        class_heads: "ClassHeads | None",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.question = question
        self.encoder_heads = encoder_heads
        self.query_sources = nn.ModuleList(query_sources)
        self.decoder = decoder
        self.class_heads = class_heads

    def forward(
        self, batch: Batch, generator: Generator | None = None, *, decoder_steps: int | None = None
    ) -> tuple[Prediction, ...]:
        """Return the predictions of the encoder's heads, if any, then each decoder layer's, a row for each query set.

        `generator` feeds random query sources; with None they see no targets, as in scoring. `decoder_steps` runs a
        repeated decoder layer more or less often than in training.
        """
        features = self.backbone(batch.images, batch.padding_mask)
        question = None if self.question is None else self.question(self.query_sources[0])
        pyramid = self.neck(features, batch.padding_mask, padded=batch.padded)
        memory = self.encoder(pyramid, question)
        proposals = () if self.encoder_heads is None else self.encoder_heads(memory)
        if self.decoder is None or self.class_heads is None:
            return proposals
        sets = self._queries(memory, proposals[-1] if proposals else None, batch, generator)
        outputs = self.decoder(join(sets), memory, blocked_mask(sets), decoder_steps)
        predictions: list[Prediction] = [*proposals]
        sizes = [queries.content.shape[1] for queries in sets]
        for index, output in enumerate(outputs):
            logits = self.class_heads(index, output.hidden)
            rows = zip(sets, logits.split(sizes, 1), output.boxes.split(sizes, 1), strict=True)
            predictions.extend(
                _prediction(queries, part, boxes, index, self.class_heads.activation) for queries, part, boxes in rows
            )
        return tuple(predictions)

    def _queries(
        self, memory: Memory, proposals: Prediction | None, batch: Batch, generator: Generator | None
    ) -> list[QuerySet]:
        known = None if generator is None else batch
        sets = [source(memory, proposals, known, generator) for source in self.query_sources]
        return [queries for queries in sets if queries is not None]


class ClassHeads(nn.ModuleList):
    """One class head for all decoder layers, or one for each."""

    def __init__(self, heads: list[nn.Module], *, activation: Literal["sigmoid", "softmax"]) -> None:
        super().__init__(heads)
        self.activation: Literal["sigmoid", "softmax"] = activation

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Map the features (B, Q, C) of `layer` to logits (B, Q, K), or (B, Q, K + 1) with softmax."""
        return self[layer % len(self)](hidden)


def _prediction(
    queries: QuerySet, logits: Tensor, boxes: Tensor, layer: int, activation: Literal["sigmoid", "softmax"]
) -> Prediction:
    source = "decoder" if queries.group == "matched" else "denoising" if queries.matching == "given" else "auxiliary"
    return Prediction(
        logits=logits,
        boxes=boxes,
        source=source,
        layer=layer,
        activation=activation,
        group=queries.group,
        matching=queries.matching,
        assignments=queries.assignments,
        valid=queries.valid,
        repeats=queries.repeats,
    )


def join(sets: list[QuerySet]) -> QuerySet:
    """Concatenate query sets along the queries."""
    if len(sets) == 1:
        return sets[0]
    positions = [queries.position for queries in sets if queries.position is not None]
    references = [queries.reference for queries in sets if queries.reference is not None]
    return QuerySet(
        content=torch.cat([queries.content for queries in sets], dim=1),
        position=torch.cat(positions, dim=1) if positions else None,
        reference=torch.cat(references, dim=1) if references else None,
    )


def blocked_mask(sets: list[QuerySet]) -> Tensor | None:
    """Return who may not attend to whom, (Q, Q) bool with True = blocked, or None when all may."""
    if all(queries.repeats == 1 and other.group in queries.sees for queries in sets for other in sets):
        return None
    rows = []
    for queries in sets:
        blocks = [_block(queries, other) for other in sets]
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows, dim=0)


def _block(queries: QuerySet, other: QuerySet) -> Tensor:
    """Return what `queries` may not see of `other`: nothing, all, or all but the own one of the groups in the set."""
    device = queries.content.device
    size, other_size = queries.content.shape[1], other.content.shape[1]
    if queries is not other or queries.repeats == 1:
        return torch.full((size, other_size), other.group not in queries.sees, device=device)
    group = torch.arange(size, device=device) // (size // queries.repeats)
    return group[:, None] != group
