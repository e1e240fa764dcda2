"""A toy trainer whose scores depend on the configuration: each variant has a learning rate that suits it best."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "faults"))

from toys import TINY, ToyTrainer

from core.events import EpochFinished
from core.metrics import Metrics

SETS = (*(text for text in TINY if "epochs" not in text), "training.epochs=4")
SEARCH = """\
version: 1
study: rates
question: Which learning rate suits each variant?
baseline: plain
variants:
  plain: {{}}
  sharp: {{set: {{loss.weight_giou: 4.0}}}}
scope: seeds
search:
  space:
    training.lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  configurations: {configurations}
  method: {method}
  scheduler: {scheduler}
"""
BEST = {"plain": 1e-3, "sharp": 4e-3}


@dataclass(kw_only=True)
class RatedTrainer(ToyTrainer):
    """Sixteen steps in four epochs; the score grows with the epochs to that of the learning rate."""

    steps: int = 16

    def train(self, config: Any, *, on_event: Any, **rest: Any) -> Any:
        """Train as the toy does, and score each epoch by the configuration."""

        def tell(event: Any) -> None:
            if isinstance(event, EpochFinished):
                metrics = _metrics(score(config) * event.epoch / 4)
                event = replace(event, metrics={"raw": metrics, "averaged": metrics})
            on_event(event)

        return super().train(config, on_event=tell, **rest)

    def evaluate(self, config: Any, evaluation: Any, **rest: Any) -> Any:
        """Score the end by the configuration."""
        found = super().evaluate(config, evaluation, **rest)
        found.metrics = _metrics(score(config))
        return found


def score(config: Any) -> float:
    """Return the AP of a configuration: .5 at its variant's best learning rate."""
    best = BEST["plain" if config.loss.weight_giou < 3 else "sharp"]
    return max(0.0, 0.5 - abs(math.log(config.training.lr / best)) / 10)


def _metrics(ap: float) -> Metrics:
    names = ("ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    return Metrics(ap=ap, ap50=ap, **dict.fromkeys(names))
