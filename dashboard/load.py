"""What the pages show: records read through the store, values computed by the workbench. Its only importer here.

Frames leave in screen units: AP in points, memory in MiB; in the records they are fractions and bytes.
Nothing here knows streamlit, and importing it loads neither torch, ray nor mlflow.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import pandas as pd

from workbench import commands, comparison, palette
from workbench.commands import next_run
from workbench.errors import StoreError
from workbench.labels import METRICS, POINTS
from workbench.progress import best_ap, last_speed, share
from workbench.records import StudyRef, StudyResults, TrialState, Verdict
from workbench.store import Store
from workbench.study import Parameters, PlannedTrial

__all__ = [
    "METRICS",
    "Parameters",
    "StoreError",
    "Verdict",
    "comparison",
    "next_run",
]  # what the pages use of the workbench as it is

STATES: tuple[TrialState, ...] = get_args(TrialState)
MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` answers unless told otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyEntry:
    """One registered plan of a study. `results` is None where the record cannot be read; `problem` then says why."""

    key: str  # study/profile/plan, as it stands in the URL
    ref: StudyRef
    results: StudyResults | None
    problem: str | None

    @property
    def running(self) -> bool:
        """Return whether a trial of the study trains now."""
        return self.results is not None and any(record.state == "running" for record in self.results.records.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimCard:
    """A claim as its card shows it, in AP points. `verdict` is None until one is stored."""

    claim: str
    text: str
    verdict: Verdict | None
    effect: float | None
    low: float | None
    high: float | None
    margin: float
    dots: tuple[float, ...]
    level: float | None  # of the interval, percent


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the trials of the looks started have come."""

    states: dict[TrialState, int]  # those that occur, in the order of a trial's life
    planned: int
    over: int  # finished or diverged: nothing is left to do
    fraction: float  # of the training planned

    @property
    def running(self) -> bool:
        """Return whether a trial trains now."""
        return "running" in self.states


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A trial that ended badly: why, and the folder whose files say more."""

    trial: str
    state: TrialState
    attempts: int
    message: str
    folder: Path


# ------------------------------------------------------------------------------------------------------- reading


def runs_folder(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Return the folder named by `--runs`, else by WORKBENCH_RUNS, else `runs`; and the arguments not understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path(environment.get("WORKBENCH_RUNS") or "runs"))
    known, unknown = parser.parse_known_args(list(arguments))
    return known.runs, unknown


def entries(runs: Path) -> tuple[StudyEntry, ...]:
    """Return every registered study plan, newest first; an unreadable one is an entry with its problem.

    Raises:
        StoreError: `runs` is a file.
    """
    with _ONE_READER:
        store = _store(runs.absolute())
        return tuple(_entry(store, ref) for ref in store.studies())


def _entry(store: Store, ref: StudyRef) -> StudyEntry:
    results, problem = None, None
    try:
        results = store.results(ref)
    except StoreError as error:
        problem = str(error)
    return StudyEntry(key=f"{ref.study}/{ref.profile}/{ref.plan_hash[:8]}", ref=ref, results=results, problem=problem)


_ONE_READER = Lock()  # a store goes on reading each events file where it stopped, and the pages of all users share it


@lru_cache(maxsize=4)
def _store(runs: Path) -> Store:
    return Store(runs, create=False)


# ------------------------------------------------------------------------------------------ claims and progress


def registered(ref: StudyRef) -> str:
    """Return when a plan was registered, in local time, as text."""
    return datetime.fromisoformat(ref.registered_at).astimezone().strftime("%d %b %Y, %H:%M")


def colours(results: StudyResults) -> dict[str, str]:
    """Return the colour of each variant, the same on every page and in the report."""
    return palette.variant_colours([variant.name for variant in results.plan.study.variants])


def verdict_colour(verdict: Verdict) -> str:
    """Return the colour of a verdict's word, the same on every page and in the report."""
    return palette.VERDICT_COLOURS[verdict.verdict]


def scope_line(results: StudyResults) -> str:
    """Return what the study's numbers are about: pairing, pictures, scope, checkpoint."""
    pictures = {metrics.num_pictures for record in results.records.values() for metrics in record.metrics.values()}
    scored = f"{max(pictures):,} validation pictures" if pictures else "nothing scored yet"
    return f"Seeds paired across variants · {scored} · scope: {results.plan.study.scope} · last checkpoint"


def claim_cards(results: StudyResults) -> tuple[ClaimCard, ...]:
    """Return the study's claims in their order, each with the verdict stored last."""
    verdicts = {verdict.claim: verdict for verdict in results.verdicts}
    cards = []
    for claim in results.plan.study.claims:
        verdict = verdicts.get(claim.id)
        cards.append(
            ClaimCard(
                claim=claim.id,
                text=claim.text,
                verdict=verdict,
                effect=_points(verdict and verdict.effect),
                low=_points(verdict and verdict.low),
                high=_points(verdict and verdict.high),
                margin=claim.margin * POINTS,
                dots=tuple(value * POINTS for value in verdict.differences.values()) if verdict else (),
                level=100 * (1 - verdict.alpha) if verdict else None,
            )
        )
    return tuple(cards)


def progress(results: StudyResults) -> Progress:
    """Return how far the trials of the looks started have come."""
    records = [results.records[trial.trial_id] for trial in results.asked_for()]
    states = Counter(record.state for record in records)
    done = [1.0 if record.state == "diverged" else share(record) for record in records]
    return Progress(
        states={state: states[state] for state in STATES if states[state]},
        planned=len(records),
        over=states["finished"] + states["diverged"],
        fraction=sum(done) / max(len(done), 1),
    )


def _points(value: float | None) -> float | None:
    return None if value is None else value * POINTS


# ---------------------------------------------------------------------------------------------------------- runs


def trials(runs: Path, results: StudyResults) -> pd.DataFrame:
    """Return one row a trial of the looks started, those that run first.

    Columns: variant, seed, state, progress (0 to 1), attempts, best_ap (points, any evaluation so far), pictures_per_s,
    seconds (trained), seconds_left (while running), peak_memory_mib, mlflow (address), trial_id.
    """
    with _ONE_READER:
        rows = [_trial_row(_store(runs.absolute()), results, trial) for trial in results.asked_for()]
    return pd.DataFrame(rows).sort_values("state", key=lambda states: states != "running", kind="stable")


def _trial_row(store: Store, results: StudyResults, trial: PlannedTrial) -> dict[str, Any]:
    record = results.records[trial.trial_id]
    done, running = share(record), record.state == "running"
    # Only of those that run does anybody want it to the second: the events of the others are many and are not read.
    speed = last_speed(store.events(trial.trial_id)) if running else None
    return {
        "variant": trial.variant,
        "seed": trial.seed,
        "state": record.state,
        "progress": done,
        "attempts": record.attempts,
        "best_ap": _points(best_ap(record)),
        "pictures_per_s": speed or (record.epochs[-1].pictures_per_s if record.epochs else None),
        "seconds": record.seconds if record.attempts else None,
        "seconds_left": record.seconds * (1 - done) / done if running and done else None,
        "peak_memory_mib": max((epoch.peak_memory_bytes / 2**20 for epoch in record.epochs), default=None),
        "mlflow": mlflow_url(results, trial.trial_id),
        "trial_id": trial.trial_id,
    }


def failures(runs: Path, results: StudyResults) -> tuple[Failure, ...]:
    """Return the trials that failed, diverged or were interrupted, in the order of the plan."""
    found = []
    for trial in results.asked_for():
        record = results.records[trial.trial_id]
        if record.state in ("failed", "diverged", "interrupted"):
            told = record.error or record.result or record.stopped or {}
            found.append(
                Failure(
                    trial=f"{trial.variant} seed {trial.seed}",
                    state=record.state,
                    attempts=record.attempts,
                    message=told.get("message") or told.get("reason") or "its process ended before it could say why",
                    folder=_store(runs.absolute()).trial_dir(trial.trial_id),
                )
            )
    return tuple(found)


def mlflow_url(results: StudyResults, trial_id: str | None = None) -> str | None:
    """Return the address of the study's, or of one trial's, page in MLflow; None where nothing was mirrored yet."""
    mirror = results.mlflow
    run = mirror and (mirror["runs"].get(trial_id) if trial_id else mirror["parent_run_id"])
    if not mirror or not run:
        return None
    server = mirror["tracking_uri"].rstrip("/")
    root = server if server.startswith("http") else MLFLOW_UI
    # Without the type, MLflow's pages open on what they have for language models.
    return f"{root}/#/experiments/{mirror['experiment_id']}/runs/{run}?workflowType=machine_learning"


def mlflow_command(results: StudyResults) -> str | None:
    """Return the line that starts MLflow's pages; None where a server shows them already or nothing is mirrored."""
    return commands.mlflow_command(results.mlflow["tracking_uri"]) if results.mlflow else None
