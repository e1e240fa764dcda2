"""What every source of pictures gives: pictures, sets of them, and the truth that scoring compares with."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture with the boxes to be found in it; crowd boxes are not among them.

    `image` (H, W, 3) uint8, RGB; `boxes_xyxy_px` (N, 4) float32 in pixels of `image`; `labels` (N,) int64 in 0..K-1;
    `annotation_ids` (N,) int64, unique in the split and, where it is scored, those of its `GroundTruth`;
    `original_size` (H, W) before any resizing: the scale in which detections are scored.
    """

    image: np.ndarray
    boxes_xyxy_px: np.ndarray
    labels: np.ndarray
    annotation_ids: np.ndarray
    picture_id: int
    original_size: tuple[int, int]


class PictureSet(Protocol):
    """Pictures by index. Reading has no side effect that a caller could see, so any order gives the same pictures."""

    @property
    def picture_ids(self) -> tuple[int, ...]:
        """The pictures' ids, in the order of the indices."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Picture:
        """Return one picture; its arrays are not to be written to."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundTruth:
    """The true boxes of the scored pictures.

    `coco` holds images, annotations (crowd ones too) and categories as in an annotation file, with the file's own ids,
    except that an annotation whose id is missing, no int64 from 0 on or used before has a free one;
    `category_ids` gives the category id of each label; `size_thresholds_px` is the side (square root of the area, in
    pixels of the original picture) below which a box is small and above which it is large.
    """

    coco: dict[str, Any]
    category_ids: tuple[int, ...]
    size_thresholds_px: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSplits:
    """The pictures to learn from and those that are scored.

    `report` counts pictures and boxes by split (`val.boxes`) and everything left out, clipped or odd
    (`val.degenerate_boxes`), with a few examples beside (`val.degenerate_boxes.examples`). Plain JSON values.
    """

    train: PictureSet
    scored: PictureSet
    ground_truth: GroundTruth
    class_names: tuple[str, ...]
    report: dict[str, int | list[str]]
