"""What a trial's folder says of it. The state is derived from the files; nothing that is damaged counts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.events import EpochFinished, StepsTaken, TrainingStarted
from core.metrics import Metrics
from workbench import attempts, checks, durable
from workbench.records import TrialRecord, TrialState

STOPPED_FILE = "stopped.json"
"""Why a search ended an attempt at a trial early."""


def result(folder: Path) -> dict[str, Any] | None:
    """Return a trial's result.json; None unless it is whole, this trial's, and says finished or diverged."""
    return checks.result(durable.read_json(folder / "result.json"), folder.name)


def error(folder: Path) -> dict[str, Any] | None:
    """Return a trial's error.json; None unless it is whole."""
    return checks.error(durable.read_json(folder / "error.json"))


def evaluation(folder: Path, *, weights_hash: str | None) -> dict[str, Any] | None:
    """Return the metrics.json of an evaluation's folder; None unless it is whole and of the weights that are named."""
    plain = checks.evaluation(durable.read_json(folder / "metrics.json"), folder.name)
    return plain if plain is not None and plain.get("weights_hash", weights_hash) == weights_hash else None


def metrics(folder: Path, weights_hash: str | None) -> dict[str, Metrics]:
    """Return the scores of the weights that are named, by the evaluation's id."""
    found: dict[str, Metrics] = {}
    for place in (folder / "evaluations").glob("*"):
        plain = evaluation(place, weights_hash=weights_hash)
        if plain is not None:
            found[place.name] = Metrics.from_json(plain["metrics"])
    return found


def state(folder: Path) -> TrialState:
    """Return a trial's state without reading its events."""
    return _state(folder, attempts.read(folder), result(folder), error(folder))


def read(folder: Path, events_of: Callable[..., list[durable.StampedEvent]]) -> TrialRecord:
    """Return all that is known of a trial from its folder and its events.

    `events_of` returns those that count, oldest first; with `steps=False` without the progress within epochs, which is
    most of them and says nothing more of a trial that has ended.
    """
    tried, ended, failed = attempts.read(folder), result(folder), error(folder)
    events = events_of(steps=ended is None)
    epochs = {
        item.event.epoch: _without_classes(item.event) for item in events if isinstance(item.event, EpochFinished)
    }
    progress = [item.event for item in events if isinstance(item.event, StepsTaken | EpochFinished)]
    totals = [item.event.total_steps for item in events if isinstance(item.event, TrainingStarted)]
    return TrialRecord(
        trial_id=folder.name,
        state=_state(folder, tried, ended, failed),
        attempts=len(tried),
        seconds=ended["seconds"] if ended else max((event.seconds for event in progress), default=0.0),
        # An attempt ends a moment after the result is there.
        total_seconds=max(sum(attempt.seconds for attempt in tried), ended["total_seconds"] if ended else 0.0),
        step=max([ended.get("step", 0) if ended else 0, *(item.event.step for item in events)]),
        total_steps=totals[-1] if totals else None,
        epochs=tuple(epochs[number] for number in sorted(epochs)),
        metrics=metrics(folder, ended.get("weights_hash")) if ended else {},
        result=ended,
        error=failed,
        stopped=_stopped(folder, tried),
    )


def set_aside_damaged(folder: Path) -> None:
    """Give what is damaged in a trial's folder another name, so that it can be written anew and is not lost.

    Attempts keep their names, which are claims.
    """
    spec = folder / "spec.json"
    if durable.damaged(spec) or (durable.read_json(spec) or {"trial_id": folder.name}).get("trial_id") != folder.name:
        durable.set_aside(spec)
    for name, intact in (("result.json", result), ("error.json", error)):
        if intact(folder) is None and (folder / name).exists():
            durable.set_aside(folder / name)
    for path in folder.glob("evaluations/*/metrics.json"):
        if checks.evaluation(durable.read_json(path), path.parent.name) is None:
            durable.set_aside(path)


def damaged(folder: Path) -> list[str]:
    """Return what was ever found damaged in a trial's folder, by its path in there."""
    lost = [path for path in folder.glob("attempts/[0-9]*.json") if checks.attempt(durable.read_json(path)) is None]
    aside = [path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}.{durable.DAMAGED}*")]
    return sorted(str(path.relative_to(folder)) for path in (*lost, *aside) if path.suffix != ".sha256")


def _stopped(folder: Path, tried: tuple[attempts.Attempt, ...]) -> dict[str, Any] | None:
    """Return why a search ended the last attempt early, if that is how it ended."""
    plain = durable.read_json(folder / STOPPED_FILE)
    last = tried[-1] if tried else None
    if plain is None or last is None or not isinstance(plain.get("reason"), str):
        return None
    return plain if last.outcome == "interrupted" and plain.get("attempt") == last.number else None


def _without_classes(event: EpochFinished) -> EpochFinished:
    """Return an epoch without the scores of single classes, which nobody asks of it: with 80 of them they are most."""
    return replace(event, metrics={name: replace(scores, per_class={}) for name, scores in event.metrics.items()})


def _state(
    folder: Path,
    tried: tuple[attempts.Attempt, ...],
    ended: dict[str, Any] | None,
    failed: dict[str, Any] | None,
) -> TrialState:
    if ended is not None:
        return ended["outcome"]
    if tried and tried[-1].running(folder):
        return "running"
    if failed is not None:
        return "failed"
    return "interrupted" if tried else "pending"
