"""Predictions of one shape and one kind, such as all layers of the decoder: matched and scored together as rows."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.types import Prediction


@dataclass(frozen=True, slots=True)
class Rows:
    """R predictions that differ in their numbers and their layer alone.

    `prediction` is the first with the logits (R, B, Q, K) and boxes (R, B, Q, 4) of all, fp32; `layers` (R,) and
    `places` (R,) are the layer of each and its place among all predictions.
    """

    prediction: Prediction
    layers: tuple[int, ...]
    places: tuple[int, ...]


def in_rows(predictions: Sequence[Prediction]) -> list[Rows]:
    """Put together what can be matched and scored together, by the first of each kind."""
    kinds: dict[Hashable, list[int]] = {}
    for place, prediction in enumerate(predictions):
        kinds.setdefault(_kind(prediction), []).append(place)
    return [_rows([predictions[place] for place in places], tuple(places)) for places in kinds.values()]


def _kind(prediction: Prediction) -> Hashable:
    return (
        prediction.logits.shape,
        prediction.source,
        prediction.group,
        prediction.activation,
        prediction.class_agnostic,
        prediction.matching,
        prediction.repeats,
        id(prediction.assignments),  # the layers of a query set share these two
        id(prediction.valid),
    )


def _rows(alike: list[Prediction], places: tuple[int, ...]) -> Rows:
    return Rows(
        prediction=replace(
            alike[0],
            logits=_stacked([prediction.logits for prediction in alike]),
            boxes=_stacked([prediction.boxes for prediction in alike]),
        ),
        layers=tuple(prediction.layer for prediction in alike),
        places=places,
    )


def _stacked(tensors: list[Tensor]) -> Tensor:
    return (torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]).float()
