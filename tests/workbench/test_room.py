"""A cluster that has lost the nodes that trials fit on, and a disk that is full: the user is told where."""

import errno
import shutil
from types import SimpleNamespace

import pytest

from workbench.errors import WorkbenchError
from workbench.placement import Demand, Machine
from workbench.ray_executor import session
from workbench.ray_executor.room import PATIENCE_SECONDS, TOLD_AFTER_SECONDS, TOLD_AGAIN_SECONDS, Room

LARGE, SMALL = Machine(name="large", cores=8, gpus=0), Machine(name="small", cores=2, gpus=0)


class Watched:
    """A check of room for trials of four threads, with a clock and nodes that a test sets."""

    def __init__(self):
        self.now, self.nodes, self.told = 1000.0, [LARGE, SMALL], []
        demand = Demand(device="cpu", threads=4)
        self._room = Room(demand, tell=self.told.append, nodes=lambda: self.nodes, clock=lambda: self.now)

    def after(self, seconds):
        """Return the reason to stop that the check gives so much later."""
        self.now += seconds
        return self._room.check()


@pytest.fixture
def watched():
    """Return a check with two nodes, of which trials fit on one."""
    return Watched()


def test_a_cluster_with_room_is_not_told_of(watched):
    """Nothing is said while a trial fits on a node, nor where one is back before long."""
    assert watched.after(0) is None
    watched.nodes = [SMALL]
    assert watched.after(1) is None
    assert watched.after(TOLD_AFTER_SECONDS - 1) is None
    watched.nodes = [SMALL, LARGE]
    assert watched.after(1) is None
    assert watched.told == []


def test_waiting_is_told_rarely_with_what_is_asked_for_and_what_there_is(watched):
    """After a minute a line says what trials need, what the nodes have and for how long; it comes again rarely."""
    watched.nodes = [SMALL]
    assert watched.after(0) is None
    assert watched.after(TOLD_AFTER_SECONDS) is None
    (line,) = watched.told
    assert line == (
        "Waiting for a node: no trial fits on what is left of the cluster (it asks for 4 cores on one machine; there "
        "is small: 2 cores, 0 GPUs). In 59 min 00 s the study stops by itself."
    )
    assert watched.after(TOLD_AGAIN_SECONDS - 1) is None
    assert len(watched.told) == 1
    watched.after(1)
    assert len(watched.told) == 2
    watched.nodes = []
    watched.after(TOLD_AGAIN_SECONDS)
    assert "there is no machine" in watched.told[-1]
    watched.nodes = [LARGE]
    assert watched.after(1) is None
    assert watched.told[-1] == "A trial fits on the cluster again."
    watched.after(1)
    assert len(watched.told) == 4


def test_a_study_does_not_wait_for_ever(watched):
    """After an hour without room in a row the study is asked to stop, with the reason."""
    watched.nodes = [SMALL]
    assert watched.after(0) is None
    assert watched.after(PATIENCE_SECONDS - 1) is None
    watched.nodes = [LARGE]
    assert watched.after(1) is None
    watched.nodes = [SMALL]
    assert watched.after(1) is None
    assert watched.after(PATIENCE_SECONDS - 1) is None
    reason = watched.after(1)
    assert reason.startswith("Stopped: no trial fits on what is left of the cluster (it asks for 4 cores")
    assert reason.endswith("for 1 h 00 min now")


@pytest.mark.parametrize(("free", "told"), [(4096, WorkbenchError), (10**10, OSError)])
def test_a_full_disk_of_rays_session_is_not_taken_for_that_of_the_records(tmp_path, monkeypatch, free, told):
    """What the system refuses without naming a file is told of the disk that is full."""
    node = SimpleNamespace(get_session_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(session.worker, "_global_node", node)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(told) as caught, session._full_disk_in_words():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value).startswith(f"{tmp_path}: no space left on the disk where Ray") == (told is WorkbenchError)
