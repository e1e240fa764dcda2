"""Count what the drawn validation pictures hold, as the Markdown tables of docs/data.md; `--sheet` also paints some.

python benchmarks/shapes_census.py [--pictures 1000] [--side 128] [--sheet docs/images/shapes.png]
"""

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch

from core.config import Shapes
from core.data.drawing import CLASS_NAMES
from core.data.fingerprint import SHAPES_VERSION
from core.data.pictures import DataSplits
from core.data.shapes import FIRST_INDEX, SIZE_THRESHOLDS, SIZES, Scene, areas, covered_shares, draw
from core.data.splits import open_data
from core.evaluation.coco_ap import coco_metrics
from core.seeding import numpy_stream
from core.types import Detections

SIZE_EDGES = (SIZES[0], 0.1, SIZE_THRESHOLDS[0], 0.18, 0.24, SIZE_THRESHOLDS[1], 0.42, SIZES[1])
COVERED_EDGES = (0, 1e-9, 0.1, 0.2, 0.3, 0.4)
SHEET_ROWS, SHEET_COLUMNS, SHEET_SIDE, GAP = 3, 8, 128, 4


def main() -> None:
    """Draw, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    draw(0, options.side)  # the textures are drawn once
    began = time.process_time()
    scenes = [draw(FIRST_INDEX["val"] + number, options.side) for number in range(options.pictures)]
    seconds = time.process_time() - began
    print(f"Generator version {SHAPES_VERSION}, the first {options.pictures} pictures of val, side {options.side} px,")
    print(f"{options.pictures / seconds:.0f} pictures/s on one core.\n")
    print_tables(scenes)
    print_baselines(open_data(Shapes(side=options.side, num_train=1, num_val=options.pictures), root=None, cache=None))
    if options.sheet:
        cv2.imwrite(str(options.sheet), contact_sheet()[..., ::-1])


def print_tables(scenes: Sequence[Scene]) -> None:
    """Print the histograms."""
    labels = np.concatenate([scene.labels for scene in scenes])
    side = scenes[0].image.shape[0]
    sizes = np.concatenate([np.sqrt(areas(scene.boxes)) / side for scene in scenes])
    covered = np.concatenate([covered_shares(scene.boxes) for scene in scenes])
    objects = np.array([len(scene.labels) for scene in scenes])
    strokes = np.array([scene.num_clutter for scene in scenes])
    table("class", CLASS_NAMES, np.bincount(labels, minlength=len(CLASS_NAMES)))
    table("objects a picture", *_counts(objects))
    table("size, share of the side", _ranges(SIZE_EDGES), np.histogram(sizes, SIZE_EDGES)[0])
    table("small / medium / large", ("small", "medium", "large"), np.histogram(sizes, (0, *SIZE_THRESHOLDS, 1))[0])
    names = ("none", *_ranges((0, *COVERED_EDGES[2:])))
    table("share of the box under newer boxes", names, np.histogram(covered, COVERED_EDGES)[0])
    table("lines, arcs and dots a picture", *_counts(strokes))


def print_baselines(data: DataSplits) -> None:
    """Print the AP of the true boxes, with their labels and with random ones."""
    rng = numpy_stream(0, "random labels")
    for name, random in (("true boxes, true labels", False), ("true boxes, random labels and scores", True)):
        detections: list[Detections] = []
        for index in range(len(data.scored)):
            picture = data.scored.read(index)
            count = len(picture.labels)
            labels = rng.integers(len(data.class_names), size=count) if random else picture.labels
            detections.append(
                Detections(
                    picture_id=picture.picture_id,
                    scores=torch.from_numpy(rng.random(count)),
                    labels=torch.from_numpy(labels),
                    boxes_xyxy_px=torch.from_numpy(picture.boxes_xyxy_px),
                    queries=torch.arange(count),
                    gt_ids=torch.arange(count),
                    layer=0,
                )
            )
        metrics = coco_metrics(
            detections, data.ground_truth, class_names=data.class_names, picture_ids=data.scored.picture_ids
        )
        print(f"AP of {name}: {metrics.ap:.3f}")


def table(title: str, names: Sequence[str], counts: np.ndarray) -> None:
    """Print one histogram as a Markdown table of shares."""
    print(f"| {title} | {' | '.join(names)} |")
    print("|---" * (len(names) + 1) + "|")
    print(f"| {counts.sum()} | {' | '.join(f'{share:.1%}' for share in counts / counts.sum())} |\n")


def contact_sheet() -> np.ndarray:
    """Return the first pictures of train in rows and columns, on white."""
    cell = SHEET_SIDE + GAP
    sheet = np.full((SHEET_ROWS * cell - GAP, SHEET_COLUMNS * cell - GAP, 3), 255, np.uint8)
    for number in range(SHEET_ROWS * SHEET_COLUMNS):
        top, left = (cell * place for place in divmod(number, SHEET_COLUMNS))
        sheet[top : top + SHEET_SIDE, left : left + SHEET_SIDE] = draw(FIRST_INDEX["train"] + number, SHEET_SIDE).image
    return sheet


def _counts(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    names, counts = np.unique(values, return_counts=True)
    return [str(name) for name in names], counts


def _ranges(edges: Sequence[float]) -> list[str]:
    return [f"{low:.3g}-{high:.3g}" for low, high in pairwise(edges)]


if __name__ == "__main__":
    main()
