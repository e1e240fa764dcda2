"""Faster R-CNN behind the `Detector` seam: the model whose losses are its own, and a matching for the evidence."""

from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor, nn
from torchvision.ops import box_convert

from core.boxes import cxcywh_to_xyxy, iou_and_giou
from core.config import FasterRCNN as Config
from core.model.backbones.build import build_backbone
from core.model.faster_rcnn import FasterRCNN, Regions
from core.model.initialise import initialise
from core.seeding import seeded
from core.types import Batch, Detections, LossTerm, Target

# The name and source that each loss goes by: the first stage is to the second as DETR's encoder is to its decoder.
TERMS = {
    "objectness": ("class", "encoder"),
    "proposals": ("l1", "encoder"),
    "class": ("class", "decoder"),
    "boxes": ("l1", "decoder"),
}
COST_CLASS, COST_L1, COST_GIOU = 1.0, 5.0, 2.0  # of DETR's matching, which has probabilities as well


class FasterRCNNDetector(nn.Module):
    """What training and evaluation see of Faster R-CNN. Its detections need NMS."""

    def __init__(self, *, model: FasterRCNN, classes_per_query: Literal["all", "one"]) -> None:
        super().__init__()
        self.model = model
        self.classes_per_query: Literal["all", "one"] = classes_per_query

    def loss(self, batch: Batch, generator: Generator) -> tuple[LossTerm, ...]:
        """Return four loss terms of weight 1; `l1` is the smooth L1 of box offsets (beta 1/9).

        Each is torchvision's mean over the anchors or regions that were sampled, which are as many for every picture:
        it is not divided by the number of true boxes. Where the batch is a part of an optimiser step, it counts by its
        share of the pictures.
        """
        share = len(batch.targets) / len(batch.counts)
        return tuple(
            LossTerm(name=TERMS[key][0], source=TERMS[key][1], layer=0, value=share * value, weight=1.0)
            for key, value in self.model.losses(batch, generator).items()
        )

    @torch.no_grad()
    def detect(self, batch: Batch, *, top_k: int) -> tuple[Detections, ...]:
        """Return the best (proposal, class) pairs of each picture, before NMS.

        `queries` are the numbers of the proposals, best first stage first. `gt_ids` are by DETR's one-to-one matching,
        in which a proposal has, for a true box, the probability and the box of its class.
        """
        return tuple(
            _detections(regions, target, top_k=top_k, one_class=self.classes_per_query == "one")
            for regions, target in zip(self.model(batch), batch.targets, strict=True)
        )


def _detections(regions: Regions, target: Target, *, top_k: int, one_class: bool) -> Detections:
    scores = regions.probabilities
    if one_class:
        best_class = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(1, keepdim=True), value=True)
        scores = scores.masked_fill(~best_class, -1.0)
    num_pairs = len(scores) if one_class else scores.numel()
    best, pairs = scores.flatten().topk(min(top_k, num_pairs))
    height, width = target.original_size
    queries = pairs // scores.shape[1]
    return Detections(
        picture_id=target.picture_id,
        scores=best,
        labels=pairs % scores.shape[1],
        boxes_xyxy_px=regions.boxes.flatten(0, 1)[pairs] * best.new_tensor([width, height, width, height]),
        queries=queries,
        gt_ids=_owners(regions, target)[queries],
        layer=0,
    )


def _owners(regions: Regions, target: Target) -> Tensor:
    """Return for each proposal the annotation that it is matched to, or -1: (P,) int64."""
    probabilities = regions.probabilities[:, target.labels]  # (P, N)
    boxes = regions.boxes[:, target.labels]  # (P, N, 4)
    distance = (box_convert(boxes, "xyxy", "cxcywh") - target.boxes).abs().sum(-1)
    _, giou = iou_and_giou(boxes, cxcywh_to_xyxy(target.boxes))
    costs = COST_L1 * distance - COST_CLASS * probabilities - COST_GIOU * giou
    if not torch.isfinite(costs).all():
        raise FloatingPointError("the matching cost of the second stage is not finite")
    proposals, matched = (
        torch.as_tensor(places, device=costs.device) for places in linear_sum_assignment(costs.cpu().numpy())
    )
    owners = torch.full_like(regions.probabilities[:, 0], -1, dtype=torch.int64)
    owners[proposals] = target.annotation_ids[matched]
    return owners


def build_faster_rcnn(
    config: Config, *, num_classes: int, seed: int, classes_per_query: Literal["all", "one"]
) -> FasterRCNNDetector:
    """Build it on the CPU with weights from `seed`, then load the backbone's where the config names them."""
    with seeded(seed, "construction"):  # what constructors draw is replaced below
        backbone = build_backbone(config.backbone, strides=config.strides)
        model = FasterRCNN(
            backbone=backbone,
            num_classes=num_classes,
            fpn_dim=config.fpn_dim,
            head_dim=config.head_dim,
            anchor_scale=config.anchor_scale,
            proposals=config.proposals,
        )
    initialise(model, seed=seed)
    backbone.load_pretrained()
    return FasterRCNNDetector(model=model, classes_per_query=classes_per_query)
