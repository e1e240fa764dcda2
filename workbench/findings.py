"""What a look at a machine finds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "problem"]
GIGABYTE = 1000**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at, in a line; `remedy` is what to do, "" where nothing is."""

    what: str
    state: State
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.state:8}{self.what:16}{self.found}{remedy}"


def ok(what: str, found: str) -> Finding:
    """Return a finding that leaves nothing to do."""
    return Finding(what=what, state="ok", found=found)


def note(what: str, found: str, remedy: str = "") -> Finding:
    """Return a finding that stops nothing and has a consequence."""
    return Finding(what=what, state="note", found=found, remedy=remedy)


def problem(what: str, found: str, remedy: str = "") -> Finding:
    """Return a finding that stops a study, or makes it unsafe."""
    return Finding(what=what, state="problem", found=found, remedy=remedy)


def by_state(what: str, state: State, found: str, remedy: str) -> Finding:
    """Return a finding of any state; where it is `ok` nothing is to be done."""
    return Finding(what=what, state=state, found=found, remedy="" if state == "ok" else remedy)


Look = Callable[[Path], Finding]


def check(look: Look, runs: Path) -> Finding:
    """Return what a look finds; one that fails is a finding itself, and the others go on."""
    try:
        return look(runs)
    except (OSError, ValueError) as error:
        return note(look.__name__.replace("_", " "), f"could not be looked at ({error})")
