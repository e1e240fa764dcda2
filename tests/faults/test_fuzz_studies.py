"""Ten thousand study files that are wrong in some way: each is planned or refused in words, at once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from mutants import STUDY, structure_mutant, text_mutant

from workbench.errors import WorkbenchError
from workbench.plan import make_plan
from workbench.study_file import Selection, load_study

ROOT = Path(__file__).parent.parent.parent
NUM_FILES, NUM_PROCESSES = 10_000, 100
LONGEST_SECONDS = 2.0
SMOKE = Selection(profile="smoke")


class Hang(BaseException):
    """One file took longer than it may; no `except Exception` of the product swallows it."""


@contextmanager
def watched(seconds):
    """End the block by a `Hang` that shows where it was."""

    def bark(_number, _frame):
        raise Hang(f"longer than {seconds} s")

    earlier = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def mutant(number):
    """Return the bytes of one file; the same for a number at all times."""
    rng = random.Random(number)  # noqa: S311
    return structure_mutant(rng) if number % 2 else text_mutant(rng)


def fate(path, content):
    """Return how a file ends: planned, or refused; whatever else is raised comes through."""
    path.write_bytes(content)
    try:
        with watched(LONGEST_SECONDS):
            make_plan(load_study(path, SMOKE))
    except WorkbenchError as error:
        assert str(error).strip()
        return "refused"
    return "planned"


def test_the_file_that_is_mutated_is_sound(tmp_path):
    """Else every mutation would be refused for the same reason."""
    assert fate(tmp_path / "study.yaml", STUDY.encode()) == "planned"


def test_watchdog_ends_a_hang():
    """What would run for ever is ended and named."""
    with pytest.raises(Hang), watched(0.05):
        time.sleep(5)


@pytest.mark.ci
def test_no_mutated_study_file_raises_or_hangs(tmp_path):
    """Of 10,000 files each is planned or refused with a message of our own within two seconds."""
    path, found = tmp_path / "study.yaml", Counter()
    for number in range(NUM_FILES):
        try:
            found[fate(path, mutant(number))] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number}: {type(error).__name__}: {error}\n{mutant(number)!r}") from error
    assert found["planned"] > NUM_FILES / 100  # mutants near to a sound file, and
    assert found["refused"] > NUM_FILES / 2  # mostly files that are wrong


@pytest.mark.ci
def test_no_mutated_study_file_ends_a_command_with_a_traceback(tmp_path):
    """Of 100 files given to `check` each ends with exit code 0 or 2, and 2 comes with what is wrong."""

    def checked(number):
        path = tmp_path / f"study_{number}.yaml"
        path.write_bytes(mutant(number))
        command = [sys.executable, "-m", "workbench", "check", str(path), "--profile", "smoke"]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return number, done

    with ThreadPoolExecutor(2) as pool:
        for number, done in pool.map(checked, range(NUM_FILES, NUM_FILES + NUM_PROCESSES)):
            assert done.returncode in (0, 2), (number, done.stderr)
            assert "Traceback" not in done.stderr, (number, done.stderr)
            assert bool(done.stderr.strip()) == (done.returncode == 2), (number, done.stderr)
