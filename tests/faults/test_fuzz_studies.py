"""Ten thousand study files that are wrong in some way: each is planned or refused in words, at once."""

import faulthandler
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest
from mutants import PROFILE, STUDY, structure_mutant, text_mutant

from workbench.errors import WorkbenchError
from workbench.plan import make_plan
from workbench.study_file import Selection, load_study

ROOT = Path(__file__).parent.parent.parent
NUM_FILES, NUM_PROCESSES = 10_000, 100
MOST_SECONDS = 900.0
CPU_SECONDS, WALL_SECONDS = 2.0, 60.0  # of one file; the machine may be busy with other things
TINY = Selection(profile="tiny")


class Hang(BaseException):
    """One file took longer than it may; no `except Exception` of the product swallows it."""


@contextmanager
def watched(cpu_seconds, wall_seconds):
    """End the block by a `Hang` that shows where it was."""

    def bark(_number, _frame):
        raise Hang(f"longer than {cpu_seconds} s of CPU time or {wall_seconds} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, cpu_seconds), signal.SIGALRM: (signal.ITIMER_REAL, wall_seconds)}
    earlier = {number: signal.signal(number, bark) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def mutant(number):
    """Return the text of a study and of its profile, one of them mutated; the same for a number at all times."""
    rng = random.Random(number)
    if number % 10 == 0:
        return STUDY.encode(), text_mutant(rng, PROFILE)
    return structure_mutant(rng) if number % 2 else text_mutant(rng, STUDY), PROFILE.encode()


def write(folder, study, profile):
    """Write both files; return the study's."""
    beside = folder / "profiles" / "tiny.yaml"
    if not beside.exists() or beside.read_bytes() != profile:
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(profile)
    path = folder / "study.yaml"
    path.write_bytes(study)
    return path


def fate(path):
    """Return how a file ends: planned, or refused; whatever else is raised comes through."""
    try:
        with watched(CPU_SECONDS, WALL_SECONDS):
            make_plan(load_study(path, TINY))
    except WorkbenchError as error:
        return "refused" if str(error).strip() else "refused without a word"
    return "planned"


def different(wanted):
    """Return the numbers of so many mutants, no two of which are the same."""
    numbers, candidates = {}, count()
    while len(numbers) < wanted:
        number = next(candidates)
        numbers.setdefault(hashlib.sha256(b"\0".join(mutant(number))).digest(), number)
    return list(numbers.values())


def fates(folder, numbers):
    """Return how many mutants end in which way; run in a process of its own."""
    found = Counter()
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)  # where not even a signal ends a hang
    for number in numbers:
        path = write(folder, *mutant(number))
        try:
            found[fate(path)] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number}: {type(error).__name__}: {error}\n{mutant(number)}") from error
    faulthandler.cancel_dump_traceback_later()
    return found


def test_the_file_that_is_mutated_is_sound(tmp_path):
    """Else every mutation would be refused for the same reason."""
    assert fate(write(tmp_path, STUDY.encode(), PROFILE.encode())) == "planned"


def test_watchdog_ends_a_hang():
    """What would run for ever is ended and named."""
    with pytest.raises(Hang), watched(60, 0.05):
        time.sleep(5)
    with pytest.raises(Hang), watched(0.05, 60):
        all(number >= 0 for number in count())


@pytest.mark.ci
def test_no_mutated_study_file_raises_or_hangs(tmp_path):
    """Of 10,000 different files each is planned or refused with a message of our own within two seconds."""
    numbers = different(NUM_FILES)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        halves = [pool.submit(fates, tmp_path / str(half), numbers[half::2]) for half in (0, 1)]
        found = halves[0].result() + halves[1].result()
    assert found.total() == NUM_FILES
    assert set(found) == {"planned", "refused"}
    assert found["planned"] > NUM_FILES / 100  # mutants near to a sound file, and
    assert found["refused"] > NUM_FILES / 2  # mostly files that are wrong


@pytest.mark.ci
def test_no_mutated_study_file_ends_a_command_with_a_traceback(tmp_path):
    """Of 100 files given to `check` each ends with exit code 0 or 2, and 2 comes with what is wrong."""

    def checked(number):
        path = write(tmp_path / str(number), *mutant(number))
        command = [sys.executable, "-m", "workbench", "check", str(path), "--profile", "tiny"]
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
