"""Score a detector on pictures, and keep what it predicted."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.checkpoint import load_checkpoint
from core.config import EvaluationConfig, ExperimentConfig
from core.data.batching import scoring_batches
from core.data.splits import DataSplits
from core.detector import DetrDetector, build_detector
from core.evaluation.coco_ap import coco_metrics
from core.evaluation.postprocess import to_detections
from core.loss.matcher import HungarianMatcher
from core.metrics import Metrics
from core.types import Batch, Detections, Prediction

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
    detector: DetrDetector, *, top_k: int, data: DataSplits, indices: Sequence[int], device: torch.device
) -> Metrics:
    """Return the COCO numbers on the pictures `indices` of the scored split."""
    detections: list[Detections] = []
    for batch, prediction in _predictions(detector, data, indices, device):
        detections.extend(to_detections(prediction, batch.targets, top_k=top_k))
    return _metrics(detections, data, indices)


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
    detector.to(device)
    indices = range(len(data.scored))
    matcher = config.loss.matcher
    match = HungarianMatcher(cost_class=matcher.cost_class, cost_l1=matcher.cost_l1, cost_giou=matcher.cost_giou)
    detections: list[Detections] = []
    rows: list[dict[str, np.ndarray]] = []
    for batch, prediction in _predictions(detector, data, indices, device):
        detections.extend(to_detections(prediction, batch.targets, top_k=evaluation.top_k))
        rows.extend(_rows(batch, prediction, match))
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
    return Evaluation(
        metrics=_metrics(detections, data, indices), predictions=columns, seconds=time.perf_counter() - began
    )


def _predictions(
    detector: DetrDetector, data: DataSplits, indices: Sequence[int], device: torch.device
) -> Iterator[tuple[Batch, Prediction]]:
    detector.eval()
    for batch in scoring_batches(data.scored, indices, batch_size=SCORING_BATCH):
        moved = batch.to(device)
        yield moved, detector.predict(moved)


def _metrics(detections: list[Detections], data: DataSplits, indices: Sequence[int]) -> Metrics:
    picture_ids = [data.scored.picture_ids[index] for index in indices]
    return coco_metrics(detections, data.ground_truth, class_names=data.class_names, picture_ids=picture_ids)


def _rows(batch: Batch, prediction: Prediction, match: HungarianMatcher) -> list[dict[str, np.ndarray]]:
    kept = to_detections(prediction, batch.targets, top_k=KEPT_PAIRS)
    owners = np.full(prediction.boxes.shape[:2], -1, dtype=np.int64)  # (B, Q)
    assignments = match(prediction, batch.targets)
    for own, target, assignment in zip(owners, batch.targets, assignments, strict=True):
        own[assignment.queries.cpu()] = target.annotation_ids[assignment.targets].cpu()
    rows = []
    for picture, found in enumerate(kept):
        queries = found.queries.cpu().numpy()
        boxes = found.boxes_xyxy_px.cpu().numpy().astype(np.float32)
        rows.append(
            {
                "image_id": np.full(len(queries), found.picture_id, dtype=np.int64),
                "layer": np.full(len(queries), prediction.layer, dtype=np.int16),
                "query": queries.astype(np.int32),
                "class": found.labels.cpu().numpy().astype(np.int32),
                "score": found.scores.cpu().numpy().astype(np.float32),
                **{name: boxes[:, column] for column, name in enumerate(("x0", "y0", "x1", "y1"))},
                "gt_id": owners[picture, queries],
            }
        )
    return rows
