"""One line for each fault at the end of a test run: what was expected, and what was seen."""

import re

import pytest
from faults import TOLD


def pytest_configure(config: pytest.Config) -> None:
    """Begin an empty list."""
    config.stash[TOLD] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the lines in the order of the matrix."""
    told = sorted(config.stash[TOLD], key=lambda line: (int(re.findall(r"\d+", line[0])[0]), line[0]))
    if told:
        terminalreporter.section("faults")
    for number, title, expected, seen in told:
        terminalreporter.line(f"{number:<4} {title} | expected: {expected} | seen: {seen}")


@pytest.fixture
def proof(tmp_path):
    """Return the folder that only a payload makes; it is not there at the end."""
    folder = tmp_path / "the payload ran"
    yield folder
    assert not folder.exists()
