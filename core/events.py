"""What happens while a trial trains, and its JSON form. A leaf: loads without torch.

An event is a fact, not a log line: the record of a trial is the sequence of its events. After a resume some steps
happen again, so a reader keeps the last event of a kind for each step.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from core.metrics import Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStarted:
    """A process begins or resumes a trial. `step` is 0 or the step of the checkpoint that it resumes from."""

    step: int
    total_steps: int
    total_epochs: int
    num_parameters: int
    threads: int
    device: str
    process_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsTaken:
    """Progress within an epoch, every few seconds. Losses: means since the last such event, weighted as in the sum."""

    step: int
    epoch: float  # passes begun, as a fraction: 1.5 = half of the second epoch
    losses: dict[str, float]
    grad_norm: float  # mean over the steps that were not skipped, before clipping
    learning_rate: float
    pictures_per_s: float
    seconds: float  # training time of the trial so far, all attempts, without evaluation
    data_share: float | None = None  # of the time, spent waiting for pictures; None in records of earlier versions
    skipped_steps: int = 0  # whose fp16 gradient overflowed: the weights stayed, the loss scale was halved


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochFinished:
    """One epoch is trained and scored on the fixed validation subset; `metrics` by parameters: raw, averaged."""

    step: int
    epoch: int  # 1 = the first is done
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    pictures_per_s: float
    peak_memory_bytes: int  # of this attempt so far: see core.memory
    seconds: float
    metrics: dict[str, Metrics]
    data_share: float | None = None  # as in StepsTaken
    skipped_steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint is durable."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged:
    """A loss or gradient is no longer finite: the trial ends, as an outcome."""

    step: int
    reason: str


Event = TrainingStarted | StepsTaken | EpochFinished | CheckpointSaved | Diverged

_KINDS: dict[str, type[Event]] = {
    "training_started": TrainingStarted,
    "steps_taken": StepsTaken,
    "epoch_finished": EpochFinished,
    "checkpoint_saved": CheckpointSaved,
    "diverged": Diverged,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}


def to_json(event: Event) -> dict[str, Any]:
    """Return plain JSON values with the event's `kind`."""
    return {"kind": _NAMES[type(event)], **asdict(event)}


def from_json(plain: dict[str, Any]) -> Event | None:
    """Rebuild an event; None for a kind that this version does not know. Unknown keys are ignored."""
    cls = _KINDS.get(plain.get("kind", ""))
    if cls is None:
        return None
    values = {item.name: plain[item.name] for item in fields(cls) if item.name in plain}
    if "metrics" in values:
        values["metrics"] = {name: Metrics.from_json(metrics) for name, metrics in values["metrics"].items()}
    return cls(**values)
