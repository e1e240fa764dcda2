"""What can be used of an annotation file in COCO format, and what is left out and why.

Real files have flaws, and none of them stops a training unless nothing is left. Each is counted, with examples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from core.data.decoding import picture_sizes
from core.data.fingerprint import SplitFiles

ROUNDING_PX = 1.0  # a box that passes the picture's edge by less is as annotators' tools write it
LARGEST_NUMBER = 1e300  # of a number that is still one: whole ones in JSON may be too large to be counted with
MOST_EXAMPLES = 5


@dataclass(slots=True)
class Tally:
    """Counts what was left out of one split, with a few examples of each kind."""

    split: str
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, what: str, example: str) -> None:
        """Count one more."""
        self.examples[what].append(example)

    def report(self, records: Sequence["Record"]) -> dict[str, int | list[str]]:
        """Return the counts as `DataSplits.report` holds them."""
        report: dict[str, int | list[str]] = {
            f"{self.split}.pictures": len(records),
            f"{self.split}.boxes": sum(len(record.labels) for record in records),
            f"{self.split}.crowd_boxes": sum(record.num_crowd for record in records),
            f"{self.split}.pictures_without_boxes": sum(len(record.labels) == 0 for record in records),
        }
        for what, examples in sorted(self.examples.items()):
            report[f"{self.split}.{what}"] = len(examples)
            report[f"{self.split}.{what}.examples"] = examples[:MOST_EXAMPLES]
        return report


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A usable picture: its entry in the annotation file, and its annotations as they count in scoring."""

    path: Path
    image: dict[str, Any]
    annotations: tuple[dict[str, Any], ...]
    boxes_xyxy_px: np.ndarray
    labels: np.ndarray
    annotation_ids: np.ndarray

    @property
    def num_crowd(self) -> int:
        """How many of the annotations are crowds, which are scored but not learned from."""
        return len(self.annotations) - len(self.labels)


def usable_records(
    raw: dict[str, Any], files: SplitFiles, label_of: Mapping[int, int], tally: Tally, cache: Path | None
) -> list[Record]:
    """Return the usable pictures of a split with their usable boxes, in the file's order."""
    images = _images(raw["images"], tally)
    sizes = picture_sizes(files, [image["file_name"] for image in images.values()], cache=cache)
    annotations = _annotations(raw["annotations"], images, label_of, tally)
    records: list[Record] = []
    for picture_id, image in images.items():
        name = image["file_name"]
        if name not in sizes:
            tally.add("missing_pictures", name)
            continue
        if (size := sizes[name]) is None:
            tally.add("unreadable_pictures", name)
            continue
        height, width = size
        if (image.get("height", height), image.get("width", width)) != size:
            tally.add("pictures_of_another_size_than_annotated", name)
        scored = [_within(entry, image, size, tally) for entry in annotations.get(picture_id, [])]
        usable = tuple(entry for entry in scored if entry is not None)
        learned = [entry for entry in usable if not entry["iscrowd"]]
        boxes = np.array([entry["bbox"] for entry in learned], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        records.append(
            Record(
                path=files.pictures / name,
                image={**image, "height": height, "width": width},
                annotations=usable,
                boxes_xyxy_px=boxes.clip(0, np.array([width, height] * 2, np.float32)),
                labels=np.array([label_of[entry["category_id"]] for entry in learned], np.int64),
                annotation_ids=np.array([entry["id"] for entry in learned], np.int64),
            )
        )
    return records


def _images(entries: list[Any], tally: Tally) -> dict[int, dict[str, Any]]:
    """Return the well-formed image entries by id."""
    images: dict[int, dict[str, Any]] = {}
    for entry in entries:
        match entry:
            case {"id": int(picture_id), "file_name": str(name)} if name and abs(picture_id) < 1 << 63:
                if picture_id in images:
                    tally.add("repeated_picture_ids", f"{picture_id} ({name})")
                else:
                    images[picture_id] = entry
            case _:
                tally.add("malformed_images", _short(entry))
    return images


def _annotations(
    entries: list[Any], images: dict[int, dict[str, Any]], label_of: Mapping[int, int], tally: Tally
) -> dict[int, list[dict[str, Any]]]:
    """Return the well-formed annotations by picture, each with an id of its own.

    A repeated id with another box is another box.
    """
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    seen: set[tuple[str | float, ...]] = set()
    for entry in entries:
        match entry:
            case {"image_id": int(picture_id), "category_id": int(category_id), "bbox": [x, y, w, h]} if all(
                isinstance(value, int | float) for value in (x, y, w, h)
            ):
                identity = (repr(entry.get("id")), picture_id, category_id, x, y, w, h)
                if picture_id not in images:
                    tally.add("boxes_of_unknown_pictures", f"annotation {entry.get('id')}: picture {picture_id}")
                elif category_id not in label_of:
                    tally.add("boxes_of_unknown_categories", f"annotation {entry.get('id')}: category {category_id}")
                elif entry.get("id") is not None and identity in seen:
                    tally.add("repeated_annotations", f"annotation {entry['id']}")
                else:
                    found[picture_id].append({**entry, "iscrowd": int(bool(entry.get("iscrowd", 0)))})
                seen.add(identity)
            case _:
                tally.add("malformed_annotations", _short(entry))
    _number_([entry for of_picture in found.values() for entry in of_picture])
    return found


def _number_(annotations: list[dict[str, Any]]) -> None:
    """Replace ids that are missing, no int64 from 0 on, or used before by numbers that no other annotation has."""
    taken: set[int] = set()
    others: list[dict[str, Any]] = []
    for entry in annotations:
        match entry:
            case {"id": int(number)} if 0 <= number < 1 << 63 and number not in taken:
                taken.add(number)
            case _:
                others.append(entry)
    free = (number for number in count(1) if number not in taken)
    for entry in others:
        entry["id"] = next(free)


def _within(entry: dict[str, Any], image: dict[str, Any], size: tuple[int, int], tally: Tally) -> dict[str, Any] | None:
    """Return what scoring needs of an annotation, its box inside the picture, or None where nothing of it is.

    A box that needs no clipping keeps its numbers to the last digit, so that scores equal those of other COCO tools.
    """
    height, width = size
    x, y, w, h = entry["bbox"]
    if not all(abs(number) < LARGEST_NUMBER for number in (x, y, w, h)) or w <= 0 or h <= 0:
        tally.add("degenerate_boxes", _where(image, entry))
        return None
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        tally.add("boxes_outside_the_picture", _where(image, entry))
        return None
    area = entry.get("area")
    if not isinstance(area, int | float) or not 0 < area < LARGEST_NUMBER:
        area = w * h
    if max(left - x, top - y, x + w - right, y + h - bottom) > ROUNDING_PX:
        tally.add("clipped_boxes", _where(image, entry))
        x, y, w, h = left, top, right - left, bottom - top
        area = min(area, w * h)
    kept = {name: entry[name] for name in ("id", "image_id", "category_id", "iscrowd")}
    return {**kept, "bbox": [x, y, w, h], "area": area}


def _where(image: dict[str, Any], entry: dict[str, Any]) -> str:
    return f"{image['file_name']} {entry['bbox']}"


def _short(entry: Any) -> str:
    text = str(entry)
    return text if len(text) <= 60 else f"{text[:57]}..."
