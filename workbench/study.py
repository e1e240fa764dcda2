"""What a study means once its file is read: variants, claims, looks, and the trials that they need.

Plain values, resolved and validated: `study_file` makes a `Study`, `plan` makes a `Plan`, `store` keeps it.
Metric values are fractions everywhere (AP .02, not 2).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.config import EvaluationConfig, ExperimentConfig

Parameters = Literal["averaged", "raw"]

FEWEST_SEEDS = 5  # of a verdict: below, one collapsed seed decides, and intervals are wider than any useful margin


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A named set of overrides of the study's base: as asked for, by dotted key, and the resulting config."""

    name: str
    why: str
    overrides: dict[str, Any]
    config: ExperimentConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One addend of a claim's contrast: `weight` times the `metric` of `variant`, scored with `parameters`."""

    variant: str
    metric: str
    weight: float
    parameters: Parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A statement declared before the runs: the sum of its terms lies in a region set by `kind` and `margin`.

    superiority: above 0; equivalence: within (-margin, margin). `margin` is the smallest difference that matters.
    `missing` names variants of the terms that this selection does not run: the verdict is then undecided and says so.
    """

    id: str
    text: str
    kind: Literal["superiority", "equivalence"]
    terms: tuple[Term, ...]
    margin: float
    family: str | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A planned number of seeds at which verdicts may be given, and the share of alpha spent there."""

    seeds: int
    alpha: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How trials are run, which changes no number: `execution` of a study file or profile."""

    retries: int = 2  # of one trial by one command, for failures that trying again can mend
    stall_seconds: float = 900.0  # without a step or a scored picture, after which a trial is ended and tried again
    gpus: float = 1.0  # a trial, on a node; below 1 several trials share a GPU, above it the trial is spread over them
    nodes: int = 1  # a trial
    gpu_hours: float | None = None  # hard limit of the study at its profile, all attempts counted
    quota_bytes: int | None = None  # of checkpoints and predictions in the runs folder


Value = bool | int | float | str | None
"""A plain value of a configuration, as a search tries it."""

SEARCH_SEED = 10_000
"""The seed of every configuration of a search: beyond those of any comparison, and one for all, so that they differ in
nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """What a search tries of one key: a range with both ends included, or `values`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False  # whole numbers only
    values: tuple[Value, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How the settings of each variant are chosen: `search` of a study file. Scores are those of the tune split."""

    space: dict[str, Dimension]  # by dotted key
    method: Literal["random", "optuna"]
    scheduler: Literal["fifo", "asha"]
    configurations: int  # tried for each variant, the first of them its own settings
    metric: str
    mode: Literal["max", "min"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """Where the tuned settings of a study come from: `tuned` of a study file."""

    path: str
    sha256: str  # of the file
    study: str  # the search, its profile and its plan
    profile: str
    plan_hash: str
    configurations: int  # tried for each variant


SELECTION_OPTIONS = ("--profile", "--data", "--variants", "--seeds", "--set", "--budget", "--tracking-uri")
"""The options that choose from a study. Lines to copy are made of them, also those of a stranger's record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One question at one scale. `seeds` are those of the last look; each look takes the first `look.seeds` of them."""

    name: str
    question: str
    path: Path
    selection: tuple[str, ...]  # the command line's options, name and value in turn, as `Selection.words` gives them
    profile: str
    gives_verdicts: bool  # False for smoke: it tests plumbing only
    baseline: str
    variants: tuple[Variant, ...]  # those selected, baseline first
    claims: tuple[Claim, ...]
    looks: tuple[Look, ...]
    seeds: tuple[int, ...]
    scope: Literal["seeds"]
    budget_seconds: float | None
    tracking_uri: str | None
    layers: dict[
        str, dict[str, tuple[Any, str]]
    ]  # variant -> dotted key -> (value, where it was set); for `plan --explain`
    execution: Execution = Execution()
    search: Search | None = None  # a study that searches for settings and claims nothing
    tuned: Tuned | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """What one trial computes, whatever study asks for it: the content of spec.json."""

    trial_id: str
    config: ExperimentConfig
    seed: int
    data_root: str  # absolute, or "" for drawn data; operational
    data_fingerprint: str
    evaluations: dict[str, EvaluationConfig]  # eval_id -> how to score
    code: dict[str, str] = field(default_factory=dict[str, str])  # module -> text, of custom parts


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTrial:
    """A cell of the study's table: this variant with this seed is that trial, scored in those evaluations."""

    variant: str
    seed: int
    trial_id: str
    evaluations: dict[Parameters, str]  # parameters -> eval_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that was decided before the first trial: the content of plan.json. Trials are ordered seed by seed."""

    study: Study
    plan_hash: str
    trials: tuple[PlannedTrial, ...]
    specs: dict[str, TrialSpec]  # trial_id -> spec
    warnings: tuple[str, ...]

    def at_look(self, look: Look) -> tuple[PlannedTrial, ...]:
        """Return the trials that a look needs."""
        seeds = set(self.study.seeds[: look.seeds])
        return tuple(trial for trial in self.trials if trial.seed in seeds)
