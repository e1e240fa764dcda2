"""The composition root of the data: from a configuration to the pictures of a trial."""

from pathlib import Path
from typing import assert_never

import cv2

from core.config import CocoFolder, Data, Shapes
from core.data.coco import open_folder
from core.data.fingerprint import DataProblem
from core.data.pictures import DataSplits, GroundTruth, Picture, PictureSet
from core.data.shapes import open_shapes

__all__ = ["DataProblem", "DataSplits", "GroundTruth", "Picture", "PictureSet", "left_out", "open_data"]


def open_data(config: Data, *, root: Path | None, cache: Path | None) -> DataSplits:
    """Open the training pictures and the scored ones.

    Args:
        config: which pictures; `split` says which are scored.
        root: a folder in COCO format, before `config.root`; drawn shapes need none.
        cache: a folder for what is worth computing once for all trials; None keeps everything in memory.

    Raises:
        DataProblem: when the folder cannot be used or nothing usable is left in it.
    """
    cv2.setNumThreads(1)  # pictures are small; cv2's own threads would only take cores from other trials
    match config:
        case Shapes():
            return open_shapes(config, cache=cache)
        case CocoFolder():
            return open_folder(config, root=root, cache=cache)
        case _:
            assert_never(config)


def left_out(report: dict[str, int | list[str]]) -> list[str]:
    """Return one line for each thing that was left out or changed, with its examples; empty when all was used."""
    lines: list[str] = []
    for key, count in report.items():
        examples = report.get(f"{key}.examples")
        if isinstance(examples, list):
            split, what = key.split(".", 1)
            lines.append(f"{split}: {what.replace('_', ' ')}: {count} ({'; '.join(examples)})")
    return lines
