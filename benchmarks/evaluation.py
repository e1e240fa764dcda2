"""Scoring: pycocotools as its demo uses it against ours, from the same detections, each in processes of its own.

    python benchmarks/evaluation.py [--sets val2017 laptop] [--rounds 3]

Drawn sets: COCO val2017's size (5,000 pictures, some 36,000 boxes of 80 categories, about 1 % of them crowds, 100
detections a picture) and the laptop profile's (1,000 pictures, 6 categories). `load` is from detections to what the
scorer compares; seconds are CPU time of the process. The numbers compared are the twelve and the AP and AP50 of every
category. Peak memory is beyond what the process held before. Each round runs each way once, in turn.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import Times, ratio, spread, table

from core.data.pictures import GroundTruth
from core.evaluation import coco_ap
from core.evaluation.coco_ap import coco_metrics
from core.memory import peak_memory_bytes, reset_peak_memory
from core.metrics import COCO_NAMES
from core.seeding import numpy_stream
from core.types import Detections

WAYS = ("pycocotools", "ours")
PHASES = ("load", "evaluate and accumulate", "total")


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSize:
    """A drawn set: pictures, mean true boxes and detections a picture, categories, side in pixels."""

    pictures: int
    boxes: float
    detections: int
    categories: int
    side: int


SETS = {
    "val2017": SetSize(pictures=5000, boxes=7.27, detections=100, categories=80, side=640),
    "laptop": SetSize(pictures=1000, boxes=3.3, detections=100, categories=6, side=128),
}
CROWD_SHARE = 0.012
NEAR_SHARE = 0.25  # of the detections: a true box, moved; the others lie anywhere


def drawn(size: SetSize) -> tuple[GroundTruth, list[Detections]]:
    """Draw true boxes and detections."""
    rng = numpy_stream(0, "scoring")
    annotations: list[dict[str, Any]] = []
    detections: list[Detections] = []
    for picture in range(1, size.pictures + 1):
        true, labels = boxes(rng, int(rng.poisson(size.boxes)), size)
        for (x, y, w, h), label in zip(true.tolist(), labels.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": picture, "category_id": label + 1, "bbox": [x, y, w, h],
                 "area": w * h, "iscrowd": int(rng.random() < CROWD_SHARE)}
            )  # fmt: skip
        found, found_labels = boxes(rng, size.detections, size)
        scores = rng.random(size.detections) * 0.5
        if len(true):
            near = rng.random(size.detections) < NEAR_SHARE
            owners = rng.integers(len(true), size=near.sum())
            found[near] = true[owners] + rng.normal(0, 0.06, (near.sum(), 4)) * np.tile(true[owners, 2:], 2)
            found_labels[near] = labels[owners]
            scores[near] = rng.random(near.sum())
        order = np.argsort(-scores)
        xyxy = np.hstack([found[:, :2], found[:, :2] + found[:, 2:].clip(0)])[order]
        detections.append(
            Detections(
                picture_id=picture,
                scores=torch.from_numpy(scores[order]).float(),
                labels=torch.from_numpy(found_labels[order]),
                boxes_xyxy_px=torch.from_numpy(xyxy).float(),
                queries=torch.arange(size.detections),
                gt_ids=torch.full((size.detections,), -1),
                layer=0,
            )
        )
    coco = {
        "images": [{"id": number, "height": size.side, "width": size.side} for number in range(1, size.pictures + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, size.categories + 1)],
    }
    ids = tuple(range(1, size.categories + 1))
    return GroundTruth(coco=coco, category_ids=ids, size_thresholds_px=(size.side / 20, size.side / 6.7)), detections


def boxes(rng: np.random.Generator, count: int, size: SetSize) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes (x, y, w, h) and their labels."""
    sides = np.exp(rng.uniform(np.log(0.02), np.log(0.5), (count, 2))) * size.side
    return np.hstack([rng.uniform(0, size.side, (count, 2)), sides]), rng.integers(size.categories, size=count)


def by_hand(truth: GroundTruth, detections: Sequence[Detections]) -> tuple[list[float], list[float]]:
    """Score with pycocotools as its demo does, from a list of results; return the numbers and the phases' seconds."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth.coco
        coco.createIndex()
        results: list[Any] = []
        for found in detections:
            rows = zip(found.boxes_xyxy_px.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
            for (x0, y0, x1, y1), score, label in rows:
                box = [x0, y0, x1 - x0, y1 - y0]
                results.append({"image_id": found.picture_id, "category_id": label + 1, "bbox": box, "score": score})
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        small, large = (side**2 for side in truth.size_thresholds_px)
        evaluation.params.areaRng = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
        loaded = time.process_time()
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ended = time.process_time()
    precision = evaluation.eval["precision"][..., 0, -1]
    of_classes = [precision[threshold, :, place] for place in range(precision.shape[2]) for threshold in (slice(10), 0)]
    numbers = [*evaluation.stats.tolist(), *(float(values[values > -1].mean()) for values in of_classes)]
    return numbers, [loaded - began, ended - loaded, ended - began]


def ours(truth: GroundTruth, detections: Sequence[Detections]) -> tuple[list[float], list[float]]:
    """Score as trials do; `load` is measured once more by itself, as scoring is one call."""
    picture_ids = [image["id"] for image in truth.coco["images"]]
    names = [entry["name"] for entry in truth.coco["categories"]]
    began = time.process_time()
    metrics = coco_metrics(detections, truth, class_names=names, picture_ids=picture_ids)
    total = time.process_time() - began
    began = time.process_time()
    coco_ap._columns(detections, truth, set(picture_ids))
    load = time.process_time() - began
    of_classes = [value for entry in metrics.per_class.values() for value in (entry["ap"], entry["ap50"])]
    numbers = [*(getattr(metrics, name) for name in COCO_NAMES), *of_classes]
    return [-1.0 if value is None else value for value in numbers], [load, total - load, total]


def main() -> None:
    """Print the table, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.way, options.sets[0])))
        return
    rows: list[list[str]] = []
    for name in options.sets:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way].append(in_a_process(way, name))
        rows += rows_of(name, found)
    print(table(["set", "scorer", *(f"{phase}, CPU s" for phase in PHASES), "times", "peak MiB", "difference"], rows))


def measured(way: str, name: str) -> dict[str, Any]:
    """Score one set one way."""
    torch.set_num_threads(1)
    truth, detections = drawn(SETS[name])
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    numbers, seconds = (by_hand if way == "pycocotools" else ours)(truth, detections)
    return {"numbers": numbers, "seconds": seconds, "bytes": peak_memory_bytes(cpu) - before}


def in_a_process(way: str, name: str) -> dict[str, Any]:
    """Run `measured` in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--sets", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def rows_of(name: str, found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return the rows of one set."""
    totals = {
        way: Times(tuple(one["seconds"][-1] for one in rounds), tuple(one["seconds"][-1] for one in rounds))
        for way, rounds in found.items()
    }
    reference = np.array(found["pycocotools"][0]["numbers"])
    rows: list[list[str]] = []
    for way, rounds in found.items():
        phases = [spread([one["seconds"][place] for one in rounds], unit=1, digits=2) for place in range(len(PHASES))]
        difference = max(float(np.abs(np.array(one["numbers"]) - reference).max()) for one in rounds)
        peak = max(one["bytes"] for one in rounds) >> 20
        rows.append([name, way, *phases, ratio(totals["pycocotools"], totals[way]), str(peak), f"{difference:g}"])
    return rows


if __name__ == "__main__":
    main()
