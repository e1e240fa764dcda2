"""Faults of files: kills while they are written, power cuts, digits that became others. Without Ray."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Seen, cases
from toys import CheckpointToy, Poison, ToyTrainer, executed, run_toy, toy_plan

from core import checkpoint
from workbench import durable
from workbench.store import Store
from workbench.trial import execute


def _killed_while_writing(place: Path, *, protected: bool) -> Seen:
    """A worker dies between the temporary file and its rename, at one state file after the other."""
    plan, store = toy_plan(place, seeds=1), Store(place / "runs")
    spec = next(iter(plan.specs.values()))
    folder = store.trial_dir(spec.trial_id)
    for name in ("spec.json", "metrics.json", "result.json", "attempts/0004.json"):
        _in_a_process(lambda name=name: _execute_and_die_at(name, spec, store, protected=protected))
    ended = execute(spec, store.root, should_stop=lambda: False, trainer=ToyTrainer())
    result = store.result(spec.trial_id) or {}
    return {
        "ended": ended,
        "steps": len(executed(folder)),
        "attempts": len(list((folder / "attempts").glob("*.json"))),
        "damaged": result.get("damaged"),
    }


def _execute_and_die_at(name: str, spec: Any, store: Store, *, protected: bool) -> None:
    """Execute a trial in this process and kill it when the file of that name is about to appear."""
    write, rename = durable._write_and_sync, Path.replace

    def die_at_rename(self: Path, target: Path) -> Path:
        if str(target).endswith(f"/{name}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    def write_in_place(path: Path, content: bytes) -> None:
        real = path.with_name(path.name[1 : path.name.index(".json") + 5])
        if str(real).endswith(f"/{name}"):
            real.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    if protected:
        Path.replace = die_at_rename  # type: ignore[method-assign]
    else:
        durable._write_and_sync = write_in_place
    execute(spec, store.root, should_stop=lambda: False, trainer=ToyTrainer())


def _in_a_process(work: Callable[[], None]) -> int:
    """Call `work` in a fork and return how that ended."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _verify_killed_while_writing(seen: Seen) -> None:
    assert seen == {"ended": "finished", "steps": 12, "attempts": 4, "damaged": []}


def _changed_digit(place: Path, *, protected: bool) -> Seen:
    """A digit of a result and one of a score become others, and a plan and an attempt are cut off."""
    plan, store = toy_plan(place), Store(place / "runs")
    run_toy(plan, store, ToyTrainer(), inline=True)
    before = {trial_id: store.record(trial_id) for trial_id in plan.specs}
    first, second, third = list(plan.specs)[:3]
    (metrics,) = store.trial_dir(first).glob(f"evaluations/{next(iter(plan.specs[first].evaluations))}/metrics.json")
    _change(metrics, b'"ap50": 0.', b'"ap50": 0.0')
    _change(store.trial_dir(second) / "result.json", b'"seconds": 12.0', b'"seconds": 92.0')
    attempt = store.trial_dir(third) / "attempts" / "0001.json"
    os.truncate(attempt, 40)
    os.truncate(store.study_dir(plan) / "plan.json", 500)
    with pytest.MonkeyPatch.context() as patch:
        if not protected:
            patch.setattr(durable, "_holds", lambda _content: True)
        code, _, _ = run_toy(plan, Store(store.root), ToyTrainer(), inline=True)
        after = Store(store.root)
        records = {trial_id: after.record(trial_id) for trial_id in plan.specs}
    return {
        "exit": code,
        "same scores": all(records[name].metrics == before[name].metrics for name in records),
        "same seconds": all(records[name].seconds == before[name].seconds for name in records),
        "steps again": sum(len(executed(store.trial_dir(name))) for name in records) - 12 * len(records),
        "set aside": sorted(path.name for path in store.root.rglob("*.damaged")),
    }


def _change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def _verify_changed_digit(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["same scores"]
    assert seen["same seconds"]
    assert seen["steps again"] == 0
    assert seen["set aside"] == ["metrics.json.damaged", "plan.json.damaged", "result.json.damaged"]


def _power_cut(place: Path, *, protected: bool) -> Seen:
    """Each kind of file is empty in its turn; of checkpoints and events also the second half is zeros."""
    plan, base = toy_plan(place, variants=("plain",)), Store(place / "base")
    finished, failed = (base.trial_dir(trial.trial_id) for trial in plan.trials)
    run_toy(plan, base, CheckpointToy(), inline=True)
    weights = [_weights(base, trial_id) for trial_id in plan.specs]
    shutil.rmtree(failed)
    run_toy(plan, base, CheckpointToy(poisons=(Poison(kind="raise", step=10, seed=1),)), inline=True)
    paths = [path for folder in (finished, failed, base.study_dir(plan)) for path in folder.rglob("*") if _counts(path)]
    files = list({(base.study_dir(plan) in path.parents, path.name): path for path in paths}.values())  # one of a name
    cuts = [(path, 0) for path in files]
    cuts += [(path, path.stat().st_size // 2) for path in files if path.suffix in (".pt", ".jsonl")]
    seen: Seen = {"cuts": len(cuts), "not mended": [], "other weights": [], "steps again": 0}
    for path, kept in cuts:
        store, name = Store(place / "cut"), path.relative_to(base.root)
        shutil.copytree(base.root, store.root, dirs_exist_ok=True)
        content = path.read_bytes()
        (store.root / name).write_bytes(content[:kept].ljust(len(content) if kept else 0, b"\0"))
        with pytest.MonkeyPatch.context() as patch:
            if not protected:
                patch.setattr(checkpoint, "is_intact", lambda path: path.exists())
            code, _, _ = run_toy(plan, store, CheckpointToy(), inline=True)
        if code != 0 or any(store.state(trial_id) != "finished" for trial_id in plan.specs):
            seen["not mended"].append(f"{name.name}: {code}")
        elif [_weights(store, trial_id) for trial_id in plan.specs] != weights:
            seen["other weights"].append(name.name)
        again = [len(executed(store.trial_dir(trial_id))) - 12 for trial_id in plan.specs]
        seen["steps again"] = max(seen["steps again"], *again)
        shutil.rmtree(store.root)
    return seen


def _weights(store: Store, trial_id: str) -> str:
    return (store.result(trial_id) or {})["weights_hash"]


def _counts(path: Path) -> bool:
    """Tell whether a file is a record, and not what toys, reports and curves keep for people."""
    return path.is_file() and path.name not in ("steps.log", "report.md", "study.yaml")


def _verify_power_cut(seen: Seen) -> None:
    assert seen["cuts"] > 25
    assert (seen["not mended"], seen["other weights"]) == ([], [])
    assert seen["steps again"] <= 2 + 4  # each of two failures costs a step, and a damaged checkpoint an interval


test_fault, test_control = cases(
    Fault(
        number="F9",
        title="killed while a state file is written, four times",
        expected="finished, no step twice, nothing half-written",
        scenario=_killed_while_writing,
        verify=_verify_killed_while_writing,
    ),
    Fault(
        number="F9b",
        title="a digit of a result and of a score changed, a plan and an attempt cut off",
        expected="noticed by checksum, set aside, written anew; no step again",
        scenario=_changed_digit,
        verify=_verify_changed_digit,
    ),
    Fault(
        number="F9c",
        title="a power cut leaves one file empty or half of it zeros, each in turn",
        expected="the same command finishes with the same weights, one interval again at most",
        scenario=_power_cut,
        verify=_verify_power_cut,
    ),
)
