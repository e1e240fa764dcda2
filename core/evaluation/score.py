"""Score a detector on pictures, and keep what it predicted."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import batched_nms

from core.checkpoint import load_checkpoint
from core.config import EvaluationConfig, ExperimentConfig
from core.data.batching import scoring_batches
from core.data.splits import DataSplits
from core.detector import build_detector
from core.evaluation.coco_ap import coco_metrics
from core.metrics import Metrics
from core.types import Detections, Detector

KEPT_PAIRS = 300  # (query, class) pairs a picture that are kept as evidence
NMS_CANDIDATES = 1000  # pairs a picture that NMS chooses from: of a detector that needs it, most are repetitions


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The COCO numbers of all scored pictures, and the columns of predictions.parquet, one row a (query, class) pair.

    Columns: image_id, layer, query, class, score, x0, y0, x1, y1 (pixels of the original picture), gt_id (id of the
    annotation whose box one-to-one matching gives the query, or -1; crowd boxes are not matched). Best score first
    within a picture, before NMS.
    """

    metrics: Metrics
    predictions: dict[str, np.ndarray]
    seconds: float


def _nothing() -> None:
    """What nobody asks to be told."""


def score(
    detector: Detector,
    config: EvaluationConfig,
    *,
    data: DataSplits,
    indices: Sequence[int],
    device: torch.device,
    on_batch: Callable[[], object] = _nothing,
) -> tuple[Metrics, list[Detections]]:
    """Score the pictures `indices` of the scored split; return all that was detected, before NMS, too.

    The detector must be in evaluation mode. `on_batch` is called after each batch.
    """
    found: list[Detections] = []
    for batch in scoring_batches(data.scored, indices, batch_size=config.batch_size):
        found.extend(detector.detect(batch.to(device), top_k=num_candidates(config)))
        on_batch()
    metrics = coco_metrics(
        [chosen(one, config) for one in found],
        data.ground_truth,
        class_names=data.class_names,
        picture_ids=[data.scored.picture_ids[index] for index in indices],
    )
    return with_proposal_recall(metrics, found), found


def num_candidates(config: EvaluationConfig) -> int:
    """Return how many detections of a picture are asked for: what is scored and what is kept are among them."""
    return max(config.top_k, KEPT_PAIRS if config.nms_iou is None else NMS_CANDIDATES)


def chosen(found: Detections, config: EvaluationConfig) -> Detections:
    """Return what is scored of a picture: the `top_k` best, after NMS where `nms_iou` asks for it."""
    kept = found if config.nms_iou is None else without_overlaps(found, iou=config.nms_iou)
    return kept.best(config.top_k)


def with_proposal_recall(metrics: Metrics, found: Iterable[Detections]) -> Metrics:
    """Add `ar50_proposals`: what the pictures' detectors recalled, as a share of all true boxes."""
    recalled = [detections.recalled for detections in found if detections.recalled is not None]
    share = sum(recalled) / metrics.num_boxes if recalled and metrics.num_boxes else None
    return replace(metrics, ar50_proposals=share)


def without_overlaps(detections: Detections, *, iou: float) -> Detections:
    """Remove the detections that overlap a better one of their class by more than `iou` (NMS, class by class)."""
    boxes = detections.boxes_xyxy_px.double()  # torchvision shifts classes apart, which costs digits
    kept = batched_nms(boxes, detections.scores.double(), detections.labels, iou)
    return detections.keep(kept.sort().values)


def evaluate(
    config: ExperimentConfig,
    evaluation: EvaluationConfig,
    *,
    data: DataSplits,
    checkpoint: Path,
    device: torch.device,
    on_batch: Callable[[], object] = _nothing,
) -> Evaluation:
    """Score a checkpoint's raw or averaged weights on the whole scored split, as `evaluation` says."""
    began = time.perf_counter()
    torch.set_num_threads(config.training.threads)
    state = load_checkpoint(checkpoint)
    asked = config.model_copy(update={"evaluation": evaluation})
    detector = build_detector(asked, num_classes=len(data.class_names), seed=0)
    averaged = evaluation.parameters == "averaged" and state["averaged"] is not None
    detector.load_state_dict(state["averaged" if averaged else "raw"])
    detector.to(device).eval()
    indices = range(len(data.scored))
    metrics, found = score(detector, evaluation, data=data, indices=indices, device=device, on_batch=on_batch)
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
