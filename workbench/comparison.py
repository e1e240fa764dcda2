"""What differs between the variants of a study, as tidy tables for pages and notebooks. Scores are in points."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from core.metrics import Metrics
from workbench import stats
from workbench.differences import differences as config_keys
from workbench.labels import METRICS, POINTS
from workbench.records import StudyResults
from workbench.study import Parameters, PlannedTrial

CURVE_ALPHA = 0.05  # learning curves carry 95 % bands; only verdicts spend alpha

Axis = Literal["epoch", "training seconds"]

_UNKNOWN = (float("nan"),) * 3


def default_parameters(results: StudyResults) -> Parameters:
    """Return the weights that the study's first claim is about."""
    terms = [term for claim in results.plan.study.claims for term in claim.terms]
    return terms[0].parameters if terms else "averaged"


def margin(results: StudyResults, metric: str) -> float | None:
    """Return the smallest difference that matters in a metric, in points; None where no claim declares one."""
    claims = results.plan.study.claims
    return next((claim.margin * POINTS for claim in claims if all(term.metric == metric for term in claim.terms)), None)


def level(results: StudyResults) -> float:
    """Return the level of the intervals at the look started last, in percent."""
    return 100 * (1 - _alpha(results))


def differences(results: StudyResults, metric: str, parameters: Parameters) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return each variant's paired difference to the baseline with its interval, and the difference of every seed.

    The interval is at the look's alpha, as in the verdicts. Frames: (variant, effect, low, high, n), NaN where fewer
    than two pairs are finished; and (variant, seed, difference). All in points.
    """
    study = results.plan.study
    scores = pd.DataFrame(
        [(trial.variant, trial.seed, getattr(metrics, metric)) for trial, metrics in _final(results, parameters)],
        columns=["variant", "seed", "score"],
    ).pivot(index="seed", columns="variant", values="score")
    rows, dots = [], []
    for variant in study.variants:
        if variant.name != study.baseline:
            pairs = scores.reindex(columns=[variant.name, study.baseline]).dropna().astype(float) * POINTS
            gaps = pairs[variant.name] - pairs[study.baseline]
            dots += [(variant.name, seed, gap) for seed, gap in gaps.items()]
            found = stats.paired_interval(list(gaps), alpha=_alpha(results)) if len(gaps) > 1 else None
            rows.append((variant.name, *((found.estimate, found.low, found.high) if found else _UNKNOWN), len(gaps)))
    return (
        pd.DataFrame(rows, columns=["variant", "effect", "low", "high", "n"]),
        pd.DataFrame(dots, columns=["variant", "seed", "difference"]),
    )


def curves(
    results: StudyResults, *, metric: str, parameters: Parameters, axis: Axis
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the learning curves of a metric: mean with a 95 % t interval for each epoch, and the line of each seed.

    On the time axis an epoch stands at the mean training time of its seeds. Frames: (variant, x, mean, low, high, n)
    and (variant, seed, x, value), in points; low and high NaN below two seeds.
    """
    scored = [
        (trial.variant, trial.seed, epoch.epoch, epoch.seconds, score * POINTS)
        for trial in results.plan.trials
        for epoch in results.records[trial.trial_id].epochs
        if (score := getattr(epoch.metrics.get(parameters), metric, None)) is not None
    ]
    lines = pd.DataFrame(scored, columns=["variant", "seed", "epoch", "seconds", "value"])
    lines["x"] = lines["seconds" if axis == "training seconds" else "epoch"]
    rows = []
    for (variant, _), epoch in lines.groupby(["variant", "epoch"]):
        values = list(epoch["value"])
        found = stats.paired_interval(values, alpha=CURVE_ALPHA) if len(values) > 1 else None
        bounds = (found.low, found.high) if found else _UNKNOWN[:2]
        rows.append((variant, epoch["x"].mean(), epoch["value"].mean(), *bounds, len(values)))
    bands = pd.DataFrame(rows, columns=["variant", "x", "mean", "low", "high", "n"])
    return (
        _in_study_order(bands, results),
        _in_study_order(lines[["variant", "seed", "x", "value"]].sort_values(["seed", "x"]), results),
    )


def final_scores(results: StudyResults, parameters: Parameters) -> pd.DataFrame:
    """Return mean ± standard deviation over seeds of each metric, in points, as text: one row a variant."""
    rows = []
    for variant in results.plan.study.variants:
        own = [metrics for trial, metrics in _final(results, parameters) if trial.variant == variant.name]
        cells = {label: _mean_sd([getattr(metrics, name) for metrics in own]) for name, label in METRICS.items()}
        rows.append({"Variant": variant.name, "n": len(own), **cells})
    return pd.DataFrame(rows)


def per_class(results: StudyResults, parameters: Parameters, metric: Literal["ap", "ap50"]) -> pd.DataFrame:
    """Return each class's score by variant: variant, class, mean, sd, n, in points; the hardest class first."""
    values = pd.DataFrame(
        [
            (trial.variant, name, scores[metric])
            for trial, metrics in _final(results, parameters)
            for name, scores in metrics.per_class.items()
        ],
        columns=["variant", "class", "value"],
    ).dropna()
    values["value"] = values["value"].astype(float) * POINTS
    hardness = values.groupby("class")["value"].mean()
    by_class = values.groupby(["variant", "class"])["value"].agg(mean="mean", sd="std", n="count").reset_index()
    return _in_study_order(by_class.sort_values("class", key=lambda names: names.map(hardness)), results)


def config_differences(results: StudyResults) -> pd.DataFrame:
    """Return the keys in which the variants' configurations differ: one row a key, one column a variant, as text."""
    study = results.plan.study
    baseline = next(variant.config for variant in study.variants if variant.name == study.baseline)
    changed = {variant.name: config_keys(baseline, variant.config) for variant in study.variants}
    asked = {key: ours for keys in changed.values() for key, (ours, _) in keys.items()}
    return pd.DataFrame(
        [
            {"Key": key, **{name: str(keys.get(key, (ours, ours))[1]) for name, keys in changed.items()}}
            for key, ours in asked.items()
        ],
        columns=["Key", *changed],
    )


def _final(results: StudyResults, parameters: Parameters) -> list[tuple[PlannedTrial, Metrics]]:
    """Return the trials that are scored at their end, with those scores."""
    found = []
    for trial in results.plan.trials:
        metrics = results.records[trial.trial_id].metrics.get(trial.evaluations.get(parameters, ""))
        if metrics is not None:
            found.append((trial, metrics))
    return found


def _alpha(results: StudyResults) -> float:
    return results.plan.study.looks[max(results.looks_started, 1) - 1].alpha


def _mean_sd(scores: Sequence[float | None]) -> str:
    values = pd.Series([score * POINTS for score in scores if score is not None], dtype=float)
    if values.empty:
        return "n/a"
    return f"{values.mean():.1f} ± {values.std():.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def _in_study_order(frame: pd.DataFrame, results: StudyResults) -> pd.DataFrame:
    places = {variant.name: place for place, variant in enumerate(results.plan.study.variants)}
    return frame.sort_values("variant", key=lambda names: names.map(places), kind="stable").reset_index(drop=True)
