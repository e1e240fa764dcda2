"""A trainer that takes no time and can be made to fail, a study for it, and drivers that run it.

Its weights are a chain of hashes, so two trainings that end with the same weights took the same steps in order; each
step that is executed, also again, is a line of `steps.log` in the trial's folder.
"""

import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import numpy as np

from core.events import CheckpointSaved, Diverged, EpochFinished, StepsTaken, TrainingStarted
from core.metrics import Metrics
from workbench import attempts, execution, lease, runner, slots
from workbench.execution import Job
from workbench.plan import make_plan
from workbench.runner import Options, run_study
from workbench.slots import Slot, task_for
from workbench.store import Store
from workbench.study import Plan
from workbench.study_file import Selection, load_study
from workbench.template import Template
from workbench.trainers import Trainer

STUDY = """\
version: 1
study: {name}
question: Does a heavier box loss help?
baseline: plain
variants:
  plain: {{}}
  sharp: {{why: boxes weigh more, set: {{loss.weight_giou: 4.0}}}}
claims:
  - {{id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}}
scope: seeds
"""
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")

Kind = Literal["raise", "kill", "segv", "exit", "hang", "io", "oom", "cuda_oom", "import", "nan"]


class OutOfMemoryError(RuntimeError):
    """Named as torch's, by which it is known."""


@dataclass(frozen=True, kw_only=True)
class Poison:
    """What goes wrong just before a step: every time, or only while `marker` does not exist, which it then makes."""

    kind: Kind
    step: int
    marker: Path | None = None
    seed: int | None = None  # of the trials that it strikes; None: all

    def strike(self, step: int, seed: int) -> None:
        """Do it where it is due."""
        if step != self.step or self.seed not in (None, seed) or (self.marker is not None and self.marker.exists()):
            return
        if self.marker is not None:
            self.marker.touch()
        _STRIKES[self.kind]()


def _raise(error: BaseException) -> Callable[[], None]:
    def strike() -> None:
        raise error

    return strike


_STRIKES: dict[str, Callable[[], Any]] = {
    "raise": _raise(ValueError("poisoned")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": _raise(SystemExit(0)),
    "hang": lambda: time.sleep(3600),
    "io": _raise(OSError(5, "Input/output error")),
    "oom": _raise(MemoryError()),
    "cuda_oom": _raise(OutOfMemoryError("CUDA out of memory")),
    "import": _raise(ModuleNotFoundError("No module named 'mine'")),
    "nan": lambda: "nan",
}


@dataclass(kw_only=True)
class ToyTrainer:
    """Takes `steps` hashes of `seconds` each; a checkpoint, and an epoch, is due every `every` steps."""

    steps: int = 12
    every: int = 4
    seconds: float = 0.0
    poisons: tuple[Poison, ...] = ()
    forgetful: bool = False  # of the weights of a checkpoint, for controls
    victim: int = 0  # of processes that train together, the one that poisons strike

    def open_data(self, _config: Any, **_: Any) -> Any:
        """Return what looks like pictures."""
        return SimpleNamespace(report={"train.boxes": 3})

    def train(
        self,
        _config: Any,
        *,
        seed: int,
        checkpoints: Path,
        on_event: Any,
        should_stop: Any,
        world: Any = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Hash from the checkpoint to the end. Processes that do so together meet at each step; the first one tells."""
        rank = world.rank if world else 0
        meet = world.gather if world else lambda value: [value]
        tell = on_event if rank == 0 else lambda _: None
        save = _write if rank == 0 else lambda *_: None
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoints / "toy.json"
        state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "weights": f"{seed}"}
        if self.forgetful:
            state["weights"] = f"{seed}"
        meet(None)  # all have read it
        tell(_started(state["step"], self.steps, self.every))
        with (checkpoints.parent / ("steps.log" if rank == 0 else f"steps.{rank}.log")).open("a") as log:
            while state["step"] < self.steps:
                step = state["step"] + 1
                if rank == self.victim and self._struck(step, seed):
                    tell(Diverged(step=step, reason="the loss is nan"))
                    return _result("diverged", state, checkpoint)
                time.sleep(self.seconds)
                log.write(f"{step} {os.getpid()}\n")
                log.flush()
                state = {"step": step, "weights": hashlib.sha256(f"{state['weights']} {step}".encode()).hexdigest()}
                tell(_steps(step, self.every))
                if step % self.every == 0:
                    tell(_epoch(step, self.every))
                    save(checkpoint, state)
                    tell(CheckpointSaved(step=step, path=checkpoint.name))
                if any(meet(should_stop())) and step < self.steps:
                    save(checkpoint, state)
                    return _result("interrupted", state, checkpoint)
        return _result("finished", state, checkpoint)

    def evaluate(self, _config: Any, _evaluation: Any, *, checkpoint: Path, **_: Any) -> SimpleNamespace:
        """Give every checkpoint an AP of its weights."""
        ap = int(json.loads(checkpoint.read_text())["weights"][:4], 16) / 0xFFFF
        predictions = {"image_id": np.arange(3), "score": np.array([0.9, 0.5, 0.1], dtype=np.float32)}
        return SimpleNamespace(metrics=_metrics(ap), predictions=predictions, seconds=0.0)

    def _struck(self, step: int, seed: int) -> bool:
        for poison in self.poisons:
            if poison.kind == "nan" and poison.step == step and poison.seed in (None, seed):
                return True
            poison.strike(step, seed)
        return False


def toy_plan(
    folder: Path, *, name: str = "toy", seeds: int = 2, text: str = STUDY, variants: tuple[str, ...] = ("all",)
) -> Plan:
    """Write a study of two variants into `folder` and return its plan at smoke scale."""
    path = folder / f"{name}.yaml"
    path.write_text(text.format(name=name))
    return make_plan(load_study(path, Selection(profile="smoke", seeds=seeds, sets=TINY, variants=variants)))


def executed(folder: Path) -> list[int]:
    """Return the steps that were executed for a trial, in order, those executed again included."""
    path = folder / "steps.log"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, state: dict[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(state))
    draft.replace(path)


def _metrics(ap: float) -> Metrics:
    names = ("ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    return Metrics(ap=ap, ap50=ap, **dict.fromkeys(names))


def _started(step: int, total: int, every: int) -> TrainingStarted:
    return TrainingStarted(
        step=step,
        total_steps=total,
        total_epochs=total // every,
        num_parameters=7,
        threads=1,
        device="cpu",
        process_id=os.getpid(),
    )


def _steps(step: int, every: int) -> StepsTaken:
    return StepsTaken(
        step=step,
        epoch=step / every,
        losses={"total": 2 / step},
        grad_norm=0.5,
        learning_rate=1e-3,
        pictures_per_s=50.0,
        seconds=1.0 * step,
    )


def _epoch(step: int, every: int) -> EpochFinished:
    return EpochFinished(
        step=step,
        epoch=step // every,
        losses={"total": 2 / step},
        grad_norm=0.5,
        learning_rate=1e-3,
        pictures_per_s=50.0,
        peak_memory_bytes=1000,
        seconds=1.0 * step,
        metrics={"raw": _metrics(step / 100)},
    )


def _result(outcome: str, state: dict[str, Any], checkpoint: Path) -> SimpleNamespace:
    return SimpleNamespace(
        outcome=outcome,
        reason="the loss is nan" if outcome == "diverged" else "",
        step=state["step"],
        seconds=1.0 * state["step"],
        weights_hash=state["weights"],
        peak_memory_bytes=1000,
        checkpoint=checkpoint if checkpoint.exists() else None,
        num_parameters=7,
    )


def run_toy(
    plan: Plan,
    store: Store,
    trainer: Trainer,
    *,
    inline: bool = False,
    patience: float = 60.0,
    shown: bool = False,
    **options: Any,
) -> tuple[int, str, str]:
    """Run a plan in a slot, or inline, without MLflow; return exit code and what was printed.

    A slot that does not come to an end within `patience` seconds is stopped. `shown` prints at once what stderr gets.
    """
    out, err = io.StringIO(), io.StringIO()
    chosen = Options(**{"executor": "inline", "trainer": trainer, "tracking_uri": NOWHERE, **options})
    run = execution.run_inline if inline else partial(_run_in_slot, patience=patience)
    with mock.patch.object(runner, "run_inline", run):
        code = run_study(plan, store, chosen, out=out, err=sys.stderr if shown else err)
    return code, out.getvalue(), err.getvalue()


def _run_in_slot(job: Job, *, patience: float) -> None:
    logs = job.folder / "slots"
    logs.mkdir(exist_ok=True)
    watch = threading.Timer(patience, _give_up, (job,))
    watch.start()
    with mock.patch.object(slots, "Template", partial(Template, modules=("toys",))):  # torch would take seconds
        slot = Slot(
            task_for(
                job,
                logs=logs,
                trainer=job.trainer,
                canary=job.specs[0].trial_id,
                should_stop=job.stop.path.exists,
            )
        )
    try:
        for spec in job.specs:
            slot.run(spec)
    finally:
        watch.cancel()
        slot.close()


def _give_up(job: Job) -> None:
    job.stop.stop()
    for spec in job.specs:
        tried = attempts.read(Store(job.runs).trial_dir(spec.trial_id))
        if tried and tried[-1].outcome is None:
            os.kill(tried[-1].worker.pid, signal.SIGKILL)


lease.BEAT_SECONDS = float(os.environ.get("TOY_BEAT_SECONDS", lease.BEAT_SECONDS))  # also in the processes of trials
if os.environ.get("TOY_CLAIMS") == "none":  # for controls, in every process that trains toys
    attempts._await_end = attempts.superseded = lambda *_: False
