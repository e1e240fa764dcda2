"""Faults of a cluster: nodes that cannot run trials, trials that fit nowhere, nodes and heads that die.

A cluster takes long to start, so one serves all of them, in three acts. Each act plays the faults with and without
their protection side by side, once; the tests look at what came of it. Pictures are hashes: only Ray is the subject.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cluster_drives import Drive, wait_for
from faults import Fault, Seen, cases
from nodes import Nodes
from toys import executed

from workbench import attempts
from workbench.trial import complete

STEPS, EVERY, GATE = 20, 4, 11  # of a trial, between its checkpoints, and where it waits for what is to happen
_drives: list[Drive] = []
_stage: list[Any] = []  # the folder of all that is played, and the cluster once it is there


@pytest.fixture(scope="module", autouse=True)
def stage() -> Iterator[None]:
    """Give the acts a folder and a cluster, and take both away in the end."""
    with TemporaryDirectory() as folder:
        _stage.append(Path(folder))
        yield
        for drive in _drives:
            drive.end()
        _drives.clear()
        for found in _stage[1:]:
            found.close()
        _stage.clear()
        for act in (refused, node_killed, head_killed):
            act.cache_clear()


def nodes() -> Nodes:
    """Return the cluster: two nodes of one core each, and what the acts add."""
    if len(_stage) == 1:
        _stage.append(Nodes((1, 1)))
    return _stage[1]


def start(name: str, *, off: tuple[str, ...] = (), executor: str = "ray", **plan: Any) -> Drive:
    """Start a driver of the toy study in a folder of its own."""
    told = {"off": off, "executor": executor, "steps": STEPS, "every": EVERY, "gate": GATE}
    _drives.append(Drive(_stage[0] / name, nodes().address, plan=plan, **told))
    return _drives[-1]


def at_gate(drive: Drive) -> list[attempts.Attempt]:
    """Return the attempts of a driver's trials that wait, between two checkpoints."""
    tried = [attempts.read(folder) for folder in drive.folders()]
    return [
        some[-1]
        for some, folder in zip(tried, drive.folders(), strict=True)
        if some and some[-1].running(folder) and len(executed(folder)) == GATE - 1
    ]


# Act 1: what is refused before it starts


@cache
def refused() -> dict[str, dict[bool, Seen]]:
    """Play a node that cannot import torch, GPUs that are not there, and more threads than any one node has."""
    broken = _stage[0] / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    node = nodes().add(cores=2, path=broken)
    unchecked = ("node checks", "resource checks")
    endless = {"F26": start("gpus_off", off=unchecked, gpus=2), "F26b": start("threads_off", off=unchecked, threads=4)}
    refusing = {"F26": start("gpus_on", gpus=2), "F26b": start("threads_on", threads=4), "F27": start("import_on")}
    found = {number: {True: drive.wait()} for number, drive in refusing.items()}
    only_there = start("import_off", off=("node checks",), threads=2, seeds=1)  # no other node has two cores
    found["F27"][False] = only_there.wait(20.0)  # it fails, or waits for a first trial that never takes a step
    for number, drive in endless.items():
        found[number][False] = drive.wait(1.0)
    nodes().kill(node)
    return found


def _refused(number: str, named: str) -> Callable[..., Seen]:
    def scenario(_place: Path, *, protected: bool) -> Seen:
        seen = refused()[number][protected]
        return {"exit": seen["exit"], "states": seen["states"], "named": seen["told"].count(named)}

    return scenario


def _verify_refused(seen: Seen) -> None:
    assert seen["exit"] == 2
    assert set(seen["states"]) == {"pending"}
    assert seen["named"] == 1  # and no other node


# Act 2: three nodes, one killed


@cache
def node_killed() -> dict[bool, Seen]:
    """Play two studies on three nodes, one of which dies under a trial of each."""
    victim = nodes().add(cores=6)
    # Only the victim has two cores: both trials without retries are there, and two of the four with them.
    without = start("node_off", off=("node checks", "retries"), threads=2, seeds=1)
    wait_for(lambda: list(without.place.glob("runs/studies/*/*/*/ray/*-*/")))  # Tune has begun: it gets its place first
    with_retries = start("node_on", off=("node checks",))
    wait_for(lambda: (len(at_gate(with_retries)), len(at_gate(without))) == (4, 2))
    nodes().kill(victim)
    wait_for(lambda: len(at_gate(with_retries)) == 2 and not at_gate(without))
    for drive in (without, with_retries):
        drive.open_gate()
    found: dict[bool, Seen] = {}
    for protected, drive in ((True, with_retries), (False, without)):
        seen = drive.wait()
        found[protected] = {
            "exit": seen["exit"],
            "states": seen["states"],
            "attempts": sorted(len(attempts.read(folder)) for folder in drive.folders()),
            "complete": [complete(drive.store.record(spec.trial_id), spec) for spec in drive.plan.specs.values()],
            "steps again": [len(executed(folder)) - STEPS for folder in drive.folders()],
            "steps on record": drive.steps_on_record(),
        }
    return found


def _node_killed(_place: Path, *, protected: bool) -> Seen:
    return node_killed()[protected]


def _verify_node_killed(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert set(seen["states"]) == {"finished"}
    assert seen["attempts"] == [1, 1, 2, 2]
    assert all(seen["complete"])
    assert all(steps == list(range(1, STEPS + 1)) for steps in seen["steps on record"])
    assert all(0 <= again <= EVERY for again in seen["steps again"])


# Act 3: the head killed


@cache
def head_killed() -> Seen:
    """Play a study whose cluster loses its head; return how its driver ended."""
    drive = start("head", off=("node checks",), seeds=1)
    wait_for(lambda: len(at_gate(drive)) == 2)
    nodes().kill_gcs()
    seen = drive.wait()
    wait_for(lambda: not at_gate(drive))  # no trial trains on, unseen
    drive.open_gate()
    return {"died": seen["exit"] != 0, "states": seen["states"], "place": drive.place}


def _head_killed(place: Path, *, protected: bool) -> Seen:
    """Go on with what was left behind, by the same command without the cluster; the control lost its checkpoints."""
    before = head_killed()
    name = "head_on" if protected else "head_off"
    shutil.copytree(before["place"], _stage[0] / name)
    if not protected:
        for checkpoint in (_stage[0] / name).glob("runs/trials/*/checkpoints/*"):
            checkpoint.unlink()
    drive = start(name, executor="inline", seeds=1)
    seen = drive.wait()
    return {
        "died": before["died"],
        "exit": seen["exit"],
        "states": seen["states"],
        "steps again": [len(executed(folder)) - STEPS for folder in drive.folders()],
        "steps on record": drive.steps_on_record(),
    }


def _verify_head_killed(seen: Seen) -> None:
    assert seen["died"]
    assert (seen["exit"], set(seen["states"])) == (0, {"finished"})
    assert all(steps == list(range(1, STEPS + 1)) for steps in seen["steps on record"])
    assert all(0 <= again <= EVERY for again in seen["steps again"])


test_fault, test_control = cases(
    Fault(
        number="F26",
        title="GPUs that no node has",
        expected="exit 2 before anything starts, what is asked for and what is there named",
        scenario=_refused("F26", "execution.gpus is 2"),
        verify=_verify_refused,
    ),
    Fault(
        number="F26b",
        title="more threads than any one node has",
        expected="as F26, though all nodes together have them",
        scenario=_refused("F26b", "a trial asks for 4 cores on one machine, which is nowhere free"),
        verify=_verify_refused,
    ),
    Fault(
        number="F27",
        title="a node cannot import what trials need",
        expected="exit 2 before anything starts, the node and the remedy named",
        scenario=_refused("F27", "cannot import the workbench (ModuleNotFoundError: No module named 'torch'"),
        verify=_verify_refused,
    ),
    Fault(
        number="F10",
        title="three nodes, one killed",
        expected="the study ends, its trial goes on elsewhere, records complete, each step on record once",
        scenario=_node_killed,
        verify=_verify_node_killed,
    ),
    Fault(
        number="F11",
        title="the head of the cluster killed",
        expected="the driver dies; the same command loses one checkpoint interval at most",
        scenario=_head_killed,
        verify=_verify_head_killed,
    ),
)
