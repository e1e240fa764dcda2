"""What a fault of the matrix is: a way to break things, what must then hold, and the protection that makes it hold.

Each fault is run twice. With its protection, `verify` must pass. Without it, the control, `verify` must fail: a check
that cannot fail proves nothing. The closing lines of a test run say of each fault what was expected and what was seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Seen = dict[str, Any]
"""What a scenario found, by name: plain values, told as they are."""

TOLD = pytest.StashKey[list[tuple[str, ...]]]()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One row of the matrix.

    `scenario` gets an empty folder and `protected=`, breaks things there and returns what it saw; `verify` asserts of
    it. `marks`: what the two tests need, `slow` for those with the real trainer.
    """

    number: str  # F1 to F28; a second scenario of one fault has a letter: F13b
    title: str
    expected: str
    scenario: Callable[..., Seen]
    verify: Callable[[Seen], None]
    marks: tuple[pytest.MarkDecorator, ...] = field(default=(pytest.mark.ci,))


def cases(*faults: Fault) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the two tests of a module's faults, to be called `test_fault` and `test_control` there."""
    rows = [pytest.param(fault, id=fault.number, marks=fault.marks) for fault in faults]

    @pytest.mark.parametrize("fault", rows)
    def test_fault(fault: Fault, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        """The fault costs no more than it may."""
        seen = fault.scenario(tmp_path, protected=True)
        fault.verify(seen)
        request.config.stash[TOLD].append((fault.number, fault.title, fault.expected, in_words(seen)))

    @pytest.mark.parametrize("fault", rows)
    def test_control(fault: Fault, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        """Without the protection the same check reports red."""
        seen = fault.scenario(tmp_path, protected=False)
        try:
            fault.verify(seen)
        except AssertionError:
            pass
        else:
            pytest.fail(f"the check passes without the protection: {in_words(seen)}")
        request.config.stash[TOLD].append((fault.number, "control: protection off", "red", in_words(seen)))

    return test_fault, test_control


def in_words(seen: Seen) -> str:
    """Return what was seen on one line."""
    return ", ".join(f"{name} {value}" for name, value in seen.items())
