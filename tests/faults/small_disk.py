"""A toy study on a file system of a few megabytes that is full for a while: a process in a mount namespace of its own.

The disk is filled in the middle of a trial but for some pages, which decides where the first write fails: in an event,
a checkpoint, its checksum, the scores, the result, or what the driver itself writes. Then there is room again.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import CheckpointToy, executed, run_toy, toy_plan

from core import checkpoint
from core.checkpoint_files import PassedOver, path_of, sha256, sidecar_of
from workbench import disk
from workbench.errors import WorkbenchError
from workbench.store import Store
from workbench.study import Plan

ROOT = Path(__file__).parents[2]
PAGE = 4096
FULL_AT = 6  # a step between the first checkpoint and the second
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_a_small_disk(folder: Path, megabytes: int, *command: str) -> "subprocess.CompletedProcess[str]":
    """Call a command that sees a new file system of that size at `folder`, which goes with it; skip where none can be.

    In a user namespace this takes no rights, where the system allows those.
    """
    if shutil.which("unshare") is None:
        pytest.skip("no small file system can be mounted here: there is no unshare")
    folder.mkdir(exist_ok=True)
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", MOUNT, "sh"]
    alone += [f"{megabytes}m", str(folder)]
    tried = subprocess.run([*alone, "true"], check=False, capture_output=True, text=True, timeout=30)
    if tried.returncode:
        pytest.skip(f"no small file system can be mounted here: {tried.stderr.strip()}")
    paths = [str(ROOT), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*alone, *command], check=False, capture_output=True, text=True, timeout=300, env=environment)


def _save_without_care(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save as one would without thinking of full disks, under the name that counts. For the control."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    with path.open("wb") as file:
        torch.save({"format": 1, "step": step, **state}, file)
    sidecar_of(path).write_text(sha256(path))
    return path


@dataclass(kw_only=True)
class Filling(CheckpointToy):
    """Fills its disk but for so many bytes, at one step of seed 1; its checkpoints take ten pages."""

    ballast: Path
    left: int

    def _struck(self, step: int, seed: int) -> bool:
        if step == FULL_AT and seed == 1 and not self.ballast.exists():
            fill(self.ballast, left=self.left)
        return super()._struck(step, seed)

    def _save(self, checkpoints: Path, state: dict[str, Any]) -> Path:
        return super()._save(checkpoints, {**state, "weights": state["weights"].ljust(10 * PAGE)})

    def _load(
        self, checkpoints: Path, on_passed_over: Callable[[PassedOver], None]
    ) -> tuple[dict[str, Any], Path] | None:
        found = super()._load(checkpoints, on_passed_over)
        return found and ({**found[0], "weights": found[0]["weights"].rstrip()}, found[1])


def fill(ballast: Path, *, left: int) -> None:
    """Write until so many bytes are free."""
    with ballast.open("wb", buffering=0) as file:
        while (room := shutil.disk_usage(ballast.parent).free - left) > 0:
            file.write(bytes(min(room, 1 << 20)))


def main(folder: Path, small: Path, lefts: list[int], *, protected: bool) -> dict[str, Any]:
    """Run the study once for each number of pages that are left, and once more with room; return what was seen."""
    disk.check_room = lambda *_, **__: None  # this disk is smaller than what is to stay free
    disk.RESERVE_BYTES = 0
    disk._PATIENCE_SECONDS = 0.2
    if not protected:
        checkpoint.save_checkpoint = _save_without_care
    plan = toy_plan(folder)
    plain = Filling(ballast=folder / "study.yaml", left=0)  # a file that is there: it fills nothing
    plain.ballast.touch()
    whole, _, _, _ = _run(plan, folder / "whole", plain)
    assert whole == 0
    weights = _weights(plan, Store(folder / "whole"))
    seen: dict[str, Any] = {"first": {}, "then": {}, "untold": [], "repeated": 0, "other weights": 0, "left over": []}
    for left in lefts:
        runs, ballast = small / f"runs-{left}", small / "ballast"
        code, told, states, _ = _run(plan, runs, Filling(ballast=ballast, left=left * PAGE))
        _count(seen["first"], f"{code} {states}")
        if code != 0 and "no space left on device" not in told.lower():
            seen["untold"].append((left, told))
        ballast.unlink()
        code, told, states, repeated = _run(plan, runs, plain)
        _count(seen["then"], f"{code} {states}")
        seen["repeated"] = max(seen["repeated"], repeated)
        seen["other weights"] += _weights(plan, Store(runs)) != weights
        seen["left over"] += sorted(path.name for path in runs.rglob("*") if _is_left_over(path.name))
        shutil.rmtree(runs)
    return seen


def _run(plan: Plan, runs: Path, trainer: CheckpointToy) -> tuple[int, str, str, int]:
    """Run in a process of its own, as each command is one; see `_driver`."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_driver, plan, runs, trainer).result(timeout=60)


def _driver(plan: Plan, runs: Path, trainer: CheckpointToy) -> tuple[int, str, str, int]:
    """Return the exit code, what was told, the states of the trials, and how many steps an attempt took again."""
    try:
        code, _, told = run_toy(plan, Store(runs), trainer, inline=True)
    except WorkbenchError as error:
        code, told = error.exit_code, str(error)
    store = Store(runs)
    states = sorted({store.state(trial.trial_id) for trial in plan.trials})
    steps = [executed(store.trial_dir(name)) for name in plan.specs]
    repeated = [before - after + 1 for taken in steps for before, after in pairwise(taken) if after <= before]
    return code, told, "/".join(states), max(repeated, default=0)


def _weights(plan: Plan, store: Store) -> list[Any]:
    return [(store.result(trial.trial_id) or {}).get("weights_hash") for trial in plan.trials]


def _is_left_over(name: str) -> bool:
    return name.startswith(".") or ".tmp" in name or ".damaged" in name


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


if __name__ == "__main__":
    import small_disk  # by this name the processes of trials find its trainer

    _folder, _small, _lefts, _protected = sys.argv[1:]
    _seen = small_disk.main(Path(_folder), Path(_small), json.loads(_lefts), protected=_protected == "on")
    sys.stdout.write(json.dumps(_seen) + "\n")
