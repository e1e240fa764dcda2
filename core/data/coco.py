"""A folder in COCO format: its splits, and its pictures by index."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from core.config import CocoFolder, FixedSize, ShorterSide
from core.data.annotations import Record, Tally, usable_records
from core.data.fingerprint import (
    DataProblem,
    category_names,
    data_root,
    read_annotations,
    shared_categories,
    split_files,
    used_splits,
)
from core.data.pictures import DataSplits, GroundTruth, Picture
from core.data.resized import ResizedPictures, read_image, resized_once
from core.data.transforms import rescaled
from core.seeding import key

SIZE_THRESHOLDS_PX = (32.0, 96.0)  # COCO's small, medium and large
KEPT_BYTES = 512 << 20  # of decoded pictures in memory, for each split


class CocoPictures:
    """A `PictureSet` of files, resized by a rule unless the augmentation does that.

    Where there is a cache and they fit in it, all trials share their pixels there. Else each trial decodes them, and
    they stay in its memory until `KEPT_BYTES` are used.
    """

    def __init__(
        self, records: Sequence[Record], *, rule: FixedSize | ShorterSide | None, cache: Path | None = None
    ) -> None:
        self._records = records
        self._rule = rule
        self._shared: ResizedPictures | None = None
        if rule is not None and cache is not None:
            self._shared = resized_once(records, rule, cache=cache)
        self._kept: dict[int, Picture] = {}
        self._bytes_left = KEPT_BYTES
        self.picture_ids = tuple(int(record.image["id"]) for record in records)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Picture:
        """Return one picture.

        Raises:
            DataProblem: when the file has changed since the folder was opened, and cannot be read any more.
        """
        if (kept := self._kept.get(index)) is not None:
            return kept
        record = self._records[index]
        image = read_image(record, self._rule) if self._shared is None else self._shared[index]
        size = record.image["height"], record.image["width"]
        picture = Picture(
            image=image,
            boxes_xyxy_px=rescaled(record.boxes_xyxy_px, size, (image.shape[0], image.shape[1])),
            labels=record.labels,
            annotation_ids=record.annotation_ids,
            picture_id=self.picture_ids[index],
            original_size=size,
        )
        if self._shared is None and image.nbytes <= self._bytes_left:
            self._bytes_left -= image.nbytes
            self._kept[index] = picture
        return picture


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredFolder:
    """The scored pictures of a folder alone, not augmented; the fields are those of `DataSplits`."""

    scored: CocoPictures
    ground_truth: GroundTruth
    class_names: tuple[str, ...]
    report: dict[str, int | list[str]]


def open_scored(
    folder: Path, split: Literal["val", "tune"], *, rule: FixedSize | ShorterSide, num_pictures: int | None
) -> ScoredFolder:
    """Open the scored split alone, without the training pictures, or the first `num_pictures` entries of it.

    Raises:
        DataProblem: when a file is missing or no COCO, or nothing usable is left.
    """
    files = split_files(data_root(CocoFolder(), folder), "train" if split == "tune" else "val")
    raw = read_annotations(files.annotations)
    if split == "tune":
        raw = _with_images(raw, [entry for entry in raw["images"] if _is_held_out(entry)])
    if num_pictures is not None:
        raw = _with_images(raw, raw["images"][:num_pictures])
    categories = shared_categories(folder, [category_names(raw)])
    tally = Tally(split)
    labels = {category_id: label for label, category_id in enumerate(categories)}
    records = usable_records(raw, files, labels, tally, None)
    report = tally.report(records)
    if not any(len(record.labels) for record in records):
        raise DataProblem(_nothing_left(folder, split, report))
    return ScoredFolder(
        scored=CocoPictures(records, rule=rule),
        ground_truth=_ground_truth(records, categories),
        class_names=_distinct(categories),
        report=report,
    )


def _with_images(raw: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    """Keep these pictures and their boxes."""
    ids = {entry["id"] for entry in images if isinstance(entry, dict) and isinstance(entry.get("id"), int)}
    boxes = [entry for entry in raw["annotations"] if isinstance(entry, dict) and entry.get("image_id") in ids]
    return {**raw, "images": images, "annotations": boxes}


def open_folder(config: CocoFolder, *, root: Path | None, cache: Path | None) -> DataSplits:
    """Open a folder in COCO format.

    Raises:
        DataProblem: when a file is missing or no COCO, or nothing usable is left.
    """
    folder = data_root(config, root)
    files = {split: split_files(folder, split) for split in used_splits(config)}
    raw = {split: read_annotations(files[split].annotations) for split in files}
    categories = shared_categories(folder, [category_names(raw[split]) for split in raw])
    labels = {category_id: label for label, category_id in enumerate(categories)}
    tallies = {split: Tally(split) for split in files}
    records = {split: usable_records(raw[split], files[split], labels, tallies[split], cache) for split in files}
    if config.split == "tune":
        tallies["tune"] = Tally("tune")
        records["tune"] = [record for record in records["train"] if _is_held_out(record.image)]
        records["train"] = [record for record in records["train"] if not _is_held_out(record.image)]
    records["train"] = _subset(records["train"], config.num_train)
    for split, usable in records.items():
        if not any(len(record.labels) for record in usable):
            raise DataProblem(_nothing_left(folder, split, tallies[split].report(usable)))
    report: dict[str, int | list[str]] = {}
    for split, tally in tallies.items():
        report |= tally.report(records[split])
    train = [replace(record, annotations=()) for record in records["train"]]  # COCO's would fill memory in every trial
    return DataSplits(
        train=CocoPictures(train, rule=None if config.augmentation == "detr" else config.resize, cache=cache),
        scored=CocoPictures(records[config.split], rule=config.resize, cache=cache),
        ground_truth=_ground_truth(records[config.split], categories),
        class_names=_distinct(categories),
        report=report,
    )


def _subset(records: list[Record], count: int | None) -> list[Record]:
    """Choose by hashed file name, so that a larger subset holds every smaller one."""
    if count is None or count >= len(records):
        return records
    hashed = sorted(records, key=lambda record: key(0, "subset", record.image["file_name"]))
    chosen = {record.image["id"] for record in hashed[:count]}
    return [record for record in records if record.image["id"] in chosen]


def _is_held_out(image: Any) -> bool:
    """Tell whether a picture of train belongs to tune, by its entry in the annotation file."""
    return isinstance(image, dict) and key(0, "tune", str(image.get("file_name"))) % 10 == 0


def _ground_truth(records: Sequence[Record], categories: dict[int, str]) -> GroundTruth:
    return GroundTruth(
        coco={
            "images": [record.image for record in records],
            "annotations": [entry for record in records for entry in record.annotations],
            "categories": [{"id": category_id, "name": name} for category_id, name in categories.items()],
        },
        category_ids=tuple(categories),
        size_thresholds_px=SIZE_THRESHOLDS_PX,
    )


def _distinct(categories: dict[int, str]) -> tuple[str, ...]:
    """Return the class names; two categories of one name are told apart by their ids."""
    names = list(categories.values())
    return tuple(
        name if names.count(name) == 1 else f"{name} ({category_id})" for category_id, name in categories.items()
    )


def _nothing_left(folder: Path, split: str, report: dict[str, int | list[str]]) -> str:
    reasons = [
        f"{count} {name.split('.')[1].replace('_', ' ')}" for name, count in report.items() if isinstance(count, int)
    ]
    return f"{folder}: no usable box is left in {split} ({', '.join(reasons)}); check the folder given by --data"
