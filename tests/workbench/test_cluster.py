"""What is said of a cluster before trials: who cannot run any and why, and what differs. Ray itself: tests/faults."""

import os
import signal
from unittest import mock

import pytest

from core import numerics
from workbench import provenance
from workbench.errors import WorkbenchError
from workbench.placement import Demand, Machine
from workbench.ray_executor import cluster, probe
from workbench.stopping import StopNow

NODES = {"a1": Machine(name="a (10.0.0.1, node a1)", cores=8, gpus=2), "b2": Machine(name="b", cores=4, gpus=0)}


def answer(**changed):
    """Return what a sound node answers."""
    return {
        "problems": [],
        "code_hash": provenance.code_hash(),
        "numerics": numerics.VERSION,
        "versions": {name: probe.version(name) for name in ("ray", *provenance.LIBRARIES)},
        "clock": (0.01, 0.02),
        **changed,
    }


def test_a_signal_while_ray_starts_keeps_its_exit_code(monkeypatch):
    """Ray takes SIGTERM before anything else, and answers it with `sys.exit(15)`: that is a stop, and no error."""
    monkeypatch.setattr(cluster, "listen_to_others", mock.Mock())
    monkeypatch.setattr(cluster.ray, "init", mock.Mock(side_effect=SystemExit(signal.SIGTERM)))
    for address in (None, "10.0.0.1:6379"):
        with pytest.raises(StopNow) as raised:
            cluster.join(address)
        assert raised.value.signal == signal.SIGTERM


def test_the_handler_of_sigterm_is_the_callers_again_once_ray_is_there(monkeypatch):
    """Ray sets its own when it starts, and never gives it back."""
    monkeypatch.setattr(cluster, "listen_to_others", mock.Mock())
    monkeypatch.setattr(cluster.ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    before = signal.getsignal(signal.SIGTERM)
    cluster.join(None)
    assert signal.getsignal(signal.SIGTERM) == before != signal.SIG_IGN


def questions(folder, **changed):
    """Return what this machine is asked about itself."""
    (folder / "token").write_text("a word")
    return {
        "code": "/workbench",
        "libraries": ("torch",),
        "token": str(folder / "token"),
        "answer": str(folder / "answer"),
        "data": [],
        "weights": [],
        **changed,
    }


def test_sound_nodes_are_told_in_one_line():
    """Nothing to refuse, nothing to warn of."""
    answers = {"a1": answer(), "b2": answer()}
    cluster._refuse(NODES, answers)
    assert list(cluster._differences(NODES, answers)) == []
    assert cluster._told(NODES, answers).startswith("2 nodes with 12 cores and 2 GPUs can run trials")


def test_every_node_with_other_code_or_a_problem_is_named():
    """One line each, with the remedy, and a last one that says that nothing was started."""
    answers = {
        "a1": answer(code_hash="0ther"),
        "b2": answer(problems=["lacks a disk: buy one", "is far away: move it"]),
    }
    with pytest.raises(WorkbenchError) as caught:
        cluster._refuse(NODES, answers)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("a (10.0.0.1, node a1) has other code (core 0ther, numerics ")
    assert lines[0].endswith("install this version there, or run from there")
    assert lines[1:3] == ["b lacks a disk: buy one", "b is far away: move it"]
    assert lines[3] == "These nodes could not run a trial, so none was started."


def test_two_nodes_of_one_host_are_two_nodes():
    """What tells nodes apart is not their host's name."""
    nodes = {name: Machine(name=f"host (10.0.0.1, node {name})", cores=1, gpus=0) for name in ("a1", "b2")}
    found = answer(problems=["lacks a disk: buy one"])
    with pytest.raises(WorkbenchError, match="These nodes could not run a trial"):
        cluster._refuse(nodes, {"a1": found, "b2": found})
    with pytest.raises(WorkbenchError, match="This node could not run a trial"):
        cluster._refuse(nodes, {"a1": found, "b2": answer()})


def test_other_versions_and_clocks_are_warnings():
    """Each with the node, what it has and what is here; a clock only beyond what is known of it."""
    versions = answer()["versions"] | {"torch": "1.0"}
    answers = {"a1": answer(versions=versions), "b2": answer(clock=(-7.5, 0.3))}
    torch, clock = cluster._differences(NODES, answers)
    assert torch.startswith("a (10.0.0.1, node a1) has torch 1.0, here it is ")
    assert clock.startswith("the clock of b is 7.5 s behind this one")
    assert list(cluster._differences(NODES, {"a1": answer(clock=(9.0, 20.0))})) == []


def test_only_nodes_that_may_get_trials_are_asked():
    """A head without cores, and a node without GPUs where trials need one, get none.

    Of a trial over several nodes the supervisor may come to any node with a core.
    """
    on_gpu = Demand(device="cuda", threads=4, gpus=1.0)
    assert [cluster._may_get_trials(machine, on_gpu) for machine in NODES.values()] == [True, False]
    on_three = Demand(device="cuda", threads=1, processes=3, gpus=1.0)
    assert not any(cluster._may_get_trials(machine, on_three) for machine in NODES.values())
    over_two = Demand(device="cuda", threads=8, nodes=2, gpus=1.0)
    assert all(cluster._may_get_trials(machine, over_two) for machine in NODES.values())
    head = Machine(name="head", cores=0, gpus=0)
    assert not cluster._may_get_trials(head, Demand(device="cpu", threads=1))
    assert not cluster._may_get_trials(head, over_two)


def test_this_machine_can_run_trials(tmp_path):
    """The question that nodes are asked, asked here: nothing is missing, and the token came back as trials write."""
    found = probe.probe(questions(tmp_path))
    assert found["problems"] == []
    assert (tmp_path / "answer").read_text() == "a word"
    assert (found["code_hash"], found["numerics"]) == (provenance.code_hash(), numerics.VERSION)


def test_what_a_node_lacks_is_named_with_the_remedy(tmp_path, coco_folder, toy_plan):
    """A folder that is not shared, other pictures, missing weights."""
    from core.config import CocoFolder

    data = CocoFolder(kind="coco")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"short")
    asked = questions(
        tmp_path,
        token=str(tmp_path / "elsewhere"),
        data=[(data, str(coco_folder), "coco-0"), (data, str(tmp_path / "none"), "coco-0")],
        weights=[(str(weights), 100), (str(tmp_path / "none.pth"), 7)],
    )
    shared, other, none, short, missing = probe.probe(asked)["problems"]
    assert "does not share the runs folder" in shared
    assert "mount the runs folder at the same path on every node" in shared
    assert "holds other pictures in" in other
    assert "the driver coco-0): put the same folder at" in other
    assert "cannot read the pictures" in none
    assert "5 bytes, the driver's has 100" in short
    assert "no such file" in missing


def test_a_token_leaves_nothing(tmp_path):
    """The folder of the check is gone whatever was written into it."""
    with cluster._token(tmp_path) as token:
        token.with_name("node").write_text(cluster._text(token))
        assert len(cluster._text(token)) == 32
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a name is enough


@pytest.mark.parametrize("address", ["ray://head:10001", "nowhere"])
def test_an_address_where_nobody_is(address):
    """Ray Client and an address without a cluster are refused with what to do instead."""
    with pytest.raises(WorkbenchError, match=rf"--address {address}: .*(ray job submit|leave --address out)"):
        cluster.join(address)
