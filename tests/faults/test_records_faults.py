"""Faults of disks and files, and of study files that are edited between runs. Without Ray."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import Fault, Seen, cases
from toys import STUDY, TINY, Poison, ToyTrainer, epoch, executed, result, started, stepped, toy_plan

from workbench import disk, durable
from workbench.errors import WorkbenchError
from workbench.plan import make_plan
from workbench.runner import Options, run_study
from workbench.store import Store
from workbench.study import Plan
from workbench.study_file import Selection, load_study
from workbench.trial import _Work, execute

NOWHERE = "http://127.0.0.1:9"  # MLflow is another test's subject


def _run(plan: Plan, store: Store, trainer: Any) -> tuple[int, str]:
    """Run a study as the command does and return the exit code and what was said."""
    err = io.StringIO()
    options = Options(executor="inline", trainer=trainer, tracking_uri=NOWHERE)
    return run_study(plan, store, options, out=io.StringIO(), err=err), err.getvalue()


class CheckpointToy(ToyTrainer):
    """A toy whose checkpoints are the real ones: safe archives with checksums, two of them kept while it trains."""

    def train(
        self, _config: Any, *, seed: int, checkpoints: Path, on_event: Any, should_stop: Any, **_: Any
    ) -> SimpleNamespace:
        """Hash from the newest intact checkpoint to the end."""
        import hashlib

        from core import checkpoint as own
        from core.events import CheckpointPassedOver, CheckpointSaved

        passed: list[Any] = []
        found = own.load_newest(checkpoints, on_passed_over=passed.append)
        state, path = found if found is not None else ({"step": 0, "weights": f"{seed}"}, None)
        on_event(started(state["step"], self.steps, self.every))
        for one in passed:
            on_event(CheckpointPassedOver(step=state["step"], path=one.name, reason=one.reason))
        with (checkpoints.parent / "steps.log").open("a") as log:
            while state["step"] < self.steps:
                step = state["step"] + 1
                self._struck(step, seed)
                log.write(f"{step} {os.getpid()}\n")
                log.flush()
                state = {"step": step, "weights": hashlib.sha256(f"{state['weights']} {step}".encode()).hexdigest()}
                on_event(stepped(step, self.every))
                stopped = should_stop() and step < self.steps
                if step % self.every == 0 or stopped:
                    if step % self.every == 0:
                        on_event(epoch(step, self.every))
                    path = own.save_checkpoint(checkpoints, step, {"weights": state["weights"]})
                    on_event(CheckpointSaved(step=step, path=path.name))
                if stopped:
                    return _of(result("interrupted", state["step"], state["weights"], checkpoints), path)
        return _of(result("finished", state["step"], state["weights"], checkpoints), path)

    def evaluate(self, _config: Any, _evaluation: Any, *, checkpoint: Path, **_: Any) -> SimpleNamespace:
        """Give every checkpoint an AP of its weights."""
        from core.checkpoint import load_checkpoint

        draft = checkpoint.with_name("toy.json")
        draft.write_text(f'{{"weights": "{load_checkpoint(checkpoint)["weights"]}"}}')
        scored = super().evaluate(None, None, checkpoint=draft)
        draft.unlink()
        return scored


def _of(result: SimpleNamespace, checkpoint: Path | None) -> SimpleNamespace:
    result.checkpoint = checkpoint
    return result


# F9: a kill while a state file is written


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
    _run(plan, store, ToyTrainer())
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
        code, _ = _run(plan, Store(store.root), ToyTrainer())
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


# F12: no room on the disk


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
        code, _ = _run(plan, store, CheckpointToy())
    failed = [store.record(name) for name in struck]
    parts = [path.name for path in store.root.rglob("*.tmp")]
    before = [len(executed(store.trial_dir(name))) for name in struck]
    again, _ = _run(plan, Store(store.root), CheckpointToy())
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

    from core.checkpoint_files import path_of, sha256, write_sidecar

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step_*"):
        old.unlink()
    path = path_of(folder, step)
    with path.open("wb") as file:
        torch.save({"format": 1, "step": step, **state}, file)
    write_sidecar(path, sha256(path))
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
            _run(plan, store, ToyTrainer())
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
        code, said = _run(plan, store, ToyTrainer(seconds=0.05))
        patch.setattr(disk, "free_bytes", free)
        states = {store.state(trial.trial_id) for trial in plan.trials}
        again, _ = _run(plan, Store(store.root), ToyTrainer())
    repeated = max(len(executed(store.trial_dir(name))) for name in plan.specs) - 12
    lines = [line for line in said.splitlines() if "are to stay free: stopping" in line]
    return {"exit": code, "lines": len(lines), "states": sorted(states), "then": again, "steps again": repeated}


def _verify_room_runs_out(seen: Seen) -> None:
    assert seen["exit"] == 128 + signal.SIGTERM
    assert seen["lines"] == 1
    assert "failed" not in seen["states"]
    assert (seen["then"], seen["steps again"]) == (0, 0)


# F13: a damaged or missing checkpoint


def _damaged_checkpoint(how: str) -> Callable[..., Seen]:
    def scenario(place: Path, *, protected: bool) -> Seen:
        from core import checkpoint as own

        plan, store = toy_plan(place, seeds=1), Store(place / "runs")
        spec, other = plan.specs.values()
        folder = store.trial_dir(spec.trial_id)
        execute(
            spec, store.root, should_stop=lambda: False, trainer=CheckpointToy(poisons=(Poison(kind="raise", step=10),))
        )
        newest = max((folder / "checkpoints").glob("step_*.pt"))
        _damage(newest, how)
        with pytest.MonkeyPatch.context() as patch:
            if not protected:
                patch.setattr(own, "is_intact", lambda path: path.exists())
                patch.setattr(_Work, "_check_start", lambda *_: None)
            ended = execute(spec, store.root, should_stop=lambda: False, trainer=CheckpointToy())
        execute(other, store.root, should_stop=lambda: False, trainer=CheckpointToy())  # the same seed: as if unbroken
        results = [store.result(name) or {} for name in plan.specs]
        lines = (folder / "events.jsonl").read_text().splitlines()
        return {
            "ended": ended,
            "went on at": executed(folder)[9:10],
            "told": [line.split('"reason":"')[1].split('"')[0] for line in lines if "passed_over" in line],
            "set aside": [name for name in results[0].get("damaged", []) if "checkpoints" in name],
            "same weights": results[0].get("weights_hash") == results[1].get("weights_hash"),
        }

    return scenario


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[content.index(b"weights") + 12] ^= 1  # in what is restored
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
        path.with_name(path.name + ".sha256").unlink()


def _verify_damaged_checkpoint(reason: str, *, aside: bool) -> Callable[[Seen], None]:
    def verify(seen: Seen) -> None:
        assert seen["ended"] == "finished"
        assert seen["went on at"] == [5]  # one interval of four steps, and those since the damaged one, are lost
        assert seen["told"] == [reason]
        assert seen["set aside"] == (["checkpoints/step_000000008.pt.damaged"] if aside else [])
        assert seen["same weights"]

    return verify


def _damaged_checkpoint_of_the_real_trainer(place: Path, *, protected: bool) -> Seen:
    """Flipped bytes in the newest checkpoint of a detector that was interrupted, against one that was not."""
    from core import checkpoint as own
    from workbench.store import Store as Runs
    from workbench.trainers import CoreTrainer

    (place / "toy.yaml").write_text(STUDY.format(name="toy"))
    sets = (*(item for item in TINY if "epochs" not in item), "training.epochs=3")
    plan = make_plan(load_study(place / "toy.yaml", Selection(profile="smoke", seeds=1, sets=sets)))
    spec = next(iter(plan.specs.values()))
    whole, broken = Runs(place / "whole"), Runs(place / "broken")
    execute(spec, whole.root, should_stop=lambda: False)
    checkpoints = broken.trial_dir(spec.trial_id) / "checkpoints"

    class Stopping(CoreTrainer):
        """Asks after every step, which a trial does a few times a second only."""

        def train(self, config: Any, **rest: Any) -> Any:
            enough = {"should_stop": lambda: len(list(checkpoints.glob("step_*.pt"))) >= 2}
            return super().train(config, **{**rest, **enough})

    assert execute(spec, broken.root, should_stop=lambda: False, trainer=Stopping("cpu")) == "interrupted"
    newest = max(checkpoints.glob("step_*.pt"))
    content = bytearray(newest.read_bytes())
    for place_in_file in range(2000, len(content), 5000):  # some of them in weights
        content[place_in_file] ^= 64
    newest.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        if not protected:
            patch.setattr(own, "is_intact", lambda path: path.exists())
        ended = execute(spec, broken.root, should_stop=lambda: False)
    results = [store.result(spec.trial_id) or {} for store in (whole, broken)]
    return {
        "ended": ended,
        "same weights": results[0]["weights_hash"] == results[1].get("weights_hash"),
        "set aside": results[1].get("damaged", []) == [f"checkpoints/{newest.name}.damaged"],
    }


def _verify_damaged_checkpoint_of_the_real_trainer(seen: Seen) -> None:
    assert seen == {"ended": "finished", "same weights": True, "set aside": True}


# F21: the study file is edited between a run and the next


def _edited_study(place: Path, *, protected: bool) -> Seen:
    """One variant changes after half of the trials, of which one of each variant had failed."""
    from workbench import plan as planning

    first, store = toy_plan(place), Store(place / "runs")
    _run(first, store, ToyTrainer(poisons=(Poison(kind="raise", step=6, seed=1),)))
    scientific = planning.scientific
    with pytest.MonkeyPatch.context() as patch:
        if not protected:  # identity that does not see the key that is edited
            patch.setattr(planning, "scientific", lambda part: _blind(scientific(part)))
            first = toy_plan(place)
            for trial in first.trials:
                store.trial_dir(trial.trial_id).mkdir(parents=True, exist_ok=True)
            _run(first, store, ToyTrainer())
        second = toy_plan(place, text=STUDY.replace("loss.weight_giou: 4.0", "loss.weight_giou: 6.0"))
        code, _ = _run(second, Store(store.root), ToyTrainer())
    after = Store(store.root)
    ids = {
        variant: [trial.trial_id for trial in second.trials if trial.variant == variant]
        for variant in ("plain", "sharp")
    }
    changed = set(ids["sharp"]) - set(first.specs)
    return {
        "exit": code,
        "plans": len(after.studies()),
        "unchanged reused": set(ids["plain"]) <= set(first.specs),
        "attempts of unchanged": [after.record(name).attempts for name in ids["plain"]],
        "steps of the finished": len(executed(after.trial_dir(ids["plain"][0]))),
        "the other went on at": min(executed(after.trial_dir(ids["plain"][1]))[5:]),
        "changed run": sorted(len(executed(after.trial_dir(name))) for name in changed),
    }


def _blind(computed: Any) -> Any:
    loss = computed.get("loss") if isinstance(computed, dict) else None
    if isinstance(loss, dict) and loss.get("weight_giou") == 6.0:
        loss["weight_giou"] = 4.0
    return computed


def _verify_edited_study(seen: Seen) -> None:
    assert seen["exit"] == 0
    assert seen["plans"] == 2
    assert seen["unchanged reused"]
    assert seen["attempts of unchanged"][0] == 1
    assert seen["steps of the finished"] == 12
    assert seen["the other went on at"] == 5
    assert seen["changed run"] == [12, 12]


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
        number="F13",
        title="flipped byte in the newest checkpoint",
        expected="the one before, told and set aside, the same weights",
        scenario=_damaged_checkpoint("flip"),
        verify=_verify_damaged_checkpoint("damaged", aside=True),
    ),
    Fault(
        number="F13b",
        title="newest checkpoint truncated",
        expected="the one before, told and set aside, the same weights",
        scenario=_damaged_checkpoint("truncate"),
        verify=_verify_damaged_checkpoint("damaged", aside=True),
    ),
    Fault(
        number="F13c",
        title="newest checkpoint deleted",
        expected="the one before, told, the same weights",
        scenario=_damaged_checkpoint("delete"),
        verify=_verify_damaged_checkpoint("missing", aside=False),
    ),
    Fault(
        number="F13d",
        title="flipped bytes in a detector's newest checkpoint",
        expected="the one before, set aside, weights equal to an unbroken run's",
        scenario=_damaged_checkpoint_of_the_real_trainer,
        verify=_verify_damaged_checkpoint_of_the_real_trainer,
        marks=(pytest.mark.slow,),
    ),
    Fault(
        number="F21",
        title="one variant edited between two runs",
        expected="a new plan; the unchanged reused, the changed run",
        scenario=_edited_study,
        verify=_verify_edited_study,
    ),
)
