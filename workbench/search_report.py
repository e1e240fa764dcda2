"""What a report says of a search: the best settings of each variant, how sure, at what cost. Scores in points."""

from collections.abc import Iterable
from typing import Any

from workbench.labels import METRICS, POINTS
from workbench.records import StudyResults
from workbench.report_contents import Contents, Table
from workbench.search import Outcome, Tried, outcomes
from workbench.search_file import SPLIT
from workbench.study import SEARCH_SEED, Search

MOST_ROWS = 60  # more would bury the rest of the report; search.json has all


def contents(results: StudyResults, *, cost: Iterable[str]) -> Contents:
    """Gather what the report of a search says; `cost` are lines on cost, data and machines."""
    study = results.plan.study
    search = study.search
    assert search is not None  # the caller has looked
    found = outcomes(results)
    return Contents(
        title=f"{study.name} · {study.profile} · search",
        question=" ".join(study.question.split()),
        claims=_best(search, found, results),
        lines=(),
        scores=(_all(search, found),),
        facts=(*warnings(search, found), *cost),
        results=results,
        verdicts=(),
    )


def warnings(search: Search, found: dict[str, Outcome]) -> Iterable[str]:
    """Yield what makes the result less than it seems."""
    for name, outcome in found.items():
        if outcome.over < search.configurations:
            yield f"Not complete: {outcome.over} of {search.configurations} configurations of {name} are over."
        for key in outcome.at_border:
            yield f"At the border: the best {key} of {name} lies at the end of the space: widen it and search again."
        if outcome.best is not None and outcome.best.number == 0:
            yield f"Nothing better found for {name} than its own settings."
    yield (
        f"The best of {search.configurations} scores, by one seed each, is biased upward: the comparison that follows "
        "runs with other seeds and pictures."
    )


def _best(search: Search, found: dict[str, Outcome], results: StudyResults) -> Table:
    label = METRICS.get(search.metric, search.metric)
    rows = tuple(
        (
            name,
            _settings(outcome.best),
            _points(outcome.best.score if outcome.best else None),
            _points(outcome.own_score),
            f"{_points(outcome.middle)} / {_points(outcome.worst)}",
            f"{outcome.over} ({outcome.stopped})",
            str(outcome.epochs),
        )
        for name, outcome in found.items()
    )
    method = {"optuna": "Optuna's TPE", "random": "chance"}[search.method]
    scheduler = {"fifo": "all trained to the end", "asha": "Ray Tune's ASHA ended the worse ones early"}
    epochs = {variant.config.training.epochs for variant in results.plan.study.variants}
    caption = (
        f"{label} in points on the {SPLIT} split, seed {SEARCH_SEED} for all; {search.configurations} configurations "
        f"of up to {' or '.join(map(str, sorted(epochs)))} epochs for each variant, suggested by {method}, the first "
        f"its own settings; {scheduler[search.scheduler]}."
    )
    header = ("Best of", "Settings", label, "Own", "Median / worst", "Over (stopped)", "Epochs")
    return Table(title="Best configurations", header=header, rows=rows, caption=caption, left=2)


def _all(search: Search, found: dict[str, Outcome]) -> Table:
    """Return every configuration, the best of each variant first."""
    label = METRICS.get(search.metric, search.metric)
    rows: list[tuple[str, ...]] = []
    for name, outcome in found.items():
        ordered = sorted(outcome.tried, key=lambda item: _rank(item, search))
        rows += [
            (
                name,
                str(item.number),
                _settings(item),
                "stopped" if item.stopped else item.state,
                str(item.epochs),
                _points(item.score) if item.score is not None else f"({_points(item.last_score)})",
            )
            for item in ordered
        ]
    left_out = len(rows) - MOST_ROWS
    return Table(
        title="Configurations",
        header=("Variant", "Number", "Settings", "State", "Epochs", label),
        rows=tuple(rows[:MOST_ROWS]),
        caption="In parentheses: while training, on a part of the pictures."
        + (f" {left_out} more are in search.json." if left_out > 0 else ""),
        left=4,
    )


def _rank(item: Tried, search: Search) -> tuple[Any, ...]:
    sign = -1 if search.mode == "max" else 1
    finished, last = item.score is not None, item.last_score if item.score is None else item.score
    return (not finished, -item.epochs, sign * (last or 0.0), item.number)


def _settings(item: Tried | None) -> str:
    if item is None:
        return "-"
    return told(item.values)


def told(values: dict[str, Any]) -> str:
    """Return the values of a configuration in one line; a key by its last part, where no other one has the same."""
    last = {key: key.rpartition(".")[2] for key in values}
    names = {key: name if [*last.values()].count(name) == 1 else key for key, name in last.items()}
    return ", ".join(f"{names[key]} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _points(score: float | None) -> str:
    return "-" if score is None else f"{POINTS * score:.1f}"
