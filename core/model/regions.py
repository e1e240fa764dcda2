"""What Faster R-CNN looks at, scaled to the picture: anchors, and the level that a region is pooled from.

Torchvision's own parts think in pixels of a picture of 800: anchors of 32 to 512, regions of 224 on the middle level,
strides guessed from the first batch. These give the same there, and the like at any other size.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

RATIOS = (0.5, 1.0, 2.0)  # height / width
FAR_PX = 1e6
MIDDLE = 7  # a region of 7 finest anchors (224 of 32) is pooled two levels above the finest (arXiv:1612.03144, eq. 1)


class ScaledAnchors(nn.Module):
    """A square and two rectangles of its area around each cell.

    Their side on level l is `scale` * 2**l of the shorter side of the unpadded picture, so it depends neither on the
    padding nor on the other pictures of the batch. .04 of a picture of 800 gives the published 32. Anchors centred in
    the padding are put `FAR_PX` away, where they are background and no proposals: torchvision's would be clipped to
    slivers of the picture and crowd out others.
    """

    def __init__(self, *, scale: float, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = scale
        self.strides = strides

    def num_anchors_per_location(self) -> list[int]:
        """Return the number of anchors around a cell of each level."""
        return [len(RATIOS)] * len(self.strides)

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each picture, (sum H_l * W_l * 3, 4) xyxy in pixels, in the order of torchvision's."""
        return [torch.cat(self._levels(size, features)) for size in images.image_sizes]

    def _levels(self, size: tuple[int, int], features: list[Tensor]) -> list[Tensor]:
        anchors: list[Tensor] = []
        (picture_height, picture_width), shorter_side = size, min(size)
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            side = self.scale * 2**level * shorter_side
            height = side * torch.tensor(RATIOS, device=feature.device).sqrt()
            width = side**2 / height
            around = torch.stack([-width, -height, width, height], dim=1) / 2  # (3, 4)
            rows, columns = (stride * torch.arange(count, device=feature.device) for count in feature.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            outside = (x >= picture_width) | (y >= picture_height)
            centres = torch.stack([x, y, x, y], dim=-1) + FAR_PX * outside[..., None]  # (H, W, 4)
            anchors.append((centres[..., None, :] + around).flatten(0, 2))
        return anchors


class LevelPool(nn.Module):
    """Pool each region from the level that fits its size in the picture (Feature Pyramid Networks, eq. 1)."""

    def __init__(self, *, scale: float, strides: tuple[int, ...], cells: int) -> None:
        super().__init__()
        self.scale = scale
        self.strides = strides
        self.cells = cells

    def forward(self, features: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Pool `regions`, B x (R_b, 4) xyxy in pixels of pictures of `sizes` (H, W), to (sum R_b, C, cells, cells)."""
        maps = list(features.values())[: len(self.strides)]
        pictures = torch.cat([boxes.new_full((len(boxes), 1), index) for index, boxes in enumerate(regions)])
        boxes = torch.cat([pictures, torch.cat(regions)], dim=1)
        levels = torch.cat([self._level(own, min(size)) for own, size in zip(regions, sizes, strict=True)])
        pooled = maps[0].new_zeros((len(boxes), maps[0].shape[1], self.cells, self.cells), dtype=torch.float32)
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            rows = torch.where(levels == level)[0]
            pooled[rows] = roi_align(
                feature.float(), boxes[rows], self.cells, spatial_scale=1 / stride, sampling_ratio=2
            )
        return pooled

    def _level(self, boxes: Tensor, shorter_side: int) -> Tensor:
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        middle = MIDDLE * self.scale * shorter_side
        return (2 + (sides / middle).log2() + 1e-6).floor().clamp(0, len(self.strides) - 1)
