"""DETR behind the `Detector` seam: the model with its criterion."""

import torch
from torch import Generator, nn

from core.config import ExperimentConfig, FasterRCNN, ModelConfig
from core.evaluation.postprocess import to_detections
from core.faster_rcnn import FasterRCNNDetector, build_faster_rcnn
from core.loss.criterion import SetCriterion, build_criterion
from core.model.build import build_model
from core.model.detr import DETR
from core.types import Batch, Detections, LossTerm, Prediction


class DetrDetector(nn.Module):
    """What training and evaluation see of DETR."""

    def __init__(self, *, model: DETR, criterion: SetCriterion) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def loss(self, batch: Batch, generator: Generator) -> tuple[LossTerm, ...]:
        """Return the loss terms of one batch."""
        return self.criterion(self.model(batch, generator), batch.targets)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Return the last decoder layer's prediction."""
        return self.model(batch)[-1]

    def detect(self, batch: Batch, *, top_k: int) -> tuple[Detections, ...]:
        """Return the detections of each picture, and which true box each belongs to."""
        prediction = self.predict(batch)
        assignments = self.criterion.matcher(prediction, batch.targets)
        return to_detections(prediction, batch.targets, assignments, top_k=top_k)


AnyDetector = DetrDetector | FasterRCNNDetector


def build_detector(config: ExperimentConfig, *, num_classes: int, seed: int) -> AnyDetector:
    """Build a detector on the CPU with weights that depend on `seed` alone."""
    match config.model:
        case ModelConfig() as model:
            return _build_detr(config, model, num_classes=num_classes, seed=seed)
        case FasterRCNN() as model:
            how = config.evaluation.classes_per_query
            return build_faster_rcnn(model, num_classes=num_classes, seed=seed, classes_per_query=how)
        case other:
            raise NotImplementedError(other.kind)


def _build_detr(config: ExperimentConfig, model: ModelConfig, *, num_classes: int, seed: int) -> DetrDetector:
    supervision = model.encoder_supervision
    criterion = build_criterion(config.loss, encoder_tokens=supervision.tokens if supervision else "all")
    return DetrDetector(model=build_model(model, num_classes=num_classes, seed=seed), criterion=criterion)
