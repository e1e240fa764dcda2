"""Who works on a trial, and what becomes of it when they die."""

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from workbench import attempts, durable, lease
from workbench.errors import BusyError
from workbench.processes import Process

CHILD = """
import sys
from pathlib import Path
from workbench import attempts
attempts.begin(Path(sys.argv[1]), driver=None)
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(tmp_path):
    """Start a process that has begun the trial in `tmp_path` and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def test_a_process_knows_itself_and_not_its_namesake():
    """A recycled process number is not believed, nor one of before the last boot or of another host."""
    me = Process.current()
    assert me.alive()
    assert me.started is not None
    assert not replace(me, started=me.started - 1).alive()
    assert not replace(me, boot="another").alive()
    assert not replace(me, host=f"not-{socket.gethostname()}").alive()


def test_a_zombie_is_dead():
    """A killed child that nobody has waited for does not count as alive."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = replace(Process.current(), pid=child.pid, started=_start_of(child.pid))
        assert process.alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert not process.alive()


def test_a_trial_has_one_worker(tmp_path, child):
    """A second worker is turned away and told who is at work."""
    with pytest.raises(BusyError, match=f"process {child.pid} on {socket.gethostname()} works on this since 20"):
        attempts.begin(tmp_path, driver=None)
    assert len(attempts.read(tmp_path)) == 1


def test_a_dead_workers_trial_is_taken_over(tmp_path, child):
    """After a kill -9 the next worker closes the attempt with the time until its last sign, and begins its own."""
    child.kill()
    child.wait()
    attempt = attempts.begin(tmp_path, driver=None)
    first, second = attempts.read(tmp_path)
    assert (first.outcome, second.outcome) == ("interrupted", None)
    assert 0 <= first.seconds < 60
    assert second == attempt
    assert second.number == 2


def test_a_replaced_worker_knows_it(tmp_path):
    """A worker that was taken for dead finds that it has a successor."""
    mine = attempts.begin(tmp_path, driver=None)
    assert not attempts.superseded(tmp_path, mine)
    attempts.end(tmp_path, mine, outcome="interrupted", seconds=1.0, cpu_seconds=0.5)
    attempts.begin(tmp_path, driver=None)
    assert attempts.superseded(tmp_path, mine)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Return an attempt of a machine that is not this one, on file, with leases that expire after a second."""
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.0)
    own = attempts.begin(tmp_path, driver=None)
    other = replace(own, worker=replace(own.worker, boot="another machine of the same name"))
    durable.write_json(tmp_path / "attempts" / "0001.json", asdict(other))
    return other


def test_a_worker_elsewhere_that_beats_is_alive_whatever_the_clocks_say(tmp_path, elsewhere):
    """Its process cannot be seen and its clock is an hour behind: the beat that grows is what counts."""
    heart, beat = lease.Heart(attempts.beat_file(tmp_path, 1)), 1
    heart.stop()

    def go_on():
        nonlocal beat
        while not ended.wait(0.2):
            beat += 1
            attempts.beat_file(tmp_path, 1).write_text(f"{beat} 0\n")
            an_hour_ago = time.time() - 3600
            os.utime(attempts.beat_file(tmp_path, 1), (an_hour_ago, an_hour_ago))

    ended = threading.Event()
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        with pytest.raises(BusyError, match="works on this since"):
            attempts.begin(tmp_path, driver=None)
    finally:
        ended.set()
        thread.join()


def test_a_silent_worker_elsewhere_is_replaced_after_the_lease_has_expired(tmp_path, elsewhere):
    """Nothing is taken over before the silence has lasted, by the waiting machine's own clock; then it is."""
    lease.Heart(attempts.beat_file(tmp_path, 1)).stop()
    tomorrow = time.time() + 86400
    os.utime(attempts.beat_file(tmp_path, 1), (tomorrow, tomorrow))
    began = time.monotonic()
    attempt = attempts.begin(tmp_path, driver=None)
    assert time.monotonic() - began >= lease.EXPIRY_SECONDS
    assert attempt.number == 2
    assert (attempts.read(tmp_path)[0].outcome, attempts.read(tmp_path)[0].failure) == ("interrupted", "worker_lost")
    assert attempts.superseded(tmp_path, elsewhere)


def test_one_look_shows_a_long_dead_worker_elsewhere(tmp_path, elsewhere):
    """`status` has no time to wait: files older than any difference between clocks speak for themselves."""
    lease.Heart(attempts.beat_file(tmp_path, 1)).stop()
    assert elsewhere.running(tmp_path)
    old = time.time() - lease.EXPIRY_SECONDS - lease.CLOCKS_DIFFER_SECONDS - 1
    for path in (attempts.beat_file(tmp_path, 1), tmp_path / "attempts" / "0001.json"):
        os.utime(path, (old, old))
    assert not elsewhere.running(tmp_path)


def test_a_damaged_attempt_counts_as_one_that_died(tmp_path):
    """A broken file neither blocks a trial nor hides that there was an attempt."""
    attempts.begin(tmp_path, driver=None)
    (tmp_path / "attempts" / "0001.json").write_text('{"format": 1, "wor')
    (first,) = attempts.read(tmp_path)
    assert first.outcome == "interrupted"
    assert attempts.begin(tmp_path, driver=None).number == 2
    assert durable.read_json(tmp_path / "attempts" / "0002.json") is not None


def _start_of(pid):
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])
