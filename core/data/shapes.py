"""Drawn pictures with known boxes: the default data, which needs no download.

A picture is a function of its index and the side alone, the scene being the same at every side. Train, tune and val
take disjoint ranges of indices, so a split's content depends neither on its own number nor on another's.
`docs/data.md` describes what is drawn.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import Shapes
from core.data.cached import mapped, written_once
from core.data.drawing import CLASS_NAMES, STREAMS, background, clutter, outline, paint
from core.data.fingerprint import SHAPES_VERSION
from core.data.pictures import DataSplits, GroundTruth, Picture
from core.seeding import numpy_stream

FIRST_INDEX = {"train": 0, "tune": 1_000_000_000, "val": 2_000_000_000}
FIRST_ANNOTATION_ID = 1  # of each split; its objects are numbered in order
SIZES = (0.08, 0.6)  # square root of a box's area, as a share of the side
SIZE_THRESHOLDS = (0.125, 0.3)  # small below, large above, as a share of the side
MOST_OBJECTS = 6
MOST_COVERED = 0.4  # of an older object's box, by the boxes of all newer ones together
PLACING_TRIES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture: `image` (side, side, 3) uint8 RGB, `boxes` (N, 4) xyxy in pixels, oldest first, `labels` (N,)."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    num_clutter: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The pictures of a split: `images` (n, side, side, 3), perhaps in a file; object rows sorted by `picture`."""

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    starts: np.ndarray  # (n + 1,) where each picture's objects begin


class ShapesPictures:
    """A `PictureSet` of drawn pictures."""

    def __init__(self, rendered: Rendered, *, first_index: int) -> None:
        self._rendered = rendered
        self.picture_ids = tuple(range(first_index, first_index + len(rendered.images)))

    def __len__(self) -> int:
        return len(self.picture_ids)

    def read(self, index: int) -> Picture:
        """Return one picture."""
        start, stop = self._rendered.starts[index : index + 2]
        objects = slice(start, stop)
        image = self._rendered.images[index]
        return Picture(
            image=image,
            boxes_xyxy_px=self._rendered.boxes[objects],
            labels=self._rendered.labels[objects],
            annotation_ids=np.arange(start, stop) + FIRST_ANNOTATION_ID,
            picture_id=self.picture_ids[index],
            original_size=(image.shape[0], image.shape[1]),
        )


def open_shapes(config: Shapes, *, cache: Path | None) -> DataSplits:
    """Draw the splits, or map them from the cache where they were drawn before."""
    train = _open_split("train", config.side, config.num_train, cache)
    scored = _open_split(config.split, config.side, config.num_val, cache)
    return DataSplits(
        train=ShapesPictures(train, first_index=FIRST_INDEX["train"]),
        scored=ShapesPictures(scored, first_index=FIRST_INDEX[config.split]),
        ground_truth=_ground_truth(scored, FIRST_INDEX[config.split], config.side),
        class_names=CLASS_NAMES,
        report={
            "train.pictures": len(train.images),
            "train.boxes": len(train.boxes),
            f"{config.split}.pictures": len(scored.images),
            f"{config.split}.boxes": len(scored.boxes),
        },
    )


def draw(index: int, side: int) -> Scene:
    """Draw the picture of an index."""
    # Two streams, since how often the painter draws depends on pixels, and so on the side.
    rng, painter = (numpy_stream(STREAMS, name, index) for name in ("scene", "paint"))
    image = background(side, painter)
    num_clutter = clutter(image, painter)
    boxes, labels = np.empty((0, 4)), []
    for _ in range(rng.integers(1, MOST_OBJECTS, endpoint=True)):
        label = int(rng.integers(len(CLASS_NAMES)))
        polygons = outline(
            label,
            rng,  # everything here is relative to the side
            aspect=float(np.exp(rng.uniform(-0.3, 0.3))),
            angle=float(rng.uniform(-0.35, 0.35)),
            size=float(np.exp(rng.uniform(*np.log(SIZES)))),
        )
        box = _free_place(polygons[0].max(axis=0), boxes, rng)
        if box is not None:
            paint(image, tuple((polygon + box[:2]) * side for polygon in polygons), painter)
            boxes, labels = np.vstack([boxes, box]), [*labels, label]
    return Scene(
        image=image,
        boxes=(boxes * side).astype(np.float32),
        labels=np.array(labels, np.int64),
        num_clutter=num_clutter,
    )


def intersections(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the areas (N,) that boxes (N, 4) share with one box (4,)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return np.prod(sides.clip(0), axis=1)


def areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (N,) of boxes (N, 4)."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def covered_shares(boxes: np.ndarray) -> np.ndarray:
    """Return how much of each box (N,) lies under newer ones, two newer ones over the same spot counting twice."""
    covered = np.zeros(len(boxes))
    for newer, box in enumerate(boxes):
        covered[:newer] += intersections(box, boxes[:newer])
    return covered / areas(boxes)


def _free_place(extent: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Find a place for a new box of some width and height, over older boxes only as far as they may be covered."""
    for _ in range(PLACING_TRIES):
        corner = rng.random(2) * (1 - extent)
        box = np.concatenate([corner, corner + extent])
        if (covered_shares(np.vstack([boxes, box])) <= MOST_COVERED).all():
            return box
    return None


def _open_split(split: str, side: int, num_pictures: int, cache: Path | None) -> Rendered:
    if cache is None:
        images = np.empty((num_pictures, side, side, 3), np.uint8)
        return Rendered(images=images, **_render(images, FIRST_INDEX[split]))
    folder = cache / f"shapes-{SHAPES_VERSION}-{split}-{side}px-{num_pictures}"
    written_once(folder, lambda draft: _render_to(draft, split=split, side=side, num_pictures=num_pictures))
    return Rendered(**{name: mapped(folder / f"{name}.npy") for name in ("images", "boxes", "labels", "starts")})


def _render(images: np.ndarray, first_index: int) -> dict[str, Any]:
    """Fill `images` and return what is in them, as the arrays of `Rendered`."""
    boxes, labels, counts = [], [], [0]
    for number, image in enumerate(images):
        scene = draw(first_index + number, image.shape[0])
        image[:] = scene.image
        boxes.append(scene.boxes)
        labels.append(scene.labels)
        counts.append(len(scene.labels))
    return {"boxes": np.concatenate(boxes), "labels": np.concatenate(labels), "starts": np.cumsum(counts)}


def _render_to(folder: Path, *, split: str, side: int, num_pictures: int) -> None:
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (num_pictures, side, side, 3))
    for name, array in _render(images, FIRST_INDEX[split]).items():
        np.save(folder / f"{name}.npy", array)
    images.flush()


def _ground_truth(rendered: Rendered, first_index: int, side: int) -> GroundTruth:
    pictures = np.repeat(np.arange(len(rendered.images)), np.diff(rendered.starts))
    annotations: list[dict[str, Any]] = []
    for number, (picture, label, (x0, y0, x1, y1)) in enumerate(
        zip(pictures.tolist(), rendered.labels.tolist(), rendered.boxes.tolist(), strict=True),
        start=FIRST_ANNOTATION_ID,
    ):
        annotations.append(
            {
                "id": number,
                "image_id": first_index + picture,
                "category_id": label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
        )
    return GroundTruth(
        coco={
            "images": [
                {"id": first_index + number, "width": side, "height": side} for number in range(len(rendered.images))
            ],
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)],
        },
        category_ids=tuple(range(1, len(CLASS_NAMES) + 1)),
        size_thresholds_px=(SIZE_THRESHOLDS[0] * side, SIZE_THRESHOLDS[1] * side),
    )
