"""DETR as its papers draw it: backbone, neck, encoder, query sources, decoder, heads. No toggle is asked here."""

import torch
from torch import Generator, Tensor, nn

from core.model.backbone import Backbone
from core.model.decoder import Decoder
from core.model.encoder import Encoder
from core.model.neck import Neck
from core.model.queries import EncoderHeads
from core.types import Batch, Prediction, QuerySet


class DETR(nn.Module):
    """The model of DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159), from parts built outside."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: Neck,
        encoder: Encoder,
        encoder_heads: EncoderHeads | None,
        query_sources: list[nn.Module],
        decoder: Decoder,
        class_heads: nn.ModuleList,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.encoder_heads = encoder_heads
        self.query_sources = nn.ModuleList(query_sources)
        self.decoder = decoder
        self.class_heads = class_heads

    def forward(self, batch: Batch, generator: Generator | None = None) -> tuple[Prediction, ...]:
        """Return the encoder's prediction, if it has heads, then each decoder layer's, a row for each query set.

        `generator` feeds random query sources; with None they see no targets, as at inference.
        """
        features = self.backbone(batch.images, batch.padding_mask)
        memory = self.encoder(self.neck(features, batch.padding_mask))
        proposals = self.encoder_heads(memory) if self.encoder_heads is not None else None
        targets = batch.targets if generator is not None else None
        sets = [source(memory, proposals, targets, generator) for source in self.query_sources]
        sets = [queries for queries in sets if queries is not None]
        outputs = self.decoder(join(sets), memory, blocked_mask(sets))
        predictions = [] if proposals is None else [proposals]
        sizes = [queries.content.shape[1] for queries in sets]
        for index, output in enumerate(outputs):
            logits = self.class_heads[index % len(self.class_heads)](output.hidden)
            rows = zip(sets, logits.split(sizes, 1), output.boxes.split(sizes, 1), strict=True)
            predictions.extend(_prediction(queries, part, boxes, index) for queries, part, boxes in rows)
        return tuple(predictions)


def _prediction(queries: QuerySet, logits: Tensor, boxes: Tensor, layer: int) -> Prediction:
    source = "decoder" if queries.group == "matched" else "denoising" if queries.matching == "given" else "auxiliary"
    return Prediction(
        logits=logits, boxes=boxes, source=source, layer=layer, group=queries.group, matching=queries.matching
    )


def join(sets: list[QuerySet]) -> QuerySet:
    """Concatenate query sets along the queries."""
    if len(sets) == 1:
        return sets[0]
    positions = [queries.position for queries in sets if queries.position is not None]
    return QuerySet(
        content=torch.cat([queries.content for queries in sets], dim=1),
        position=torch.cat(positions, dim=1) if positions else None,
        reference=torch.cat([queries.reference for queries in sets], dim=1),
    )


def blocked_mask(sets: list[QuerySet]) -> Tensor | None:
    """Return who may not attend to whom, (Q, Q) bool with True = blocked, or None when all may."""
    if all(other.group in queries.sees for queries in sets for other in sets):
        return None
    device = sets[0].content.device
    rows = []
    for queries in sets:
        blocks = [
            torch.full(
                (queries.content.shape[1], other.content.shape[1]), other.group not in queries.sees, device=device
            )
            for other in sets
        ]
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows, dim=0)
