"""COCO's twelve numbers from pycocotools, whose habits end here.

It prints, writes -1 for "nothing to score" (None here), fails on a detector that finds nothing (AP 0 here), and takes
an annotation of id 0 for unmatched (ids are numbered anew here).
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.data.pictures import GroundTruth
from core.metrics import COCO_NAMES, Metrics
from core.types import Detections

LARGEST_AREA_PX = 1e10


def coco_metrics(
    detections: Sequence[Detections],
    ground_truth: GroundTruth,
    *,
    class_names: Sequence[str],
    picture_ids: Sequence[int],
) -> Metrics:
    """Score detections on the pictures of the ids, whether or not anything was detected there.

    Raises:
        ValueError: when a picture is not in the ground truth, or a detection is of no scored picture.
    """
    scored = set(picture_ids)
    _check(scored, {found.picture_id for found in detections}, ground_truth)
    truth = [entry for entry in ground_truth.coco["annotations"] if entry["image_id"] in scored]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _index(ground_truth, scored, truth),
            _index(ground_truth, scored, _as_annotations(detections, ground_truth.category_ids)),
            "bbox",
        )
        small, large = (threshold**2 for threshold in ground_truth.size_thresholds_px)
        evaluation.params.areaRng = [[0, LARGEST_AREA_PX], [0, small], [small, large], [large, LARGEST_AREA_PX]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = {name: _scored(value) for name, value in zip(COCO_NAMES, evaluation.stats, strict=True)}
    # (IoU threshold, recall, class) over all areas, with 100 detections a picture; classes in the order of their ids
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    places = {category: place for place, category in enumerate(evaluation.params.catIds)}
    return Metrics(
        **numbers,
        per_class={
            name: {"ap": _mean(precision[:, :, places[category]]), "ap50": _mean(precision[0, :, places[category]])}
            for name, category in zip(class_names, ground_truth.category_ids, strict=True)
        },
        num_pictures=len(scored),
        num_boxes=sum(not entry["iscrowd"] for entry in truth),
    )


def _check(scored: set[int], detected: set[int], ground_truth: GroundTruth) -> None:
    if unknown := scored - {image["id"] for image in ground_truth.coco["images"]}:
        raise ValueError(f"pictures {sorted(unknown)[:5]} are not in the ground truth")
    if unknown := detected - scored:
        raise ValueError(f"detections of pictures {sorted(unknown)[:5]}, which are not scored")


def _index(ground_truth: GroundTruth, scored: set[int], annotations: list[dict[str, Any]]) -> COCO:
    dataset: Any = {
        "images": [image for image in ground_truth.coco["images"] if image["id"] in scored],
        "categories": ground_truth.coco["categories"],
        "annotations": [{**entry, "id": number} for number, entry in enumerate(annotations, start=1)],
    }
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _as_annotations(detections: Sequence[Detections], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for picture in detections:
        boxes = picture.boxes_xyxy_px.double()
        sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
        for (x, y, _, _), (w, h), label, score in zip(
            boxes.tolist(), sides, picture.labels.tolist(), picture.scores.tolist(), strict=True
        ):
            found.append(
                {
                    "image_id": picture.picture_id,
                    "category_id": category_ids[label],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "score": score,
                    "iscrowd": 0,
                }
            )
    return found


def _scored(value: float) -> float | None:
    return None if value < 0 else float(value)


def _mean(precision: np.ndarray) -> float | None:
    scored = precision[precision >= 0]
    return float(scored.mean()) if scored.size else None
