"""THE shape documentation: what passes between the parts of the detector.

Dimension letters: **B** pictures in the batch, **C** hidden_dim, **L** levels, **S** = sum of H_l * W_l (tokens of
memory), **Q** queries, **M** heads, **P** sampling points (the Deformable DETR paper's K), **K** classes, **N** boxes
of a picture.

Boxes are (cx, cy, w, h) in [0, 1] of the *unpadded* picture unless the name says otherwise (`boxes_xyxy_px`).
`spatial_shapes` rows are (H, W); points, `valid_ratios` and offsets are (x, y) or (w, h).
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The true boxes of one picture.

    `labels` (N,) int64 in 0..K-1; `boxes` (N, 4); `annotation_ids` (N,) int64, as in the ground truth; `picture_id` as
    in the annotation file; `original_size` (H, W) in pixels before any resizing. Crowd boxes are not here: they count
    in scoring only.
    """

    labels: Tensor
    boxes: Tensor
    annotation_ids: Tensor
    picture_id: int
    original_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures padded at the bottom and right to one size.

    `images` (B, 3, H, W) uint8, RGB, 0 where padded (the backbone normalises as its weights ask); `padding_mask`
    (B, H, W) bool, True = padding. `box_counts`: number of true boxes of every picture of the whole optimiser step,
    over all processes and parts of the batch; None where this batch is all. Losses are normalised by it. `padded`
    False = nothing is padded, for sure: `to` finds out, while it costs no waiting for a GPU.
    """

    images: Tensor
    padding_mask: Tensor
    targets: tuple[Target, ...]
    box_counts: tuple[int, ...] | None = None
    padded: bool = True

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of true boxes of every picture of the optimiser step."""
        return self.box_counts or tuple(len(target.labels) for target in self.targets)

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; from page-locked memory without waiting for it."""
        padded = self.padded and may_be_padded(self.padding_mask)
        if self.images.device == device:
            return replace(self, padded=padded)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        targets = tuple(
            replace(
                target,
                labels=moved(target.labels),
                boxes=moved(target.boxes),
                annotation_ids=moved(target.annotation_ids),
            )
            for target in self.targets
        )
        images, padding_mask = moved(self.images), moved(self.padding_mask)
        return replace(self, images=images, padding_mask=padding_mask, targets=targets, padded=padded)


def may_be_padded(padding_mask: Tensor) -> bool:
    """Return whether any of `padding_mask` is True; on a GPU, where one would have to wait for the answer, True."""
    return padding_mask.device.type != "cpu" or bool(padding_mask.any())


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturePyramid:
    """Projected feature maps, finest first.

    `features` L x (B, C, H_l, W_l); `padding_masks` L x (B, H_l, W_l), True = padding; `padded` False = none is.
    """

    features: tuple[Tensor, ...]
    padding_masks: tuple[Tensor, ...]
    padded: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The encoder's output over all levels.

    `tokens` (B, S, C); `position` (B, S, C) their position embedding; `padding_mask` (B, S) True = padding;
    `spatial_shapes` L x (H, W); `valid_ratios` (B, L, 2) (w, h) in (0, 1]; `layers` the output of each encoder layer,
    each (B, S, C), the last one being `tokens`; `padded` False = no token is padding, and all valid ratios are 1.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Tensor
    layers: tuple[Tensor, ...]
    padded: bool = True


# How queries get their true boxes: `one_to_one` within each of `repeats` equal groups of queries that stand side by
# side, `one_to_many` with every box `repeats` times, or `given` by `assignments`.
Matching = Literal["one_to_one", "one_to_many", "given"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuerySet:
    """What the decoder starts from.

    `content` (B, Q, C); `position` (B, Q, C) or None where the position follows the reference; `reference`
    (B, Q, 2 or 4) after the sigmoid, or None where boxes come from the content alone (DETR). `group` names the set;
    `sees` are the groups that it may attend to in self-attention. `assignments`: of each picture, where the matching
    is given. `valid` (B, Q) bool, False = a slot that is no query, or None = all are. `repeats`: the set holds as many
    groups of equal size side by side, which do not see one another; each true box has a query in each group, and the
    set's losses are divided by as much.
    """

    content: Tensor
    position: Tensor | None
    reference: Tensor | None
    group: str = "matched"
    sees: frozenset[str] = frozenset({"matched"})
    matching: Matching = "one_to_one"
    assignments: "tuple[Assignment, ...] | None" = None
    valid: Tensor | None = None
    repeats: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a head says of each query or token.

    `logits` (B, Q, K), or (B, Q, K + 1) where `activation` is softmax, the last one being "no object"; `boxes`
    (B, Q, 4). `source`: denoising rows know their targets, auxiliary rows are extra queries, both of the decoder.
    `layer` counts from 0 in the decoder, from 1 in the encoder. `valid` (B, Q) bool, False = never to be matched or
    detected, or None = all valid. `class_agnostic`: every target counts as class 0. `assignments` and `repeats` are
    those of the query set. `features` (B, Q, C): what an encoder head read, for queries that start from it.
    """

    logits: Tensor
    boxes: Tensor
    source: Literal["decoder", "encoder", "denoising", "auxiliary"]
    layer: int
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    group: str = "matched"
    matching: Matching = "one_to_one"
    assignments: "tuple[Assignment, ...] | None" = None
    valid: Tensor | None = None
    repeats: int = 1
    class_agnostic: bool = False
    features: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """K: the classes without "no object"."""
        return self.logits.shape[-1] - (self.activation == "softmax")

    def in_fp32(self) -> "Prediction":
        """Return it in single precision, which matching, losses and scores need whatever the model computes in."""
        return replace(self, logits=self.logits.float(), boxes=self.boxes.float())

    def probabilities(self) -> Tensor:
        """Return the score of each class, (B, Q, K)."""
        if self.activation == "softmax":
            return self.logits.softmax(-1)[..., :-1]
        return self.logits.sigmoid()

    def ranking(self) -> Tensor:
        """Return the score of each query, (B, Q): of class 0 where class-agnostic, else of the best class.

        Invalid ones score -inf.
        """
        scores = self.logits if self.activation == "sigmoid" else self.probabilities()
        best = scores[..., 0] if self.class_agnostic else scores.amax(-1)
        return best if self.valid is None else best.masked_fill(~self.valid, -torch.inf)

    def best_queries(self, count: int) -> Tensor:
        """Return the `count` best-ranked valid queries of each picture, (B, count) int64.

        Raises:
            ValueError: if a picture has fewer valid ones.
        """
        if self.valid is not None:
            fewest = int(self.valid.sum(1).min())
            if fewest < count:
                raise ValueError(f"{count} queries are asked of {fewest} valid tokens: lower model.queries.num_queries")
        return self.ranking().topk(count, dim=1).indices

    def best(self, count: int) -> "Prediction":
        """Keep the `count` best-ranked valid queries; see `best_queries`."""
        chosen = self.best_queries(count)[..., None]
        features = self.features
        if features is not None:
            features = features.gather(1, chosen.expand(-1, -1, features.shape[-1]))
        return replace(
            self,
            logits=self.logits.gather(1, chosen.expand(-1, -1, self.logits.shape[-1])),
            boxes=self.boxes.gather(1, chosen.expand(-1, -1, 4)),
            features=features,
            valid=None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Which query owns which target in one picture: `queries` and `targets`, both int64 of one length.

    One-to-one matching gives min(Q, N) pairs; one-to-many and given ones may name a target several times.
    """

    queries: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """One weighted scalar of the loss. `name` is class, l1 or giou."""

    name: str
    source: str
    layer: int
    value: Tensor  # () before weighting
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """The scored boxes of one picture, best first; before NMS.

    `scores` (D,) in [0, 1]; `labels` (D,) in 0..K-1; `boxes_xyxy_px` (D, 4) in pixels of the original picture;
    `queries` (D,) the query that each comes from, in decoder layer `layer`; `gt_ids` (D,) the annotation that
    one-to-one matching gives that query, or -1. `recalled`: how many of the picture's true boxes have a selected
    encoder proposal of IoU .5 or more; None where nothing is selected.
    """

    picture_id: int
    scores: Tensor
    labels: Tensor
    boxes_xyxy_px: Tensor
    queries: Tensor
    gt_ids: Tensor
    layer: int
    recalled: int | None = None

    def best(self, count: int) -> "Detections":
        """Keep the first `count`."""
        return self.keep(slice(count))

    def keep(self, places: Tensor | slice) -> "Detections":
        """Keep the detections at `places`, in that order."""
        kept = {
            name: getattr(self, name)[places] for name in ("scores", "labels", "boxes_xyxy_px", "queries", "gt_ids")
        }
        return replace(self, **kept)


class Detector(Protocol):
    """All that training and evaluation know of a model."""

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[LossTerm, ...]:
        """Return the loss terms of one batch; `generator` feeds what is random in the loss (denoising)."""
        ...

    def detect(self, batch: Batch, *, top_k: int) -> tuple[Detections, ...]:
        """Return the detections of each picture, best first, `top_k` of them at most."""
        ...
