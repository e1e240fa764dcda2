"""Faults of disks that are full. Without Ray."""

import errno
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Seen, cases
from small_disk import on_a_small_disk
from toys import CheckpointToy, ToyTrainer, executed, run_toy, toy_plan

from core.checkpoint_files import path_of, sha256, sidecar_of
from workbench import disk
from workbench.errors import WorkbenchError
from workbench.store import Store

PAGES_LEFT = [0, 2, 6, 12, 20, 32, 48]


def _disk_full_in_a_trial(place: Path, *, protected: bool) -> Seen:
    """The disk is full when a checkpoint of one seed is written, until somebody makes room."""
    import torch

    from core import checkpoint as own

    plan, store = toy_plan(place), Store(place / "runs")
    struck = [trial.trial_id for trial in plan.trials if trial.seed == 1]
    save = torch.save

    def full(state: Any, file: Any) -> None:
        if state["step"] >= 8 and any(name in file.name for name in struck):
            file.write(b"some of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        if not protected:
            patch.setattr(own, "save_checkpoint", _save_in_place)
        code, _, _ = run_toy(plan, store, CheckpointToy(), inline=True)
    failed = [store.record(name) for name in struck]
    parts = [path.name for path in store.root.rglob("*.tmp")]
    before = [len(executed(store.trial_dir(name))) for name in struck]
    again, _, _ = run_toy(plan, Store(store.root), CheckpointToy(), inline=True)
    return {
        "exit": code,
        "others finished": sum(store.state(trial.trial_id) == "finished" for trial in plan.trials if trial.seed == 0),
        "classes": [(record.error or {}).get("class") for record in failed],
        "parts": parts,
        "exit with room": again,
        "went on at": [executed(store.trial_dir(name))[count] for name, count in zip(struck, before, strict=True)],
    }


def _save_in_place(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save as one would without thinking of full disks: one file, overwritten."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step_*"):
        old.unlink()
    path = path_of(folder, step)
    with path.open("wb") as file:
        torch.save({"format": 1, "step": step, **state}, file)
    sidecar_of(path).write_text(sha256(path))
    return path


def _verify_disk_full_in_a_trial(seen: Seen) -> None:
    assert seen["exit"] == 1
    assert seen["others finished"] == 2
    assert seen["classes"] == ["io", "io"]
    assert seen["parts"] == []
    assert seen["exit with room"] == 0
    assert seen["went on at"] == [5, 5]


def _no_room_before_the_start(place: Path, *, protected: bool) -> Seen:
    """Less is free than the trials will write."""
    plan, store = toy_plan(place), Store(place / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda _folder: disk.RESERVE_BYTES + 2**20)
        if not protected:
            patch.setattr(disk, "check_room", lambda *_, **__: None)
        try:
            run_toy(plan, store, ToyTrainer(), inline=True)
            said = ""
        except WorkbenchError as error:
            said = str(error)
    return {"said": said, "begun": (store.root / "trials").exists()}


def _verify_no_room_before_the_start(seen: Seen) -> None:
    assert "4 trials to run will write about" in seen["said"]
    assert "make room, name another folder with --runs" in seen["said"]
    assert not seen["begun"]


def _room_runs_out(place: Path, *, protected: bool) -> Seen:
    """Free space falls below the reserve while trials run."""
    plan, store = toy_plan(place), Store(place / "runs")
    with pytest.MonkeyPatch.context() as patch:
        free = disk.free_bytes
        patch.setattr(disk, "WATCH_SECONDS", 0.05 if protected else 3600)
        started = [100 * 2**30]
        patch.setattr(disk, "free_bytes", lambda _folder: started.pop() if started else 1000)
        code, _, said = run_toy(plan, store, ToyTrainer(seconds=0.05), inline=True)
        patch.setattr(disk, "free_bytes", free)
        states = {store.state(trial.trial_id) for trial in plan.trials}
        again, _, _ = run_toy(plan, Store(store.root), ToyTrainer(), inline=True)
    repeated = max(len(executed(store.trial_dir(name))) for name in plan.specs) - 12
    lines = [line for line in said.splitlines() if "are to stay free: stopping" in line]
    return {"exit": code, "lines": len(lines), "states": sorted(states), "then": again, "steps again": repeated}


def _verify_room_runs_out(seen: Seen) -> None:
    assert seen["exit"] == 128 + signal.SIGTERM
    assert seen["lines"] == 1
    assert "failed" not in seen["states"]
    assert (seen["then"], seen["steps again"]) == (0, 0)


def _really_full(place: Path, *, protected: bool) -> Seen:
    """A file system of some megabytes is full in the middle of a trial, at one place after the other."""
    small, script = place / "small", Path(__file__).with_name("small_disk.py")
    command = [
        sys.executable,
        *map(str, (script, place, small, PAGES_LEFT if protected else [2])),
        "on" if protected else "off",
    ]
    told = on_a_small_disk(small, 16, *command)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def _verify_really_full(seen: Seen) -> None:
    assert set(seen["then"]) == {"0 finished"}
    assert seen["untold"] == []
    assert seen["repeated"] <= 4  # one interval
    assert (seen["other weights"], seen["left over"]) == (0, [])


test_fault, test_control = cases(
    Fault(
        number="F12",
        title="disk full while a checkpoint is written",
        expected="failed (io), the others finish, the older checkpoint goes on",
        scenario=_disk_full_in_a_trial,
        verify=_verify_disk_full_in_a_trial,
    ),
    Fault(
        number="F12b",
        title="no room before the start",
        expected="refused with what is needed and free, nothing begun",
        scenario=_no_room_before_the_start,
        verify=_verify_no_room_before_the_start,
    ),
    Fault(
        number="F12c",
        title="room runs out during a run",
        expected="stopped in good order, one line, no step again",
        scenario=_room_runs_out,
        verify=_verify_room_runs_out,
    ),
    Fault(
        number="F12d",
        title="a real file system is full in the middle of a trial, at many places",
        expected="told with its reason; with room the same command finishes, one interval again at most, no leftovers",
        scenario=_really_full,
        verify=_verify_really_full,
    ),
)
