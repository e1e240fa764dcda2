"""The only reader and writer of the runs folder. (types first; functions follow)"""

from dataclasses import dataclass
from typing import Any, Literal

from core.events import EpochFinished
from core.metrics import Metrics
from workbench.study import Plan
from workbench.verdict import Verdict

TrialState = Literal["pending", "running", "finished", "failed", "diverged", "interrupted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """All that is known of a trial."""

    trial_id: str
    state: TrialState
    attempts: int
    seconds: float  # training time so far, without evaluation
    total_seconds: float  # wall time of the worker with evaluations, all attempts
    step: int
    total_steps: int | None
    epochs: tuple[EpochFinished, ...]  # last event of each epoch, in order
    metrics: dict[str, Metrics]  # eval_id -> final metrics
    result: dict[str, Any] | None  # result.json
    error: dict[str, Any] | None  # error.json


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResults:
    """A plan with what is known of its trials, and the verdicts stored last."""

    plan: Plan
    records: dict[str, TrialRecord]  # trial_id -> record
    verdicts: tuple[Verdict, ...]
    looks_started: int
    post_hoc: frozenset[str]  # claims first registered after a trial of theirs had finished
    mlflow: dict[str, Any] | None  # {"tracking_uri", "experiment_id", "parent_run_id", "runs": {trial_id: run_id}}
