"""What is known of trials and studies, as plain values: `store` reads them, `verdict` judges, all else shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.events import EpochFinished
from core.metrics import Metrics
from workbench.study import Plan, PlannedTrial

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
    epochs: tuple[EpochFinished, ...]  # last event of each epoch, in order, without single classes
    metrics: dict[str, Metrics]  # eval_id -> final metrics
    result: dict[str, Any] | None  # result.json
    error: dict[str, Any] | None  # error.json
    stopped: dict[str, Any] | None = None  # stopped.json, where a search ended the last attempt early


Word = Literal["supported", "refuted", "equivalent", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the evidence says of one claim. Effects are fractions (AP .02), differences plus - minus.

    `low`, `high`: the two-sided interval at this look's alpha; `inner_low`, `inner_high`: the one-sided pair that
    decides equivalence. `differences` are the dots: seed -> contrast. All numbers are None when fewer than two pairs
    are finished.
    """

    claim: str
    text: str
    kind: str
    verdict: Word
    reason: str  # one sentence a user can act on
    effect: float | None
    low: float | None
    high: float | None
    inner_low: float | None
    inner_high: float | None
    margin: float
    alpha: float
    look_seeds: int
    n_pairs: int
    sd: float | None  # of the paired differences
    correlation: float | None  # between the two sides over seeds; None unless the claim has two terms
    p_value: float | None
    strong: bool  # supported beyond the margin
    seeds_needed: int | None  # for 80 % power at the margin; only when undecided for want of that many
    still_rising: tuple[str, ...]  # variants whose curves had not flattened: "learns faster", not "is better"
    post_hoc: bool
    differences: dict[int, float]
    notes: tuple[str, ...] = ()
    more_seeds: bool = False  # undecided, and a later look of the plan may decide it
    looked_before: tuple[str, ...] = ()  # looks of other sets that earlier plans had taken at this claim


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResults:
    """A plan with what is known of its trials, and the verdicts stored last."""

    plan: Plan
    runs: Path  # the folder that the records are in
    records: dict[str, TrialRecord]  # trial_id -> record
    verdicts: tuple[Verdict, ...]
    looks_started: int
    post_hoc: frozenset[str]  # claims first registered after a trial of theirs had finished
    looked_before: dict[str, tuple[str, ...]]  # claim -> looks of other sets that earlier plans had taken at it
    unreadable: tuple[str, ...]  # why other plans of the study and profile are left out of the two before
    mlflow: dict[str, Any] | None  # {"tracking_uri", "experiment_id", "parent_run_id", "runs": {trial_id: run_id}}

    def asked_for(self) -> tuple[PlannedTrial, ...]:
        """Return the trials of the looks started, or of the first look before that."""
        return self.plan.at_look(self.plan.study.looks[max(1, self.looks_started) - 1])


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRef:
    """A registered plan: `path` is its folder, `registered_at` the time (UTC, ISO 8601) of its first registration."""

    study: str
    profile: str
    plan_hash: str
    registered_at: str
    path: Path
