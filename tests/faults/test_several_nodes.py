"""A trial over two nodes by Ray Train, with gloo on CPUs: undisturbed, and with every fault that it must survive.

The head has no cores, as in cluster/kuberay.yaml. Faults are played with hashes for pictures and weights.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_drives import PATIENCE, Drive, wait_for
from nodes import Nodes, environment
from toys import STUDY, TINY, executed

from core.events import TrainingStarted
from workbench import attempts
from workbench.durable import EventReader
from workbench.ray_executor import measuring
from workbench.stopping import ask

pytestmark = pytest.mark.slow

OVER_TWO = STUDY.format(name="toy") + "execution: {nodes: 2, retries: 0}\n"


EVERY, STEPS = 4, 20  # of a toy trial: between its checkpoints, and in all
PLAN = {"nodes": 2, "seeds": 1, "variants": "plain"}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    """Return a cluster of two nodes with two cores each."""
    nodes = Nodes((0, 2, 2))
    yield nodes
    nodes.close()


@pytest.fixture
def start(two_nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Drive]]:
    """Return a starter of drivers of one toy trial over two nodes, always the same trial."""
    started: list[Drive] = []

    def make(**told: Any) -> Drive:
        told = {"executor": "ray", "off": ("node checks",), "steps": STEPS, "every": EVERY, **told}
        started.append(Drive(tmp_path, two_nodes.address, plan=PLAN, **told))
        return started[-1]

    yield make
    for drive in started:
        drive.end()


def under_way(drive: Drive, *, beyond: int = EVERY) -> None:
    """Wait until more steps than so many were executed."""
    wait_for(lambda: len(executed(drive.folders()[0])) > beyond)


def attempts_of(drive: Drive) -> list[tuple[str | None, str | None]]:
    """Return how each attempt at the trial ended."""
    return [(attempt.outcome, attempt.failure) for attempt in attempts.read(drive.folders()[0])]


def assert_finished(drive: Drive) -> None:
    """Let the trial end, and see that its record is whole and that no fault cost more than an interval."""
    seen = drive.wait()
    assert (seen["exit"], seen["states"]) == (0, ["finished"]), seen["told"]
    (steps,) = drive.steps_on_record()
    assert steps == list(range(1, max(steps) + 1))


def assert_no_process_left(drive: Drive) -> None:
    """Wait until no process lives that has executed steps of the trial; Ray ends them within seconds."""
    pids = {
        int(line.split()[1]) for log in drive.folders()[0].glob("steps*.log") for line in log.read_text().splitlines()
    }
    assert pids
    wait_for(lambda: not any(map(_is_of_ray, pids)))


def _is_of_ray(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")  # the number may have been given anew
    except OSError:
        return False


def run(study: Path, runs: Path, *options: str) -> str:
    """Run a tiny study with the real trainer; return what was told."""
    sets = [part for item in TINY for part in ("--set", item)]
    told = ["--seeds", "1", "--runs", str(runs), "--tracking-uri", "http://127.0.0.1:9", *sets, *options]
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "run", str(study), "--profile", "smoke", *told],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_trial_trains_on_two_nodes(two_nodes, tmp_path):
    """One process on each node trains the trial; its record, its losses and its score are those of a single process."""
    (tmp_path / "two.yaml").write_text(OVER_TWO)
    (tmp_path / "one.yaml").write_text(STUDY.format(name="toy"))
    told = run(tmp_path / "two.yaml", tmp_path / "two", "--address", two_nodes.address)
    assert "2 nodes with 4 cores and 0 GPUs can run trials: the same code" in told
    run(tmp_path / "one.yaml", tmp_path / "one", "--executor", "inline")
    folders = sorted((tmp_path / "two" / "trials").iterdir())
    assert [folder.name for folder in folders] == sorted(path.name for path in (tmp_path / "one" / "trials").iterdir())
    for folder in folders:
        other = tmp_path / "one" / "trials" / folder.name
        assert [attempt.outcome for attempt in attempts.read(folder)] == ["finished"]
        results = [json.loads((place / "result.json").read_text()) for place in (folder, other)]
        assert results[0]["step"] == results[1]["step"] > 0
        assert results[0]["provenance"]["world_size"] == 2
        assert results[0]["provenance"]["nodes"] == 2
        assert results[1]["provenance"]["world_size"] == 1
        events = [[item.event for item in EventReader(place / "events.jsonl").poll()] for place in (folder, other)]
        assert sum(isinstance(event, TrainingStarted) for event in events[0]) == 1
        last = [next(event for event in told[::-1] if hasattr(event, "metrics")) for told in events]
        assert last[0].losses["total"] == pytest.approx(last[1].losses["total"], rel=1e-3)
        assert {path.parent.name for path in folder.glob("evaluations/*/metrics.json")}


def test_one_process_that_fails_ends_the_attempt_of_all(start):
    """An error, and a kill -9, of one process are told as what they were, and tried again from the checkpoint."""
    drive = start(poisons=[{"kind": "raise", "step": 7}, {"kind": "kill", "step": 11}], victim=1)
    assert_finished(drive)
    assert attempts_of(drive) == [("failed", "error"), ("failed", "worker_lost"), ("finished", None)]
    assert 0 < len(executed(drive.folders()[0])) - STEPS <= 2 * EVERY
    assert_no_process_left(drive)


def test_a_pause_and_a_ctrl_c_reach_all_processes(start):
    """Each of them ends the processes with a checkpoint; what was asked to pause goes on when it may."""
    drive = start(steps=400, seconds=0.1)
    under_way(drive)
    (folder,) = drive.place.glob("runs/studies/*/*/*/")
    ask(attempts.wish_file(folder, 1), "pause")
    wait_for(lambda: "Paused, with no trial at work" in drive.told())
    assert_no_process_left(drive)
    done = len(executed(drive.folders()[0]))
    ask(attempts.wish_file(folder, 1), None)
    under_way(drive, beyond=done + EVERY)
    drive.process.send_signal(signal.SIGINT)
    assert drive.wait()["exit"] == 130, drive.told()
    assert attempts_of(drive) == [("interrupted", None)] * 2
    assert executed(drive.folders()[0]) == list(range(1, len(executed(drive.folders()[0])) + 1))
    assert_no_process_left(drive)


def test_a_killed_driver_takes_all_processes_along(start):
    """After kill -9 of the driver no process trains on, and the same command ends what was begun."""
    drive = start(seconds=0.2)
    under_way(drive)
    drive.end()
    assert_no_process_left(drive)
    assert len(executed(drive.folders()[0])) < STEPS
    again = start()
    assert_finished(again)
    assert attempts_of(again)[-1] == ("finished", None)
    assert len(executed(drive.folders()[0])) - STEPS <= EVERY


def test_a_trial_that_has_lost_a_node_waits_for_another_one(start, two_nodes):
    """It goes on from its checkpoint where a node comes; while it waits it can be stopped in good order."""
    drive = start(steps=400, seconds=0.1)
    under_way(drive)
    two_nodes.kill(1)
    wait_for(lambda: len(attempts_of(drive)) == 2)
    done = len(executed(drive.folders()[0]))
    two_nodes.add(cores=2)
    under_way(drive, beyond=done + EVERY)
    two_nodes.kill(2)
    wait_for(lambda: len(attempts_of(drive)) == 3)
    drive.process.send_signal(signal.SIGTERM)
    assert drive.wait()["exit"] == 143, drive.told()
    (first, second, last) = attempts_of(drive)
    assert (first[1], second[1], last) == ("worker_lost", "worker_lost", ("interrupted", None))
    (steps,) = drive.steps_on_record()
    assert steps == list(range(1, len(steps) + 1))
    assert_no_process_left(drive)


def test_a_node_with_a_gpu_is_what_measures(two_nodes, tmp_path, monkeypatch):
    """What needs a GPU is measured on the node that has one, each work in a process of its own; one that dies is told.

    The GPU is only said to be there.
    """
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    two_nodes.add(cores=1, gpus=1)
    with measuring.processes(two_nodes.address, cores=1, gpus=1.0, log=tmp_path / "log") as pool:
        shown, first, second = (pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES"), *(pool.submit(os.getpid) for _ in "12"))
        assert shown.result() == "0"
        assert first.result() != second.result()
        with pytest.raises(RuntimeError, match=r"on a node of the cluster: OSError: .*Invalid argument"):
            pool.submit(os.kill, 0, 99).result()
        with pytest.raises(RuntimeError, match="on a node of the cluster: WorkerCrashedError"):
            pool.submit(os._exit, 3).result()
