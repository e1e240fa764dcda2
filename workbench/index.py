"""The curves of a study as a tidy table, kept as parquet so that a page of the dashboard reads one small file.

Finished trials never change and are read once; running ones are read again each time.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pandas as pd

from core.events import EpochFinished, StepsTaken
from workbench.durable import StampedEvent, write_with
from workbench.records import StudyResults, TrialRecord
from workbench.series import numbers

COLUMNS = {
    "trial_id": "str",
    "step": "int64",
    "epoch": "float64",
    "seconds": "float64",
    "parameters": "str",
    "name": "str",
    "value": "float64",
}
"""`parameters` is raw or averaged for metrics on the fixed validation subset, and empty for what training itself emits:
`loss/...`, `grad_norm`, `learning_rate`, `pictures_per_s`, `data_share` (means over some seconds), the same after
`epoch/` (means over an epoch), and `peak_memory_bytes`. `epoch` is a fraction within an epoch; `seconds` are of
training."""


Events = Callable[[str], Iterable[StampedEvent]]


def history(results: StudyResults, *, path: Path, events: Events) -> pd.DataFrame:
    """Return one row for each trial, step and number of a study: the columns of `COLUMNS`.

    `path` is where the table is kept; `events` reads those of a trial id.
    """
    kept = _read(path)
    done = {trial_id: _stamp(record) for trial_id, record in results.records.items() if record.result}
    kept = kept[kept["trial_id"].map(done).eq(kept["finished_at"]).astype(bool)]
    missing = [trial_id for trial_id in done if trial_id not in set(kept["trial_id"])]
    if missing:
        kept = pd.concat([kept, *(_rows(events, trial_id).assign(finished_at=done[trial_id]) for trial_id in missing)])
        with suppress(OSError):  # a folder that may only be read: the index just saves time
            write_with(path, lambda temporary: kept.to_parquet(temporary, index=False))
    going = [trial_id for trial_id, record in results.records.items() if not record.result and record.attempts]
    frames = [kept.drop(columns="finished_at"), *(_rows(events, trial_id) for trial_id in going)]
    return pd.concat(frames, ignore_index=True).astype(COLUMNS)


def _rows(events: Events, trial_id: str) -> pd.DataFrame:
    rows = [row for stamped in events(trial_id) for row in _event_rows(trial_id, stamped)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    return frame.drop_duplicates(["step", "parameters", "name"], keep="last")


def _event_rows(trial_id: str, stamped: StampedEvent) -> list[tuple[object, ...]]:
    event = stamped.event
    if not isinstance(event, StepsTaken | EpochFinished):
        return []
    return [
        (trial_id, event.step, float(event.epoch), event.seconds, parameters, name, value)
        for (parameters, name), value in numbers(event).items()
    ]


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError):  # none yet, or damaged: it is rebuilt
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in {**COLUMNS, "finished_at": "str"}.items()})


def _stamp(record: TrialRecord) -> str:
    return record.result["finished_at"] if record.result else ""
