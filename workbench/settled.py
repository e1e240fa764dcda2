"""Records of trials that have ended, kept so that nobody reads their events again: a study of days has millions.

`index/trials/<trial_id>.json` holds a record with the stamps of the files that it was read from, and counts only while
they are the same. All of it may be deleted whenever; it is then made again.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workbench import durable
from workbench.errors import StoreError
from workbench.records import TrialRecord

_FILES = (
    "attempts",
    "result.json",
    "error.json",
    "events.jsonl",
    "evaluations",
    "stopped.json",
)  # what a record is read from
_RECORD = TypeAdapter(TrialRecord)

Stamps = Sequence[Sequence[int] | None]


def stamps(folder: str) -> Stamps:
    """Return what changes with what a trial's record is read from; of many trials most have no folder yet."""
    if durable.stamp(folder) is None:
        return (None,)
    found = [durable.stamp(f"{folder}/{name}") for name in _FILES]
    try:
        with os.scandir(f"{folder}/evaluations") as places:
            names = sorted(place.name for place in places)
    except OSError:
        names = []
    return (*found, *(durable.stamp(f"{folder}/evaluations/{name}/metrics.json") for name in names))


def read(path: Path, current: Stamps) -> TrialRecord | None:
    """Return the record that was kept; None where there is none, or files have changed since."""
    try:
        plain = durable.read_json(path)
        if plain is None or plain.get("stamps") != _lasting(current):
            return None
        return _RECORD.validate_python(plain.get("record"))
    except (StoreError, ValidationError):  # of another version, or not readable: the files themselves are
        return None


def keep(path: Path, current: Stamps, record: TrialRecord) -> None:
    """Keep the record of a trial that has ended, where that is possible."""
    plain: dict[str, Any] = {"stamps": _lasting(current), "record": _RECORD.dump_python(record)}
    with suppress(OSError):  # a folder that may only be read, or a full disk: the index just saves time
        durable.write_derived(path, plain)


def _lasting(current: Stamps) -> list[list[int] | None]:
    """Return of the stamps what a copy to another disk keeps: times, and the sizes of files."""
    folders = (_FILES.index("attempts"), _FILES.index("evaluations"))
    return [
        None if item is None else list(item[1:2] if place in folders else item[1:])
        for place, item in enumerate(current)
    ]
