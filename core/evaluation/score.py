"""Score a detector on pictures, and keep what it predicted."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.checkpoint import load_checkpoint
from core.config import EvaluationConfig, ExperimentConfig
from core.data.batching import scoring_batches
from core.data.splits import DataSplits
from core.detector import build_detector
from core.evaluation.coco_ap import coco_metrics
from core.metrics import Metrics
from core.types import Detections, Detector

SCORING_BATCH = 8  # dense attention aside, predictions do not depend on it
KEPT_PAIRS = 300  # (query, class) pairs a picture that are kept as evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The COCO numbers of all scored pictures, and the columns of predictions.parquet, one row a (query, class) pair.

    Columns: image_id, layer, query, class, score, x0, y0, x1, y1 (pixels of the original picture), gt_id (id of the
    annotation whose box one-to-one matching gives the query, or -1; crowd boxes are not matched). Best score first
    within a picture.
    """

    metrics: Metrics
    predictions: dict[str, np.ndarray]
    seconds: float


def score(
    detector: Detector, *, top_k: int, data: DataSplits, indices: Sequence[int], device: torch.device
) -> tuple[Metrics, list[Detections]]:
    """Score the pictures `indices` of the scored split by their `top_k` best detections; return all that are kept, too.

    The detector must be in evaluation mode.
    """
    found: list[Detections] = []
    for batch in scoring_batches(data.scored, indices, batch_size=SCORING_BATCH):
        found.extend(detector.detect(batch.to(device), top_k=max(top_k, KEPT_PAIRS)))
    metrics = coco_metrics(
        [detections.best(top_k) for detections in found],
        data.ground_truth,
        class_names=data.class_names,
        picture_ids=[data.scored.picture_ids[index] for index in indices],
    )
    return metrics, found


def evaluate(
    config: ExperimentConfig, evaluation: EvaluationConfig, *, data: DataSplits, checkpoint: Path, device: torch.device
) -> Evaluation:
    """Score a checkpoint's raw or averaged weights on the whole scored split."""
    began = time.perf_counter()
    torch.set_num_threads(config.training.threads)
    state = load_checkpoint(checkpoint)
    detector = build_detector(config, num_classes=len(data.class_names), seed=0)
    averaged = evaluation.parameters == "averaged" and state["averaged"] is not None
    detector.load_state_dict(state["averaged" if averaged else "raw"])
    detector.to(device).eval()
    indices = range(len(data.scored))
    metrics, found = score(detector, top_k=evaluation.top_k, data=data, indices=indices, device=device)
    return Evaluation(metrics=metrics, predictions=_columns(found), seconds=time.perf_counter() - began)


def _columns(found: list[Detections]) -> dict[str, np.ndarray]:
    def joined(name: str, dtype: type) -> np.ndarray:
        return torch.cat([getattr(detections, name)[:KEPT_PAIRS] for detections in found]).cpu().numpy().astype(dtype)

    counts = [min(len(detections.scores), KEPT_PAIRS) for detections in found]
    boxes = joined("boxes_xyxy_px", np.float32)
    return {
        "image_id": np.repeat(np.array([detections.picture_id for detections in found], np.int64), counts),
        "layer": np.repeat(np.array([detections.layer for detections in found], np.int16), counts),
        "query": joined("queries", np.int32),
        "class": joined("labels", np.int32),
        "score": joined("scores", np.float32),
        **{name: boxes[:, column] for column, name in enumerate(("x0", "y0", "x1", "y1"))},
        "gt_id": joined("gt_ids", np.int64),
    }
