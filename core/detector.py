"""DETR behind the `Detector` seam: the model with its criterion."""

from dataclasses import replace
from typing import Any, Literal, assert_never

import torch
from torch import Generator, nn

from core.config import Custom, ExperimentConfig, FasterRCNN, ModelConfig
from core.custom import build_custom
from core.evaluation.postprocess import detecting, recalled, to_detections
from core.faster_rcnn import FasterRCNNDetector, build_faster_rcnn
from core.loss.criterion import SetCriterion, build_criterion
from core.model.build import build_model
from core.model.detr import DETR
from core.seeding import seeded
from core.types import Batch, Detections, LossTerm, Prediction


class DetrDetector(nn.Module):
    """What training and evaluation see of DETR.

    `num_selected`: queries that are selected from the encoder's proposals, None where they are not. `decoder_steps`:
    decoder layers to run when detecting, None for as many as in training.
    """

    def __init__(
        self,
        *,
        model: DETR,
        criterion: SetCriterion,
        classes_per_query: Literal["all", "one"],
        num_selected: int | None,
        decoder_steps: int | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.classes_per_query: Literal["all", "one"] = classes_per_query
        self.num_selected = num_selected
        self.decoder_steps = decoder_steps

    def loss(self, batch: Batch, generator: Generator) -> tuple[LossTerm, ...]:
        """Return the loss terms of one batch."""
        return self.criterion(self.model(batch, generator), batch.targets, batch.counts)

    def predict(self, batch: Batch) -> Prediction:
        """Return the prediction that detects."""
        return detecting(self._predictions(batch))

    @torch.inference_mode()
    def detect(self, batch: Batch, *, top_k: int) -> tuple[Detections, ...]:
        """Return the detections of each picture, and which true box each belongs to by one-to-one matching.

        Their tensors are torch's inference tensors: to be read, not to be changed in place or differentiated.
        """
        predictions = self._predictions(batch)
        prediction = detecting(predictions)
        assignments = self.criterion.matcher(prediction, batch.targets)
        found = to_detections(
            prediction, batch.targets, assignments, top_k=top_k, classes_per_query=self.classes_per_query
        )
        if self.num_selected is None:
            return found
        proposals = max((row for row in predictions if row.source == "encoder"), key=lambda row: row.layer)
        counts = recalled(proposals, batch.targets, count=self.num_selected)
        return tuple(replace(one, recalled=count) for one, count in zip(found, counts, strict=True))

    @torch.no_grad()
    def _predictions(self, batch: Batch) -> tuple[Prediction, ...]:
        asked: dict[str, Any] = {} if self.decoder_steps is None else {"decoder_steps": self.decoder_steps}
        return self.model(batch, **asked)


AnyDetector = DetrDetector | FasterRCNNDetector


def build_detector(config: ExperimentConfig, *, num_classes: int, seed: int) -> AnyDetector:
    """Build a detector on the CPU with weights that depend on `seed` alone; it detects as `config.evaluation` says."""
    match config.model:
        case ModelConfig() as model:
            return _build_detr(config, model, num_classes=num_classes, seed=seed)
        case FasterRCNN() as model:
            how = config.evaluation.classes_per_query
            return build_faster_rcnn(model, num_classes=num_classes, seed=seed, classes_per_query=how)
        case Custom() as part:
            with seeded(seed, "construction"):
                return build_custom(part, num_classes=num_classes, seed=seed)
        case other:
            assert_never(other)


def _build_detr(config: ExperimentConfig, model: ModelConfig, *, num_classes: int, seed: int) -> DetrDetector:
    criterion = build_criterion(config.loss, encoder_supervision=model.encoder_supervision)
    return DetrDetector(
        model=build_model(
            model,
            num_classes=num_classes,
            seed=seed,
            activation=criterion.classification.activation,
            encoder_activation=criterion.encoder_classification.activation,
            activation_checkpointing=config.training.activation_checkpointing,
        ),
        criterion=criterion,
        classes_per_query=config.evaluation.classes_per_query,
        num_selected=model.queries.num_queries if model.queries.kind == "selected" else None,
        decoder_steps=config.evaluation.decoder_steps,
    )
