"""Who works on a trial, and what becomes of it when they die."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from workbench import attempts, durable
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
    with pytest.raises(BusyError, match=f"process {child.pid} on {socket.gethostname()} works on this trial since 20"):
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


def test_a_worker_on_another_host_is_judged_by_its_last_sign(tmp_path):
    """Its process cannot be seen from here, so its files speak: silent for long means dead."""
    attempt = attempts.begin(tmp_path, driver=None)
    elsewhere = replace(attempt, worker=replace(attempt.worker, host="elsewhere"))
    assert elsewhere.running(tmp_path)
    old = (datetime.now(UTC) - timedelta(seconds=attempts.HEARTBEAT_SECONDS + 1)).timestamp()
    os.utime(tmp_path / "attempts" / "0001.json", (old, old))
    assert not elsewhere.running(tmp_path)
    (tmp_path / "events.jsonl").touch()
    assert elsewhere.running(tmp_path)


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
