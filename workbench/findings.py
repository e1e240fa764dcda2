"""What a look at a machine finds."""

from collections.abc import Callable, Iterator
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


Look = Callable[[Path], Iterator[Finding]]


def check(look: Look, runs: Path) -> Iterator[Finding]:
    """Yield what a look finds; one that fails is a finding itself, and the others go on."""
    try:
        yield from look(runs)
    except (OSError, ValueError) as error:
        yield Finding(what=look.__name__.replace("_", " "), state="note", found=f"could not be looked at ({error})")
