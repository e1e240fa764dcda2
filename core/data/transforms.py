"""Geometry of pictures: resizing, the symmetries, cropping; boxes always move with the pixels. Pure functions.

`augment` draws from the generator it is given and from nothing else.
"""

from dataclasses import replace
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from core.config import FixedSize, ShorterSide
from core.data.pictures import Picture

# DETR's multi-scale training (arXiv:2005.12872, section 4), for a shorter side of 800.
PUBLISHED_SIDE = 800
SCALES = tuple(range(480, 801, 32))
SCALES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)

Resampling = Literal["area", "pillow"]


def target_size(height: int, width: int, rule: FixedSize | ShorterSide) -> tuple[int, int]:
    """Return the height and width that the rule gives a picture of some height and width.

    A shorter side becomes `rule.size`, or less where the longer one would pass `rule.longest`; see `resize_shorter`.
    """
    if isinstance(rule, FixedSize):
        return rule.height, rule.width
    return _shorter(height, width, rule.size, rule.longest)


def resize_image(image: np.ndarray, rule: FixedSize | ShorterSide) -> np.ndarray:
    """Resize pixels (H, W, 3) uint8 as the rule says."""
    height, width = target_size(image.shape[0], image.shape[1], rule)
    return _resampled(image, height, width, "area" if isinstance(rule, FixedSize) else rule.resampling)


def rescaled(boxes_px: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Return the boxes (N, 4) of a picture after its (height, width) went from `old` to `new`."""
    if old == new:
        return boxes_px
    return boxes_px * np.array([new[1] / old[1], new[0] / old[0]] * 2, np.float32)


def resize_to(picture: Picture, *, height: int, width: int, resampling: Resampling = "area") -> Picture:
    """Resize to a height and width.

    `area`: by area when both shrink, which avoids aliasing, else bilinearly. `pillow`: Pillow's bilinear filter, whose
    support grows with the factor of shrinking; torchvision's resizing of Pillow images, and so the official code's.
    """
    image = _resampled(picture.image, height, width, resampling)
    old = picture.image.shape[0], picture.image.shape[1]
    return replace(picture, image=image, boxes_xyxy_px=rescaled(picture.boxes_xyxy_px, old, (height, width)))


def resize_shorter(
    picture: Picture, side: int, *, longest: int | None = None, resampling: Resampling = "area"
) -> Picture:
    """Resize so that the shorter side is `side`, or less where the longer one would pass `longest`.

    The other side is rounded down, a shorter side that gives way is rounded to the nearest: DETR's official rule.
    """
    height, width = _shorter(picture.image.shape[0], picture.image.shape[1], side, longest)
    return resize_to(picture, height=height, width=width, resampling=resampling)


def _shorter(height: int, width: int, side: int, longest: int | None) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    if longest is not None and side * long > longest * short:
        side = max(1, round(longest * short / long))
    other = max(1, side * long // short)
    return (side, other) if height <= width else (other, side)


def _resampled(image: np.ndarray, height: int, width: int, resampling: Resampling) -> np.ndarray:
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    image = np.ascontiguousarray(image)
    if resampling == "pillow":
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    shrinks = height <= old_height and width <= old_width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def mirror(picture: Picture) -> Picture:
    """Exchange left and right."""
    width = picture.image.shape[1]
    boxes = picture.boxes_xyxy_px[:, [2, 1, 0, 3]]
    boxes[:, [0, 2]] = width - boxes[:, [0, 2]]
    return replace(picture, image=picture.image[:, ::-1], boxes_xyxy_px=boxes)


def turn_over(picture: Picture) -> Picture:
    """Exchange top and bottom."""
    height = picture.image.shape[0]
    boxes = picture.boxes_xyxy_px[:, [0, 3, 2, 1]]
    boxes[:, [1, 3]] = height - boxes[:, [1, 3]]
    return replace(picture, image=picture.image[::-1], boxes_xyxy_px=boxes)


def transpose(picture: Picture) -> Picture:
    """Exchange rows and columns."""
    return replace(
        picture, image=picture.image.transpose(1, 0, 2), boxes_xyxy_px=picture.boxes_xyxy_px[:, [1, 0, 3, 2]]
    )


def symmetry(picture: Picture, number: int) -> Picture:
    """Apply one of the eight symmetries of the square: bit 0 mirrors, bit 1 turns upside down, bit 2 transposes."""
    if number & 1:
        picture = mirror(picture)
    if number & 2:
        picture = turn_over(picture)
    if number & 4:
        picture = transpose(picture)
    return picture


def crop(picture: Picture, *, left: int, top: int, width: int, height: int) -> Picture:
    """Cut out a rectangle; boxes are clipped to it and those with nothing inside are dropped."""
    image = picture.image[top : top + height, left : left + width]
    boxes = picture.boxes_xyxy_px - np.array([left, top] * 2, np.float32)
    boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return replace(
        picture,
        image=image,
        boxes_xyxy_px=boxes[kept],
        labels=picture.labels[kept],
        annotation_ids=picture.annotation_ids[kept],
    )


def augment(
    picture: Picture,
    kind: Literal["none", "flip", "dihedral", "detr"],
    *,
    resize_rule: FixedSize | ShorterSide | None,
    rng: np.random.Generator,
) -> Picture:
    """Change a picture at random; `resize_rule` gives the scale of `detr` and is not applied otherwise."""
    match kind:
        case "none":
            return picture
        case "flip":
            return mirror(picture) if rng.random() < 0.5 else picture
        case "dihedral":
            height, width = picture.image.shape[:2]
            return symmetry(picture, int(rng.integers(8 if height == width else 4)))
        case "detr":
            assert isinstance(resize_rule, ShorterSide)  # CocoFolder's own rule
            return _detr(picture, resize_rule, rng)


def _detr(picture: Picture, rule: ShorterSide, rng: np.random.Generator) -> Picture:
    """Flip; then resize to a random scale, half of the time after a random crop of a resized picture.

    The published sizes are in proportion to a shorter side of 800, so other sizes scale them.
    """
    if rng.random() < 0.5:
        picture = mirror(picture)
    if rng.random() < 0.5:
        before_crop = _scaled(int(rng.choice(SCALES_BEFORE_CROP)), rule)
        picture = resize_shorter(picture, before_crop, resampling=rule.resampling)
        least, most = (_scaled(side, rule) for side in CROP_SIDES)
        height, width = (
            int(rng.integers(min(least, side), min(most, side), endpoint=True)) for side in picture.image.shape[:2]
        )
        top, left = (
            int(rng.integers(old - new, endpoint=True))
            for old, new in zip(picture.image.shape[:2], (height, width), strict=True)
        )
        picture = crop(picture, left=left, top=top, width=width, height=height)
    side = _scaled(int(rng.choice(SCALES)), rule)
    return resize_shorter(picture, side, longest=rule.longest, resampling=rule.resampling)


def _scaled(side: int, rule: ShorterSide) -> int:
    return max(1, round(side * rule.size / PUBLISHED_SIDE))
