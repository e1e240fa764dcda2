"""What is computed once for all trials, on file systems with locks and without."""

import errno
import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from core.data import cached
from core.data.cached import written_once


def _fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "array.npy").write_bytes(b"whole")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_two_that_compute_at_once_without_locks_do_no_harm(tmp_path, monkeypatch, number):
    """Where no lock is to be had each computes, one result stays, and nothing half-written is left."""

    def no_locks(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    both = Barrier(2)

    def write(folder):
        both.wait(timeout=10)  # neither has begun before the other has
        _fill(folder)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: written_once(tmp_path / "data", write), range(2)):
            pass
    assert (tmp_path / "data" / "array.npy").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data"]


def test_a_lock_that_nobody_lets_go_of_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """After the longest time that computing can take, a process computes for itself; the holder's draft stays."""
    monkeypatch.setattr(cached, "LONGEST_WAIT_SECONDS", 0.3)
    draft = tmp_path / ".data.writing-of-the-holder"
    draft.mkdir()
    with (tmp_path / ".data.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        written_once(tmp_path / "data", _fill)
    assert (tmp_path / "data" / "array.npy").read_bytes() == b"whole"
    assert draft.exists()


def test_who_waits_takes_what_the_holder_made(tmp_path):
    """Once the file is there, it is not waited for the lock any longer, and nothing is computed again."""
    with (tmp_path / ".data.lock").open("w") as held, ThreadPoolExecutor(1) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(written_once, tmp_path / "data", lambda _: pytest.fail("computed again"))
        _fill(tmp_path / "data")
        waiting.result(timeout=10)


def test_an_error_that_is_no_race_is_told(tmp_path, monkeypatch):
    """When the result cannot be put in its place, and nobody else has, the error reaches the caller."""

    def refuse(self, _target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        written_once(tmp_path / "data", _fill)
