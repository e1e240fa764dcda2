"""The code that a trial trains and scores with: `core`, or anything else of the same form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.config import EvaluationConfig, ExperimentConfig
from core.events import Event

if TYPE_CHECKING:
    from core.data.splits import DataSplits
    from core.evaluation.score import Evaluation
    from core.training import TrainResult


class Trainer(Protocol):
    """What a trial needs of a detector's code."""

    def open_data(self, config: ExperimentConfig, *, root: Path | None, cache: Path) -> DataSplits:
        """Return the pictures; `report` counts what was left out."""
        ...

    def train(
        self,
        config: ExperimentConfig,
        *,
        seed: int,
        data: DataSplits,
        checkpoints: Path,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> TrainResult:
        """Train, resuming from the newest checkpoint."""
        ...

    def evaluate(
        self,
        config: ExperimentConfig,
        evaluation: EvaluationConfig,
        *,
        data: DataSplits,
        checkpoint: Path,
        on_batch: Callable[[], None],
    ) -> Evaluation:
        """Score a checkpoint; `on_batch` is called after each batch."""
        ...


class CoreTrainer:
    """The detector of `core`, on one device. Importing torch waits until a trial begins."""

    def __init__(self, device: str) -> None:
        self.device = device

    def open_data(self, config: ExperimentConfig, *, root: Path | None, cache: Path) -> DataSplits:
        """Open the trial's pictures."""
        from core.data.splits import open_data  # torch takes seconds

        return open_data(config.data, root=root, cache=cache)

    def train(self, config: ExperimentConfig, **rest: Any) -> TrainResult:
        """Train with `core.training`."""
        import torch  # torch takes seconds

        from core.training import train

        return train(config, device=torch.device(self.device), **rest)

    def evaluate(self, config: ExperimentConfig, evaluation: EvaluationConfig, **rest: Any) -> Evaluation:
        """Score with `core.evaluation`."""
        import torch  # torch takes seconds

        from core.evaluation.score import evaluate

        return evaluate(config, evaluation, device=torch.device(self.device), **rest)
