"""Drivers of toy studies as processes of their own, to be signalled and killed; and what is looked for afterwards."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from toys import NOWHERE, ToyTrainer, executed, run_toy, toy_plan

from workbench.durable import EventReader
from workbench.errors import WorkbenchError
from workbench.processes import Process
from workbench.store import Store
from workbench.study import Plan

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60.0

Found = TypeVar("Found")


def start(place: Path, *options: str, runs: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
    """Start a driver; `options` as `main` takes them. `environment` is added to this process's."""
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, __file__, str(place), "--runs", str(runs or place / "runs"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
    )


def main() -> int:
    """Run a toy study as `python -m workbench run` would, with its exit codes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--name", default="toy")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--tracking-uri", default=NOWHERE)
    parser.add_argument("--wait", action="store_true")
    given = parser.parse_args()
    plan = toy_plan(given.place, name=given.name, seeds=given.seeds)
    trainer = ToyTrainer(steps=given.steps, seconds=given.seconds)
    uri = None if given.tracking_uri == "embedded" else given.tracking_uri
    try:
        code, out, err = run_toy(plan, Store(given.runs), trainer, tracking_uri=uri, wait=given.wait, shown=True)
    except WorkbenchError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "signal", 2)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


def wait_for(condition: Callable[[], Found], *, patience: float = PATIENCE) -> Found:
    """Return what `condition` returns once that is true."""
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {patience:g} s")


def steps_of(plan: Plan, store: Store) -> list[list[int]]:
    """Return the executed steps of every trial of a plan, in the order of the plan."""
    return [executed(store.trial_dir(trial.trial_id)) for trial in plan.trials]


def curve_of(store: Store, trial_id: str) -> list[int]:
    """Return the steps of a trial's recorded curve: without gap or duplicate where all is well."""
    reader: Any = EventReader(store.trial_dir(trial_id) / "events.jsonl")
    reader.poll()
    return [item.event.step for item in reader.events if type(item.event).__name__ == "StepsTaken"]


def below(pid: int) -> list[Process]:
    """Return the processes that a process has started, and theirs, as far as they live."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, own in parents.items() if own == parent]
        found += [process for child in children if (process := Process.of(child)).alive()]
        todo += children
    return found


if __name__ == "__main__":
    raise SystemExit(main())
