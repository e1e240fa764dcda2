"""What the records say of a claim at a look: one contrast for each seed, and every reason not to trust it yet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import correlation, fmean, stdev
from typing import TYPE_CHECKING, Any

from core.metrics import Metrics
from workbench.provenance import COMPARED
from workbench.study import Claim, Look, Parameters, PlannedTrial, Term

if TYPE_CHECKING:  # store imports verdict, which imports this
    from workbench.records import StudyResults, TrialRecord

OF_A_GPU_PAIR = ("device", "gpu", "world_size", "precision")
"""What the trials of a pair share on GPUs, where not even the same seed gives the same numbers twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The trials of one claim, and of the baseline, at one look.

    `terms`: seed -> (T,) weighted metric of each term, for the seeds where all of them are scored; a difference is
    their sum. The other fields name trials and variants as a reader knows them ("kept seed 3").
    """

    planned: int  # trials
    finished: int
    failed: tuple[str, ...]
    diverged: tuple[str, ...]
    unscored: tuple[str, ...]
    terms: dict[int, tuple[float, ...]]
    baseline_ap: float | None  # mean over its finished trials
    still_rising: tuple[str, ...]
    mixed: tuple[str, ...]  # provenance facts in which the trials differ
    changed_within: tuple[str, ...]  # trials whose attempts differ in it, as when code is edited before a resume
    unlike_pairs: tuple[str, ...]  # seeds whose trials differ in GPU, number of processes or precision

    @property
    def complete(self) -> bool:
        """Whether every trial has come to an outcome; a failure is none, since it can be run again."""
        return self.finished + len(self.diverged) == self.planned

    @property
    def differences(self) -> dict[int, float]:
        """Return the contrast of each seed."""
        return {seed: math.fsum(values) for seed, values in self.terms.items()}

    @property
    def correlation(self) -> float | None:
        """Return the correlation of the two sides over seeds; None unless the claim has two terms and both vary."""
        sides = list(zip(*self.terms.values(), strict=True))
        if len(sides) != 2 or len(self.terms) < 3 or any(len(set(side)) == 1 for side in sides):
            return None
        plus, minus = sides
        return correlation(plus, [-value for value in minus])


def gather(results: StudyResults, claim: Claim, look: Look) -> Evidence:
    """Collect the evidence for a claim from the trials that a look needs."""
    baseline = results.plan.study.baseline
    trials = [
        trial
        for trial in results.plan.at_look(look)
        if trial.variant == baseline or trial.variant in {term.variant for term in claim.terms}
    ]
    records = {(trial.variant, trial.seed): results.records[trial.trial_id] for trial in trials}
    finished = [trial for trial in trials if records[trial.variant, trial.seed].state == "finished"]

    def named(state: str) -> tuple[str, ...]:
        return tuple(_name(trial) for trial in trials if records[trial.variant, trial.seed].state == state)

    terms, unscored = _contrasts(claim, finished, records)
    return Evidence(
        planned=len(trials),
        finished=len(finished),
        failed=named("failed"),
        diverged=named("diverged"),
        unscored=unscored,
        terms=terms,
        baseline_ap=_baseline_ap([trial for trial in finished if trial.variant == baseline], records),
        still_rising=_still_rising(claim, finished, records),
        mixed=_mixed_provenance(records[trial.variant, trial.seed] for trial in finished),
        changed_within=_changed_within(finished, records),
        unlike_pairs=_unlike_pairs(finished, records),
    )


Records = dict[tuple[str, int], "TrialRecord"]  # by variant and seed


def _name(trial: PlannedTrial) -> str:
    return f"{trial.variant} seed {trial.seed}"


def _contrasts(
    claim: Claim, finished: list[PlannedTrial], records: Records
) -> tuple[dict[int, tuple[float, ...]], tuple[str, ...]]:
    """Return the weighted terms of each seed that has them all, and the finished trials without a score."""
    cells = {(trial.variant, trial.seed): trial for trial in finished}
    terms: dict[int, tuple[float, ...]] = {}
    unscored: dict[str, None] = {}  # an ordered set
    for seed in sorted({trial.seed for trial in finished}):
        trials = [cells.get((term.variant, seed)) for term in claim.terms]
        values: list[float] = []
        for term, trial in zip(claim.terms, trials, strict=True):
            value = trial and _score(records[term.variant, seed].metrics.get(trial.evaluations[term.parameters]), term)
            if value is not None:
                values.append(term.weight * value)
            elif trial is not None:
                unscored[_name(trial)] = None
        if len(values) == len(claim.terms):
            terms[seed] = tuple(values)
    return terms, tuple(unscored)


def _score(metrics: Metrics | None, term: Term) -> float | None:
    return None if metrics is None else getattr(metrics, term.metric)


def _baseline_ap(trials: list[PlannedTrial], records: Records) -> float | None:
    """Return the mean AP of the baseline's finished trials, with averaged parameters where they were scored."""
    aps: list[float] = []
    for trial in trials:
        parameters: Parameters = "averaged" if "averaged" in trial.evaluations else "raw"
        metrics = records[trial.variant, trial.seed].metrics.get(trial.evaluations[parameters])
        if metrics is not None and metrics.ap is not None:
            aps.append(metrics.ap)
    return fmean(aps) if aps else None


def _still_rising(claim: Claim, finished: list[PlannedTrial], records: Records) -> tuple[str, ...]:
    """Return the claim's variants whose curves had not flattened.

    A curve still rises when the last tenth of its epochs (one at least) gained, in the mean over seeds, more than half
    the margin and more than its standard error: a fifth more training could then move it by a difference that matters,
    and noise alone seldom looks like that. The scores are those of the fixed subset after each epoch.
    """
    rising: list[str] = []
    for variant, of_variant in groupby(sorted(finished, key=lambda trial: trial.variant), lambda trial: trial.variant):
        term = next((term for term in claim.terms if term.variant == variant), None)
        if term is None:
            continue
        trials = list(of_variant)
        gains = [gain for t in trials if (gain := _last_gain(records[t.variant, t.seed], term)) is not None]
        if len(gains) >= 2 and fmean(gains) > max(claim.margin / 2, stdev(gains) / math.sqrt(len(gains))):
            rising.append(variant)
    return tuple(rising)


def _last_gain(record: TrialRecord, term: Term) -> float | None:
    if len(record.epochs) < 2:
        return None
    tenth = max(1, len(record.epochs) // 10)
    before, last = (
        _score(epoch.metrics.get(term.parameters), term) for epoch in (record.epochs[-1 - tenth], record.epochs[-1])
    )
    return None if before is None or last is None else last - before


def _mixed_provenance(records: Iterable[TrialRecord]) -> tuple[str, ...]:
    """Return the provenance facts that are not the same in all records; what is not known agrees with anything."""
    provenances = [_provenance(record) for record in records]
    found = {fact: {str(p[fact]) for p in provenances if p.get(fact) is not None} for fact in COMPARED}
    return tuple(fact for fact, values in found.items() if len(values) > 1)


def _changed_within(trials: list[PlannedTrial], records: Records) -> tuple[str, ...]:
    """Name the trials that went on as something else than they began as, and in which facts."""
    mixed = {_name(trial): _provenance(records[trial.variant, trial.seed]).get("mixed", {}) for trial in trials}
    return tuple(f"{name} ({', '.join(facts)})" for name, facts in mixed.items() if facts)


def _unlike_pairs(trials: list[PlannedTrial], records: Records) -> tuple[str, ...]:
    """Name the seeds whose trials were not computed alike on GPUs, and in which facts."""
    unlike: list[str] = []
    for seed, of_seed in groupby(sorted(trials, key=lambda trial: trial.seed), lambda trial: trial.seed):
        pair = [records[trial.variant, trial.seed] for trial in of_seed]
        on_gpu = any(str(_provenance(record).get("device")).startswith("cuda") for record in pair)
        facts = [fact for fact in _mixed_provenance(pair) if fact in OF_A_GPU_PAIR] if on_gpu else []
        unlike += [f"seed {seed} ({', '.join(facts)})"] if facts else []
    return tuple(unlike)


def _provenance(record: TrialRecord) -> dict[str, Any]:
    return (record.result or {}).get("provenance", {})
