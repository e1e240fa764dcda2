"""Faster R-CNN with a feature pyramid, from torchvision's parts (arXiv:1506.01497, 1612.03144).

Thresholds, samples and initialisation are torchvision's. What is not: pictures come resized and as uint8, and anchors
and pooling are scaled to the picture (`core.model.regions`).
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from core.boxes import cxcywh_to_xyxy
from core.model.backbone import Backbone
from core.model.initialise import reset_parameters
from core.model.regions import FAR_PX, RATIOS, LevelPool, ScaledAnchors
from core.seeding import seeded
from core.types import Batch

CELLS = 7  # of a pooled region, each way


@dataclass(frozen=True, kw_only=True, slots=True)
class Regions:
    """What the second stage says of one picture's P proposals.

    `probabilities` (P, K); `boxes` (P, K, 4) xyxy, one for each class, as a share of the unpadded picture.
    """

    probabilities: Tensor
    boxes: Tensor


class FasterRCNN(nn.Module):
    """Backbone, pyramid, proposals, and a head that classifies and refines each proposal.

    The pyramid has a level more than the backbone, of twice its last stride, for proposals alone. `proposals`: how many
    a picture has at inference; in training twice as many, from which regions are sampled.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        fpn_dim: int,
        head_dim: int,
        anchor_scale: float,
        proposals: int,
    ) -> None:
        super().__init__()
        strides = backbone.strides
        self.backbone = backbone
        self.fpn = _Pyramid(list(backbone.channels), fpn_dim, extra_blocks=LastLevelMaxPool())
        anchors = ScaledAnchors(scale=anchor_scale, strides=(*strides, 2 * strides[-1]))
        counts = {"training": 2 * proposals, "testing": proposals}
        self.rpn = _ProposalNetwork(
            anchors,  # type: ignore[arg-type]  # not a subclass of torchvision's, but all that is asked of one
            _ProposalHead(fpn_dim, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=counts,
            post_nms_top_n=counts,
            nms_thresh=0.7,
        )
        self.heads = RoIHeads(
            LevelPool(scale=anchor_scale, strides=strides, cells=CELLS),
            TwoMLPHead(fpn_dim * CELLS**2, head_dim),
            _Predictor(head_dim, num_classes + 1),  # class 0 is the background
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.0,
            nms_thresh=1.0,
            detections_per_img=0,
        )

    def losses(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Return the losses `objectness`, `proposals`, `class` and `boxes`, each a mean over what was sampled.

        `generator` chooses the anchors and regions that are sampled.
        """
        images, features = self._features(batch)
        targets = [
            {"boxes": cxcywh_to_xyxy(target.boxes) * _scale(size, target.boxes), "labels": target.labels + 1}
            for target, size in zip(batch.targets, images.image_sizes, strict=True)
        ]
        # Torchvision gives losses in training mode only; they hold nothing else that depends on it.
        self.rpn.train()
        self.heads.train()
        draw = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with seeded(draw, "sampled regions"):
            proposals, first = self.rpn(images, features, targets)
            _, second = self.heads(features, proposals, images.image_sizes, targets)
        return {
            "objectness": first["loss_objectness"],
            "proposals": first["loss_rpn_box_reg"],
            "class": second["loss_classifier"],
            "boxes": second["loss_box_reg"],
        }

    def forward(self, batch: Batch) -> tuple[Regions, ...]:
        """Return the scored regions of each picture, before NMS."""
        images, features = self._features(batch)
        self.rpn.eval()
        proposals, _ = self.rpn(images, features)
        pooled = self.heads.box_roi_pool(features, proposals, images.image_sizes)
        logits, deltas = self.heads.box_predictor(self.heads.box_head(pooled))
        boxes = self.heads.box_coder.decode(deltas, proposals)  # (sum P, K + 1, 4)
        counts = [len(own) for own in proposals]
        found = zip(logits.softmax(-1).split(counts), boxes.split(counts), images.image_sizes, strict=True)
        return tuple(
            Regions(
                probabilities=probabilities[:, 1:],
                boxes=clip_boxes_to_image(own[:, 1:], size) / _scale(size, own),
            )
            for probabilities, own, size in found
        )

    def _features(self, batch: Batch) -> tuple[ImageList, dict[str, Tensor]]:
        maps = self.backbone(batch.images, batch.padding_mask)
        features = self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(maps)))
        inside = ~batch.padding_mask
        sizes = torch.stack([inside.any(2).sum(1), inside.any(1).sum(1)], dim=1).tolist()
        return ImageList(batch.images, [(height, width) for height, width in sizes]), features


def _scale(size: tuple[int, int], like: Tensor) -> Tensor:
    height, width = size
    return torch.tensor([width, height, width, height], dtype=like.dtype, device=like.device)


class _Pyramid(FeaturePyramidNetwork):
    """Torchvision's pyramid; its convolutions start as uniform in the fan in."""

    @staticmethod
    def reset_leaf(module: nn.Module) -> None:
        reset_parameters(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _ProposalNetwork(RegionProposalNetwork):
    """Torchvision's first stage, in which anchors of the padding propose nothing."""

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        in_padding = proposals[..., 0] > FAR_PX / 2
        objectness = objectness.reshape(in_padding.shape).masked_fill(in_padding, -torch.inf)
        return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)


class _ProposalHead(RPNHead):
    """Torchvision's head of the first stage; its convolutions start as normal with .01. Gives single precision."""

    @staticmethod
    def reset_leaf(module: nn.Module) -> None:
        reset_parameters(module)
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class _Predictor(FastRCNNPredictor):
    """Torchvision's last layers of the second stage, in single precision; a box for each class."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()
