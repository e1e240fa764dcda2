"""Signs of life: what the holder shows, and what those who wait make of it."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest import mock

import pytest

from workbench import attempts, lease
from workbench.processes import Process
from workbench.slots import Slot, Task
from workbench.template import Lost

WORKER = """
import sys, time
from pathlib import Path
from workbench import lease
lease.BEAT_SECONDS = 0.1
heart = lease.Heart(Path(sys.argv[1]), stall_seconds=1.0, on_stall=lambda: print("stalled", flush=True))
for _ in sys.stdin:  # a step for each line
    heart.pulse()
    print("step", flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    """Return a process whose work stalls after a second without a step; it takes one for each line that it is sent."""
    command = [sys.executable, "-c", WORKER, str(tmp_path / "beat")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def _step(worker):
    worker.stdin.write("\n")
    worker.stdin.flush()
    return worker.stdout.readline()


def test_a_process_that_was_suspended_has_not_stalled(worker):
    """As Slurm and containers do it: time in which nothing could be done is none in which nothing was done."""
    assert _step(worker) == "step\n"
    worker.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    worker.send_signal(signal.SIGCONT)
    time.sleep(0.2)  # two beats
    assert [_step(worker), _step(worker)] == ["step\n", "step\n"]
    assert worker.stdout.readline() == "stalled\n"  # now that it takes no step although it could


def test_silence_is_what_was_listened_to(tmp_path, monkeypatch):
    """A waiting process that was suspended does not take its own sleep for the holder's death; looking on, it does."""
    now = [1000.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    beat = tmp_path / "beat"
    beat.write_text("1 0\n")
    assert lease.silent_for(beat) == 0.0
    now[0] += 3600.0
    assert lease.silent_for(beat) < lease.EXPIRY_SECONDS
    for _ in range(int(lease.EXPIRY_SECONDS)):
        now[0] += 1.0
        silence = lease.silent_for(beat)
    assert silence >= lease.EXPIRY_SECONDS
    beat.write_text("2 0\n")
    assert lease.silent_for(beat) == 0.0


def test_a_file_system_that_is_away_does_not_end_the_beat(tmp_path, monkeypatch):
    """What cannot be looked up for a while is looked up again, and the holder goes on showing that it lives."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    failures = iter(range(3))

    def look():
        for _ in failures:
            raise OSError(116, "Stale file handle")

    heart = lease.Heart(tmp_path / "beat", on_beat=look)
    give_up = time.monotonic() + 5
    while lease.beats(tmp_path / "beat") < 6 and time.monotonic() < give_up:
        time.sleep(0.01)
    heart.stop()
    assert lease.beats(tmp_path / "beat") >= 6


@pytest.fixture
def slot(store, tmp_path, monkeypatch):
    """Return a slot, for which silence counts at once, and a function that begins the trial `one` as a process."""
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", -1.0)
    driver = Process.current()
    task = Task(
        run=print,
        runs=store.root,
        logs=tmp_path,
        stop=tmp_path / "wish",
        driver=driver,
        retries=0,
        processes="here",
    )

    def begin_as(process):
        with mock.patch.object(Process, "current", return_value=process):
            attempts.begin(store.trial_dir("one"), driver=driver)

    return Slot(task), begin_as


@pytest.fixture
def child():
    """Return a process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_slot_kills_a_process_that_is_silent(slot, child, store):
    """One that does not even beat cannot end itself; that it has just ended is no error, and is put on record."""
    found, begin_as = slot
    begin_as(Process.of(child.pid))
    found._watch("one")
    assert child.wait(5) == -signal.SIGKILL
    found._watch("one")
    found._record_loss("one", Lost("killed"), out_of_memory=False)
    assert store.state("one") == "failed"


def test_a_slot_leaves_processes_elsewhere_alone(slot, child, store):
    """A trial that Ray has moved here may still run there, under a number that is another process's here."""
    found, begin_as = slot
    begin_as(replace(Process.of(child.pid), boot="another machine of the same name"))
    found._watch("one")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    found._record_loss("one", Lost("killed before it began"), out_of_memory=False)
    assert attempts.read(store.trial_dir("one"))[0].outcome is None


def test_the_first_step_is_shown_at_once(tmp_path):
    """The others wait for the first trial's first step, and not for its next beat."""
    heart = lease.Heart(tmp_path / "beat")
    heart.pulse()
    give_up = time.monotonic() + 2
    while lease.pulses(tmp_path / "beat") == 0 and time.monotonic() < give_up:
        time.sleep(0.01)
    heart.stop()
    assert (lease.pulses(tmp_path / "beat"), lease.beats(tmp_path / "beat")) == (1, 2)
