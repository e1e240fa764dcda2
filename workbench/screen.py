"""What the runner writes to, and lines that it says."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from workbench import commands
from workbench.resources import Resources
from workbench.store import Store
from workbench.study import PlannedTrial, Study
from workbench.terminal import visible


def gpu_lines(study: Study, resources: Resources) -> list[str]:
    """Return which GPUs there are and what they are for; nothing where there are none."""
    if not resources.gpus:
        return []
    names = ", ".join(f"{count} x {name}" for name, count in Counter(resources.gpus).items())
    each = f"uses them, {resources.demand.gpus * resources.demand.world_size:g} a trial"
    used = each if resources.device == "cuda" else "draws its pictures and stays on the CPU"
    return [f"GPUs: {names}; profile {study.profile} {used}"]


def page_lines(tracking_uri: str, runs: Path) -> list[str]:
    """Return where a study can be watched, and what to start for it."""
    line = commands.mlflow_command(tracking_uri)
    server = tracking_uri.rstrip("/") if line is None else "http://127.0.0.1:5000"
    pages = f"{server}/#/experiments?workflowType=machine_learning"
    mlflow = [pages] if line is None else [line, f"then {pages}"]
    dashboard = commands.dashboard_command(runs)
    return [f"MLflow:    {mlflow[0]}", *(f"           {rest}" for rest in mlflow[1:]), f"Dashboard: {dashboard}"]


def failure_lines(store: Store, trial: PlannedTrial) -> list[str]:
    """Return what failed, the end of its traceback, and the file that has all of it."""
    error = store.record(trial.trial_id).error or {}
    trace = [] if error.get("class") == "bad_config" else error.get("traceback", "").strip().splitlines()
    told = trace[-4:] or [error.get("message", "")]  # a message for users says more than where it was raised
    return [
        f"{trial.variant} seed {trial.seed} ({trial.trial_id}) failed: {error.get('class')}",
        *(f"    {line}" for line in told),
        f"    {store.trial_dir(trial.trial_id) / 'error.json'}",
    ]


@contextmanager
def kept(stream: TextIO) -> Iterator[TextIO]:
    """Give a stream of our own to where `stream` writes: while Ray runs, what anybody prints goes to a file."""
    try:
        number = os.dup(stream.fileno())
    except (OSError, ValueError):  # a stream in memory
        yield stream
        return
    with os.fdopen(number, "w", encoding="utf-8", errors="replace") as own:
        yield own


def line_to(stream: TextIO) -> Callable[[str], None]:
    """Return a function that writes a line to the stream at once."""

    def say(line: str) -> None:
        stream.write(visible(line) + "\n")
        stream.flush()

    return say
