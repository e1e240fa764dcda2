"""What the runner writes to, and the lines that it says of failures."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from workbench.store import Store
from workbench.study import PlannedTrial
from workbench.terminal import visible


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
