"""What happens while a trial trains, and its JSON form. A leaf: loads without torch.

An event is a fact, not a log line: the record of a trial is the sequence of its events. After a resume some steps
happen again, so a reader keeps the last event of a kind for each step.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from core.metrics import Metrics

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of things; what is written in its place and cannot be one is not believed."""
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStarted:
    """A process begins or resumes a trial. `step` is 0 or the step of the checkpoint that it resumes from."""

    step: Count
    total_steps: Count
    total_epochs: Count
    num_parameters: Count
    threads: Count
    device: str
    process_id: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsTaken:
    """Progress within an epoch, every few seconds. Losses: means since the last such event, weighted as in the sum."""

    step: Count
    epoch: Amount  # passes begun, as a fraction: 1.5 = half of the second epoch
    losses: dict[str, float]
    grad_norm: float  # mean over the steps that were not skipped, before clipping
    learning_rate: float
    pictures_per_s: float
    seconds: Amount  # training time of the trial so far, all attempts, without evaluation
    data_share: float | None = None  # of the time, spent waiting for pictures; None in records of earlier versions
    skipped_steps: Count = 0  # whose fp16 gradient overflowed: the weights stayed, the loss scale was halved


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochFinished:
    """One epoch is trained and scored on the fixed validation subset; `metrics` by parameters: raw, averaged."""

    step: Count
    epoch: Count  # 1 = the first is done
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    pictures_per_s: float
    peak_memory_bytes: Count  # of this attempt so far: see core.memory
    seconds: Amount
    metrics: dict[str, Metrics]
    data_share: float | None = None  # as in StepsTaken
    skipped_steps: Count = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint is durable."""

    step: Count
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPassedOver:
    """A checkpoint that had been written could not be used, so the steps after `step` are taken again."""

    step: Count  # from which training goes on
    path: str
    reason: str  # damaged, missing


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged:
    """A loss or gradient is no longer finite: the trial ends, as an outcome."""

    step: Count
    reason: str


Event = TrainingStarted | StepsTaken | EpochFinished | CheckpointSaved | CheckpointPassedOver | Diverged

_KINDS: dict[str, type[Event]] = {
    "training_started": TrainingStarted,
    "steps_taken": StepsTaken,
    "epoch_finished": EpochFinished,
    "checkpoint_saved": CheckpointSaved,
    "checkpoint_passed_over": CheckpointPassedOver,
    "diverged": Diverged,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}
_READERS: dict[str, TypeAdapter[Event]] = {kind: TypeAdapter(cls) for kind, cls in _KINDS.items()}


def to_json(event: Event) -> dict[str, Any]:
    """Return plain JSON values with the event's `kind`."""
    return {"kind": _NAMES[type(event)], **asdict(event)}


def from_json(plain: dict[str, Any]) -> Event | None:
    """Rebuild an event; None for a kind that this version does not know. Unknown keys are ignored.

    Raises:
        ValueError: a key is missing, or a value is none that an event can have.
    """
    reader = _READERS.get(plain.get("kind", ""))
    return reader and reader.validate_python(plain)
