"""The driver's side of a search: what is tried next, what is over, and `search.json`, which says so."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from workbench import durable, suggestions
from workbench.errors import WorkbenchError
from workbench.plan import trial_spec
from workbench.records import StudyRef, StudyResults
from workbench.search import (
    FILE,
    STOPPED,
    Configuration,
    Outcome,
    Tried,
    expanded,
    outcomes,
    own_variants,
    read,
    values_of,
    was_stopped,
    with_values,
    worst_score,
)
from workbench.search_file import SPLIT
from workbench.store import Store
from workbench.study import SEARCH_SEED, Plan, PlannedTrial, Search, Value, Variant
from workbench.trial_files import STOPPED_FILE

_MOST_ATTEMPTS = 2000  # at a configuration that is legal and new


def _nobody(_trial_id: str) -> None:
    """Tell nobody."""


def _always(_configuration: Configuration, _at_work: Iterable[Configuration]) -> bool:
    """Let every configuration begin."""
    return True


class Searching:
    """The configurations of a plan that searches, on record before they are tried.

    Raises:
        WorkbenchError: the method needs a package that is missing.
    """

    def __init__(self, plan: Plan, store: Store, ref: StudyRef) -> None:
        assert plan.study.search is not None  # the caller has looked
        suggestions.check_method(plan.study.search)
        self.search: Search = plan.study.search
        self.store = store
        self.on_end: Callable[[str], None] = _nobody  # told the trial of a configuration that is over
        self.may_begin: Callable[[Configuration, Iterable[Configuration]], bool] = _always  # beside those at work
        self.ending: set[str] = set()  # trials that this driver has stopped early
        self.folder = ref.path
        self.base = plan
        self.variants = {variant.name: variant for variant in own_variants(plan)}
        known = {(item.variant, item.number): item for item in read(ref.path)}
        for trial in plan.trials:
            if trial.variant in self.variants:
                values = values_of(self.variants[trial.variant].config, self.search)
                own = Configuration(variant=trial.variant, number=0, values=values, trial_id=trial.trial_id)
                known.setdefault((trial.variant, 0), own)
        places = {name: place for place, name in enumerate(self.variants)}
        self.configurations = sorted(known.values(), key=lambda item: (item.number, places[item.variant]))

    @property
    def total(self) -> int:
        """Return how many configurations are to be tried in all."""
        return self.search.configurations * len(self.variants)

    def results(self) -> StudyResults:
        """Return all configurations with what is known of them."""
        return self.store.results_for(expanded(self.base, self.configurations))

    def outcomes(self) -> dict[str, Outcome]:
        """Return by variant what has been found so far."""
        return outcomes(self.results())

    def complete(self) -> bool:
        """Tell whether every configuration is over."""
        return sum(outcome.over for outcome in self.outcomes().values()) == self.total

    def tried(self) -> list[Tried]:
        """Return what is known of every configuration, in the order in which they were suggested."""
        found = [item for outcome in self.outcomes().values() for item in outcome.tried]
        places = {item.trial_id: place for place, item in enumerate(self.configurations)}
        return sorted(found, key=lambda item: places[item.trial_id])

    def next(self) -> Configuration | None:
        """Suggest a configuration of the variant that has fewest, and put it on record; None when all are there."""
        counts = {name: sum(item.variant == name for item in self.configurations) for name in self.variants}
        name = min(counts, key=lambda name: counts[name])
        return self._suggest(name, counts[name]) if counts[name] < self.search.configurations else None

    def planned(self, configuration: Configuration) -> PlannedTrial:
        """Return the trial of a configuration as a cell of the plan."""
        trials = expanded(self.base, [configuration]).trials
        return next(trial for trial in trials if trial.trial_id == configuration.trial_id)

    def plan(self) -> Plan:
        """Return the plan with all configurations suggested so far."""
        return expanded(self.base, self.configurations)

    def _suggest(self, name: str, number: int) -> Configuration:
        variant, known = self.variants[name], self._known(name)
        taken = {item.trial_id for item in self.configurations}
        for attempt in range(_MOST_ATTEMPTS):
            values = suggestions.suggest(self.search, number, attempt, known)
            trial_id = self._trial_id(variant, values)
            if trial_id is not None and trial_id not in taken:
                found = Configuration(variant=name, number=number, values=values, trial_id=trial_id)
                self.configurations.append(found)
                self.save()
                return found
        raise WorkbenchError(
            f"{name}: {number} configurations were tried, and no other one of the space is legal: lower "
            "search.configurations, or widen search.space"
        )

    def _trial_id(self, variant: Variant, values: dict[str, Value]) -> str | None:
        """Return the trial that values lead to; None where they break a rule across keys."""
        like = self.base.specs[next(trial.trial_id for trial in self.base.trials if trial.variant == variant.name)]
        try:
            config = with_values(variant.config, values)
        except ValidationError:
            return None
        return trial_spec(config, seed=SEARCH_SEED, pictures=like.data_fingerprint, code=like.code)[0].trial_id

    def _known(self, name: str) -> list[suggestions.Known]:
        """Return what Optuna may learn of: scores, those of stopped trials at their last epoch, and what runs."""
        known: list[suggestions.Known] = []
        for item in self.outcomes()[name].tried:
            if item.state == "failed":
                continue
            score = item.score if item.score is not None else item.last_score if item.stopped else None
            known.append((item.values, worst_score(self.search) if item.state == "diverged" else score))
        return known

    # Records

    def was_stopped(self, trial_id: str) -> bool:
        """Tell whether this search has ended a trial early."""
        return was_stopped(self.store.record(trial_id), self.base.plan_hash)

    def stop(self, trial_id: str, *, epoch: int) -> None:
        """Put on record that a trial is not worth going on with; its worker sees it and ends."""
        record = self.store.record(trial_id)
        if record.state == "running":
            self.ending.add(trial_id)
            durable.write_json(
                self.store.trial_dir(trial_id) / STOPPED_FILE,
                {"attempt": record.attempts, "reason": STOPPED, "plan": self.base.plan_hash, "epoch": epoch},
            )

    def save(self) -> None:
        """Write search.json: the configurations so far, and what became of them."""
        found = self.outcomes()
        durable.write_json(self.folder / FILE, describe(self.results(), found))


def describe(results: StudyResults, found: dict[str, Outcome]) -> dict[str, Any]:
    """Return the content of search.json; scores are fractions."""
    study = results.plan.study
    search = study.search
    assert search is not None  # the caller has looked
    epochs = {variant.name: variant.config.training.epochs for variant in own_variants(results.plan)}
    rows = [
        {
            "variant": item.variant,
            "number": item.number,
            "values": item.values,
            "trial_id": item.trial_id,
            "state": item.state,
            "reason": STOPPED if item.stopped else None,
            "score": item.score,
            "last_score": item.last_score,
            "epochs": item.epochs,
        }
        for item in sorted((item for outcome in found.values() for item in outcome.tried), key=lambda item: item.number)
    ]
    return {
        "study": study.name,
        "profile": study.profile,
        "plan": results.plan.plan_hash,
        "split": SPLIT,
        "seeds": list(study.seeds),
        "search": asdict(search),
        "complete": all(outcome.over == search.configurations for outcome in found.values()),
        "budget": {"configurations": search.configurations, "epochs_each": epochs},
        "spent": {
            name: {"configurations": outcome.over, "epochs": outcome.epochs, "seconds": outcome.seconds}
            for name, outcome in found.items()
        },
        "best": {
            name: {"number": outcome.best.number, "values": outcome.best.values, "score": outcome.best.score}
            for name, outcome in found.items()
            if outcome.best
        },
        "configurations": rows,
    }
