"""What MLflow has of a study, as far as is known here: `mlflow.json`."""

import time
from pathlib import Path
from typing import Any

from workbench import durable

SAVE_SECONDS = 5.0  # it is long with many trials; what a kill loses is sent again, and MLflow drops it


class State:
    """The ids of the runs and what has been sent to them, of one tracking URI."""

    def __init__(self, path: Path, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self.changed = True  # since it was written
        self._path = path
        self._saved = 0.0
        self.forget_all()
        self._read()

    def forget_all(self) -> None:
        """Begin anew, as with another MLflow."""
        self.experiment_id: str | None = None
        self.parent_run_id: str | None = None
        self.runs: dict[str, str] = {}  # of trials, by key
        self.watermarks: dict[str, list[int]] = {}  # the last steps sent, of StepsTaken and EpochFinished
        self.reached: dict[str, Any] = {}  # how far each trial's run, and the plan's, have been brought

    def forget(self, key: str) -> None:
        """Begin anew with one trial."""
        for known in (self.runs, self.watermarks, self.reached):
            known.pop(key, None)
        self.changed = True

    def save(self, *, now: bool) -> None:
        """Write the file if anything changed, not `now` only if it has not been written for a while."""
        if self.changed and (now or time.monotonic() - self._saved > SAVE_SECONDS):
            durable.write_json(self._path, self.to_json(), indent=None)
            self._saved, self.changed = time.monotonic(), False

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        names = ("tracking_uri", "experiment_id", "parent_run_id", "runs", "watermarks", "reached")
        return {name: getattr(self, name) for name in names}

    def _read(self) -> None:
        """Take over what the last driver that used the same MLflow left; of a damaged file nothing."""
        plain = durable.read_json(self._path)
        if plain is None or plain.get("tracking_uri") != self.tracking_uri:
            return
        ids = (plain.get("experiment_id"), plain.get("parent_run_id"))
        runs, marks, reached = (plain.get(name) for name in ("runs", "watermarks", "reached"))
        if not isinstance(runs, dict) or not isinstance(marks, dict) or not isinstance(reached, dict):
            return
        texts = all(isinstance(item, str) for item in runs.values())
        if texts and all(item is None or isinstance(item, str) for item in ids) and _are_marks(marks):
            self.experiment_id, self.parent_run_id = ids
            self.runs, self.watermarks, self.reached = runs, marks, reached
            self.changed = False


def _are_marks(marks: dict[str, Any]) -> bool:
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(step, int) for step in pair)
        for pair in marks.values()
    )
