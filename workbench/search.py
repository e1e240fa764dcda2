"""A search for settings: the configurations that it tries, what has become of them, and which is the best.

The configurations of a variant are numbered; number 0 is its own settings, so a search can only find better ones. Each
is a trial of its own. What is suggested is written to `search.json` in the study's folder before its trial begins, so
the same command goes on with the same configurations, and what is over is never computed again.

For reading, a search is an ordinary plan whose variants are the configurations tried so far (`expanded`).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from pydantic import ValidationError

from core.config import ExperimentConfig
from core.parts import flatten
from workbench import durable
from workbench.errors import StoreError
from workbench.plan import evaluations_of
from workbench.records import StudyResults, TrialRecord
from workbench.study import SEARCH_SEED, Plan, PlannedTrial, Search, Value, Variant

FILE = "search.json"
MARK = "#"  # between a variant and the number of its configuration; no variant's own name has it
STOPPED = "stopped by the search"
BORDER = 0.05  # of a range: a best value that near to an end may have a better one beyond it


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One row of the search: what is tried of a variant, by which trial."""

    variant: str
    number: int
    values: dict[str, Value]  # by dotted key
    trial_id: str

    @property
    def name(self) -> str:
        """Return what the configuration is called in tables."""
        return f"{self.variant}{MARK}{self.number}" if self.number else self.variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A configuration with what has become of it. Scores are fractions; `score` is None unless it is finished."""

    variant: str
    number: int
    values: dict[str, Value]
    trial_id: str
    state: str
    stopped: bool  # by this search, which lets it be
    score: float | None
    last_score: float | None  # of a training epoch, on its subset of the pictures
    epochs: int

    @property
    def over(self) -> bool:
        """Return whether nothing is left to do."""
        return self.stopped or self.state == "diverged" or (self.state == "finished" and self.score is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a search has found for one variant so far."""

    tried: tuple[Tried, ...]  # by number
    over: int
    finished: int
    stopped: int
    best: Tried | None
    own_score: float | None  # of the variant's own settings
    middle: float | None  # median of the finished ones
    worst: float | None
    epochs: int  # trained in all
    seconds: float
    at_border: tuple[str, ...]  # keys whose best value lies at the border of the space


# ---------------------------------------------------------------------------------------------------- as a plan


def read(folder: Path) -> list[Configuration]:
    """Return the configurations on record in a study's folder.

    Raises:
        StoreError: the record is not one of configurations.
    """
    plain = durable.read_json(folder / FILE) or {"configurations": []}
    try:
        rows = [
            Configuration(**{name: row[name] for name in Configuration.__dataclass_fields__})
            for row in plain["configurations"]
        ]
    except (KeyError, TypeError) as error:
        raise _damaged(folder / FILE) from error
    for row in rows:
        kinds = ((row.variant, str), (row.number, int), (row.values, dict), (row.trial_id, str))
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise _damaged(folder / FILE)
    return rows


def _damaged(what: object) -> StoreError:
    return StoreError(f"{what} is damaged: remove it, and the same command writes it anew")


def own_name(variant: str) -> str:
    """Return the variant of the study file that a configuration is of, by what the configuration is called."""
    return variant.partition(MARK)[0]


def own_variants(plan: Plan) -> tuple[Variant, ...]:
    """Return the variants of the study file, without the configurations tried of them."""
    return tuple(variant for variant in plan.study.variants if variant.name == own_name(variant.name))


def expanded(plan: Plan, configurations: list[Configuration]) -> Plan:
    """Return the plan of a search with a variant and a trial for each configuration, those that it has and these.

    Raises:
        StoreError: a configuration on record is not one of its variant.
    """
    own = {variant.name: variant for variant in own_variants(plan)}
    first = {trial.variant: trial for trial in plan.trials if trial.variant in own}
    variants, trials, specs = list(plan.study.variants), list(plan.trials), dict(plan.specs)
    for item in configurations:
        if item.variant not in own or item.trial_id in specs:
            continue
        variant, like = own[item.variant], plan.specs[first[item.variant].trial_id]
        try:
            config = with_values(variant.config, item.values)
        except (ValidationError, KeyError, TypeError) as error:
            raise _damaged(f"{FILE} of {plan.study.name} ({item.name})") from error
        evaluations, ids = evaluations_of(config)
        why = f"configuration {item.number} of {item.variant}"
        overrides = variant.overrides | item.values
        variants.append(Variant(name=item.name, why=why, overrides=overrides, config=config))
        trials.append(PlannedTrial(variant=item.name, seed=SEARCH_SEED, trial_id=item.trial_id, evaluations=ids))
        config = with_values(like.config, item.values)  # which names its files by absolute paths
        specs[item.trial_id] = replace(like, trial_id=item.trial_id, config=config, evaluations=evaluations)
    study = replace(plan.study, variants=tuple(variants))
    return replace(plan, study=study, trials=tuple(trials), specs=specs)


def with_values(config: ExperimentConfig, values: dict[str, Value]) -> ExperimentConfig:
    """Return a configuration with other values of some keys that it has.

    Raises:
        ValidationError: they break a rule across keys.
    """
    tree: dict[str, Any] = config.model_dump(mode="json")
    for key, value in values.items():
        *around, name = key.split(".")
        node = tree
        for part in around:
            node = node[part]
        node[name] = value
    return ExperimentConfig.model_validate(tree)


def values_of(config: ExperimentConfig, search: Search) -> dict[str, Value]:
    """Return what a configuration has at the keys of the space."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: flat[key] for key in search.space}


# -------------------------------------------------------------------------------------------------- what is known


def outcomes(results: StudyResults) -> dict[str, Outcome]:
    """Return by variant what a search has found so far."""
    search = results.plan.study.search
    assert search is not None  # the caller has looked
    by_name = {variant.name: variant for variant in results.plan.study.variants}
    found: dict[str, list[Tried]] = {variant.name: [] for variant in own_variants(results.plan)}
    seconds = dict.fromkeys(found, 0.0)
    for trial in results.plan.trials:
        name, _, number = trial.variant.partition(MARK)
        record, config = results.records[trial.trial_id], by_name[trial.variant].config
        seconds[name] += record.total_seconds
        found[name].append(
            Tried(
                variant=name,
                number=int(number or 0),
                values=values_of(config, search),
                trial_id=trial.trial_id,
                state=record.state,
                stopped=was_stopped(record, results.plan.plan_hash),
                score=final_score(record, trial, config, search),
                last_score=_last_score(record, config, search),
                epochs=record.epochs[-1].epoch if record.epochs else 0,
            )
        )
    return {name: _outcome(search, tried, seconds[name]) for name, tried in found.items()}


def _outcome(search: Search, tried: list[Tried], seconds: float) -> Outcome:
    tried = sorted(tried, key=lambda item: item.number)
    scored = [(item.score, item) for item in tried if item.score is not None]
    choose = max if search.mode == "max" else min
    scores = [score for score, _ in scored]
    best = choose(scored, key=lambda pair: pair[0])[1] if scored else None
    return Outcome(
        tried=tuple(tried),
        over=sum(item.over for item in tried),
        finished=len(scored),
        stopped=sum(item.stopped for item in tried),
        best=best,
        own_score=tried[0].score if tried else None,
        middle=median(scores) if scores else None,
        worst=(min(scores) if search.mode == "max" else max(scores)) if scores else None,
        epochs=sum(item.epochs for item in tried),
        seconds=seconds,
        at_border=tuple(at_border(search, best)) if best else (),
    )


def was_stopped(record: TrialRecord, plan_hash: str) -> bool:
    """Tell whether this search has ended a trial early; another study may go on with it."""
    return record.state == "interrupted" and record.stopped is not None and record.stopped.get("plan") == plan_hash


def parameters_of(config: ExperimentConfig) -> str:
    """Return the parameters that a configuration is scored with, as events name them."""
    return config.evaluation.parameters if config.training.ema_decay is not None else "raw"


def epoch_scores(record: TrialRecord, config: ExperimentConfig, search: Search) -> dict[int, float]:
    """Return the score of each epoch on the subset of pictures that is scored while training."""
    found: dict[int, float] = {}
    for event in record.epochs:
        metrics = event.metrics.get(parameters_of(config))
        if metrics is not None:
            found[event.epoch] = _number(getattr(metrics, search.metric), search)
    return found


def _last_score(record: TrialRecord, config: ExperimentConfig, search: Search) -> float | None:
    scores = epoch_scores(record, config, search)
    return scores[max(scores)] if scores else None


def final_score(record: TrialRecord, trial: PlannedTrial, config: ExperimentConfig, search: Search) -> float | None:
    """Return the score of a finished configuration; None of another one."""
    metrics = record.metrics.get(trial.evaluations[config.evaluation.parameters])
    if record.state != "finished" or metrics is None:
        return None
    return _number(getattr(metrics, search.metric), search)


def _number(value: float | None, search: Search) -> float:
    """Return a score; where nothing can be scored it is as bad as can be."""
    return worst_score(search) if value is None else value


def worst_score(search: Search) -> float:
    """Return the worst that a score can be: all metrics are fractions."""
    return 0.0 if search.mode == "max" else 1.0


def at_border(search: Search, best: Tried) -> list[str]:
    """Return the keys whose best value lies at an end of what was tried, where a wider space may hold a better one."""
    if best.number == 0:
        return []  # the variant's own settings, which need not lie in the space
    found: list[str] = []
    for key, dimension in search.space.items():
        value = best.values[key]
        if not _is_number(value):
            continue
        if dimension.low is not None and dimension.high is not None:
            scale = math.log if dimension.log else float
            low, high, place = scale(dimension.low), scale(dimension.high), scale(value)
            found += [] if BORDER < (place - low) / (high - low) < 1 - BORDER else [key]
        else:
            numbers = [item for item in dimension.values if _is_number(item)]
            only_numbers = len(numbers) == len(dimension.values) > 2
            found += [key] if only_numbers and value in (min(numbers), max(numbers)) else []
    return found


def _is_number(value: Value) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
