"""COCO's twelve numbers, from hotcoco or from pycocotools: the same to the last bit, the former 40 to 70 times faster.

pycocotools is the oracle of the tests and the fallback. Habits of the two end here: -1 for "nothing to score" (None
here), printing, failing on a detector that finds nothing (AP 0 here), an annotation of id 0 taken for unmatched and ids
rounded to floats (pictures, categories and annotations are numbered anew here).
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from core.data.pictures import GroundTruth
from core.metrics import COCO_NAMES, Metrics
from core.types import Detections

LARGEST_AREA_PX = 1e10
ALL, SMALL, MEDIUM, LARGE = range(4)  # places of the area ranges
AP50, AP75 = 0, 5  # places of the IoU thresholds .5, .55, ..., .95
TOP_1, TOP_10, TOP_100 = range(3)  # places of the most detections a picture and category
# Of each number in COCO_NAMES that is a precision: which IoU thresholds, and which area range
PRECISIONS = (
    (slice(None), ALL), (AP50, ALL), (AP75, ALL), (slice(None), SMALL), (slice(None), MEDIUM), (slice(None), LARGE)
)  # fmt: skip
# Of each that is a recall: which area range, and how many detections
RECALLS = ((ALL, TOP_1), (ALL, TOP_10), (ALL, TOP_100), (SMALL, TOP_100), (MEDIUM, TOP_100), (LARGE, TOP_100))


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """True and detected boxes in columns, as scorers compare them.

    Pictures and categories are numbered from 1 in the order of their ids, which decides between equal scores. Boxes are
    (x, y, w, h) in pixels, float64; `area_ranges` are the least and greatest area of all, small, medium and large ones.
    """

    num_pictures: int
    num_categories: int
    area_ranges: list[list[float]]
    true_pictures: np.ndarray  # (G,) int64, as are the other numbers
    true_categories: np.ndarray
    true_boxes: np.ndarray  # (G, 4)
    true_areas: np.ndarray  # (G,) float64: what the file says, not the boxes'
    crowds: np.ndarray  # (G,) 0 or 1
    pictures: np.ndarray  # (D,) of the detections, in their order
    categories: np.ndarray
    boxes: np.ndarray  # (D, 4)
    scores: np.ndarray  # (D,) float64


# Returns precision (IoU threshold, recall, category, area range, most detections) and recall (the same without recall).
Scorer = Callable[[Columns], tuple[np.ndarray, np.ndarray]]


def coco_metrics(
    detections: Sequence[Detections],
    ground_truth: GroundTruth,
    *,
    class_names: Sequence[str],
    picture_ids: Sequence[int],
) -> Metrics:
    """Score detections on the pictures of the ids, whether or not anything was detected there.

    `WORKBENCH_SCORER` (auto, hotcoco or pycocotools) says by what; the numbers are the same.

    Raises:
        ValueError: when a picture is not in the ground truth, a detection is of no scored picture, or
            `WORKBENCH_SCORER` is another word.
        ImportError: when the scorer that `WORKBENCH_SCORER` names cannot be imported.
    """
    scored = set(picture_ids)
    _check(scored, {found.picture_id for found in detections}, ground_truth)
    columns = _columns(detections, ground_truth, scored)
    # hotcoco refuses scores that are not numbers, as a detector with overflowing weights may give
    finite = bool(np.isfinite(columns.scores).all() and np.isfinite(columns.boxes).all())
    scorer = _scorer(os.environ.get("WORKBENCH_SCORER", "auto")) if finite else _by_pycocotools
    precision, recall = scorer(columns)
    numbers = [_mean(precision[threshold, ..., area, TOP_100]) for threshold, area in PRECISIONS]
    numbers += [_mean(recall[..., area, most]) for area, most in RECALLS]
    places = {category: place for place, category in enumerate(sorted(ground_truth.category_ids))}
    of_class = precision[..., ALL, TOP_100]
    return Metrics(
        **dict(zip(COCO_NAMES, numbers, strict=True)),
        per_class={
            name: {"ap": _mean(of_class[:, :, places[category]]), "ap50": _mean(of_class[AP50, :, places[category]])}
            for name, category in zip(class_names, ground_truth.category_ids, strict=True)
        },
        num_pictures=len(scored),
        num_boxes=int((columns.crowds == 0).sum()),
    )


def _check(scored: set[int], detected: set[int], ground_truth: GroundTruth) -> None:
    if unknown := scored - {image["id"] for image in ground_truth.coco["images"]}:
        raise ValueError(f"pictures {sorted(unknown)[:5]} are not in the ground truth")
    if unknown := detected - scored:
        raise ValueError(f"detections of pictures {sorted(unknown)[:5]}, which are not scored")


def _columns(detections: Sequence[Detections], ground_truth: GroundTruth, scored: set[int]) -> Columns:
    picture_numbers = {picture_id: number for number, picture_id in enumerate(sorted(scored), start=1)}
    category_numbers = {key: number for number, key in enumerate(sorted(ground_truth.category_ids), start=1)}
    truth = [entry for entry in ground_truth.coco["annotations"] if entry["image_id"] in scored]
    number_of_label = np.array([category_numbers[key] for key in ground_truth.category_ids], np.int64)
    counts = [len(found.scores) for found in detections]
    boxes = _joined([found.boxes_xyxy_px for found in detections]).reshape(-1, 4)
    small, large = (threshold**2 for threshold in ground_truth.size_thresholds_px)
    return Columns(
        num_pictures=len(scored),
        num_categories=len(category_numbers),
        area_ranges=[[0, LARGEST_AREA_PX], [0, small], [small, large], [large, LARGEST_AREA_PX]],
        true_pictures=np.array([picture_numbers[entry["image_id"]] for entry in truth], np.int64),
        true_categories=np.array([category_numbers[entry["category_id"]] for entry in truth], np.int64),
        true_boxes=np.array([entry["bbox"] for entry in truth], np.float64).reshape(-1, 4),
        true_areas=np.array([entry["area"] for entry in truth], np.float64),
        crowds=np.array([entry["iscrowd"] for entry in truth], np.int64),
        pictures=np.repeat(np.array([picture_numbers[found.picture_id] for found in detections], np.int64), counts),
        categories=number_of_label[_joined([found.labels for found in detections]).astype(np.int64)],
        boxes=np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]),
        scores=_joined([found.scores for found in detections]),
    )


def _joined(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Return tensors one after the other, as float64."""
    return torch.cat([tensor.detach() for tensor in tensors]).cpu().double().numpy() if tensors else np.empty(0)


@cache
def _scorer(name: str) -> Scorer:
    """Return the scorer of a name; `auto` is hotcoco, or pycocotools and a warning where that cannot be imported."""
    match name:
        case "hotcoco":
            import hotcoco  # noqa: F401 - to fail here, where it was asked for

            return _by_hotcoco
        case "pycocotools":
            return _by_pycocotools
        case "auto":
            try:
                return _scorer("hotcoco")
            except ImportError as error:
                told = f"hotcoco cannot be imported ({error}): pycocotools scores, the same but slower"
                warnings.warn(f"{told}; install hotcoco again, or set WORKBENCH_SCORER=pycocotools", stacklevel=3)
                return _by_pycocotools
        case _:
            raise ValueError(f"WORKBENCH_SCORER is {name!r}: one of auto, hotcoco and pycocotools is allowed")


def _by_hotcoco(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCO, COCOeval

    truth = COCO.from_arrays(
        _numbered(columns.num_pictures),
        _numbered(columns.num_categories),
        columns.true_pictures,
        columns.true_categories,
        columns.true_boxes,
        area=columns.true_areas,
        iscrowd=columns.crowds,
    )
    found = truth.load_res(
        np.column_stack([columns.pictures, columns.boxes, columns.scores, columns.categories]).astype(np.float64)
    )
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.params.area_rng = columns.area_ranges
    evaluation.evaluate()
    evaluation.accumulate()
    result = evaluation.eval
    assert result is not None  # after accumulate()
    return result["precision"], result["recall"]


def _by_pycocotools(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict[str, Any]]) -> COCO:
        coco: Any = COCO()
        coco.dataset = {
            "images": _numbered(columns.num_pictures),
            "categories": _numbered(columns.num_categories),
            "annotations": [{**entry, "id": number} for number, entry in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco

    true = (columns.true_pictures, columns.true_categories, columns.true_boxes, columns.true_areas, columns.crowds)
    areas = columns.boxes[:, 2] * columns.boxes[:, 3]
    detected = (columns.pictures, columns.categories, columns.boxes, areas, columns.scores)
    names = ("image_id", "category_id", "bbox", "area")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation: Any = COCOeval(
            indexed([dict(zip((*names, "iscrowd"), row, strict=True)) for row in _rows(true)]),
            indexed([dict(zip((*names, "score"), row, strict=True), iscrowd=0) for row in _rows(detected)]),
            "bbox",
        )
        evaluation.params.areaRng = columns.area_ranges
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _numbered(count: int) -> list[dict[str, Any]]:
    """Return entries with the numbers from 1, as pictures or categories of a COCO file."""
    return [{"id": number, "name": str(number)} for number in range(1, count + 1)]


def _rows(columns: Sequence[np.ndarray]) -> list[tuple[Any, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _mean(values: np.ndarray) -> float | None:
    scored = values[values > -1]
    return float(scored.mean()) if scored.size else None
