"""Which attempts of a trial made its weights, and whether they were alike: the code may be edited between two of them.

An attempt keeps what it depends on in `provenance/<number>.json` of the trial's folder, before its first step. The
result says of each compared fact in which the attempts differed whose steps are in the weights.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.events import CheckpointSaved, EpochFinished, StepsTaken
from workbench import code_state, durable, provenance


def begin(folder: Path, number: int, facts: dict[str, Any], *, code: Path) -> None:
    """Keep what an attempt depends on: its facts in the trial's `folder`, texts that many share in `code`."""
    code_state.keep(code_state.current(), code)
    durable.write_json(_file(folder, number), facts)


def of_result(folder: Path, number: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of a trial's result: that of its last attempt, and where earlier ones differ from it.

    `mixed`: fact -> its values, oldest first, of the attempts whose steps are in the weights.
    """
    whole = facts | provenance.computed(facts["device"])
    earlier = [durable.read_json(_file(folder, other)) or {} for other in contributing(folder) if other != number]
    mixed: dict[str, list[Any]] = {}
    for name in provenance.COMPARED:
        values = _distinct(attempt[name] for attempt in (*earlier, whole) if attempt.get(name) is not None)
        if len(values) > 1:
            mixed[name] = values
    return {**whole, "mixed": mixed} if mixed else whole


def contributing(folder: Path) -> list[int]:
    """Return the numbers of the attempts whose steps count; one that a later attempt did not go on from is none."""
    reader = durable.EventReader(folder / "events.jsonl")
    reader.poll()
    steps = (StepsTaken, EpochFinished, CheckpointSaved)
    return _distinct(item.attempt for item in reader.events if isinstance(item.event, steps))


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += [] if value in found else [value]
    return found


def _file(folder: Path, number: int) -> Path:
    return folder / "provenance" / f"{number:04d}.json"
