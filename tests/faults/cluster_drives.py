"""Drivers of toy studies on a cluster, as tests see them; `cluster_driver.py` is what they start."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import drivers
from cluster_driver import plan_of
from drivers import curve_of
from faults import Seen
from nodes import HERE, environment

from workbench.store import Store

PATIENCE = 400.0  # on a busy machine

wait_for = partial(drivers.wait_for, patience=PATIENCE)


class Drive:
    """A driver in a process of its own, of a study in the folder `place`; `told` is what `cluster_driver` is told."""

    def __init__(self, place: Path, address: str, *, plan: dict[str, Any], **told: Any) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        self.plan = plan_of(place, **plan)
        self.store = Store(place / "runs")
        told |= {"place": str(place), "address": address, "plan": plan}
        with self._log().open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "cluster_driver.py"), json.dumps(told)],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment(),
            )

    def wait(self, seconds: float = PATIENCE) -> Seen:
        """Return how it ended; a driver that does not end in time is killed, and its exit code is None."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            code = None
        states = [self.store.state(trial_id) for trial_id in self.plan.specs]
        return {"exit": code, "states": states, "told": self.told()}

    def end(self) -> None:
        """Leave nothing of it."""
        self.process.kill()
        self.process.wait()

    def told(self) -> str:
        """Return what it has said so far."""
        return self._log().read_text()

    def folders(self) -> list[Path]:
        """Return the folders of its trials."""
        return [self.store.trial_dir(trial_id) for trial_id in self.plan.specs]

    def steps_on_record(self) -> list[list[int]]:
        """Return of each trial the steps of its recorded curve."""
        return [curve_of(self.store, trial_id) for trial_id in self.plan.specs]

    def open_gate(self) -> None:
        """Let its trials go on."""
        (self.place / "gate").touch()

    def _log(self) -> Path:
        return self.place / "told"
