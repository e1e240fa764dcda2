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

from core.checkpoint_files import PassedOver
from core.events import CheckpointPassedOver, CheckpointSaved, Diverged, EpochFinished, StepsTaken, TrainingStarted
from core.metrics import Metrics
from workbench import attempts, driving, execution, lease, slots
from workbench.execution import Job
from workbench.options import Options
from workbench.plan import make_plan
from workbench.runner import run_study
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
        save = self._save if rank == 0 else lambda folder, _: folder / "toy.json"
        checkpoints.mkdir(parents=True, exist_ok=True)
        passed: list[PassedOver] = []
        state, checkpoint = self._load(checkpoints, passed.append) or ({"step": 0, "weights": f"{seed}"}, None)
        if self.forgetful:
            state["weights"] = f"{seed}"
        meet(None)  # all have read it
        tell(started(state["step"], self.steps, self.every))
        for one in passed:
            tell(CheckpointPassedOver(step=state["step"], path=one.name, reason=one.reason))
        with (checkpoints.parent / ("steps.log" if rank == 0 else f"steps.{rank}.log")).open("a") as log:
            while state["step"] < self.steps:
                step = state["step"] + 1
                if rank == self.victim and self._struck(step, seed):
                    tell(Diverged(step=step, reason="the loss is nan"))
                    return result("diverged", state["step"], state["weights"], checkpoint)
                time.sleep(self.seconds)
                log.write(f"{step} {os.getpid()}\n")
                log.flush()
                state = {"step": step, "weights": hashlib.sha256(f"{state['weights']} {step}".encode()).hexdigest()}
                tell(stepped(step, self.every))
                if step % self.every == 0:
                    tell(epoch(step, self.every))
                    checkpoint = save(checkpoints, state)
                    tell(CheckpointSaved(step=step, path=checkpoint.name))
                if any(meet(should_stop())) and step < self.steps:
                    return result("interrupted", state["step"], state["weights"], save(checkpoints, state))
        return result("finished", state["step"], state["weights"], checkpoint)

    def evaluate(self, _config: Any, _evaluation: Any, *, checkpoint: Path, **_: Any) -> SimpleNamespace:
        """Give every checkpoint an AP of its weights."""
        ap = int(self._weights(checkpoint)[:4], 16) / 0xFFFF
        predictions = {"image_id": np.arange(3), "score": np.array([0.9, 0.5, 0.1], dtype=np.float32)}
        return SimpleNamespace(metrics=metrics(ap), predictions=predictions, seconds=0.0)

    def _load(
        self, checkpoints: Path, _on_passed_over: Callable[[PassedOver], None]
    ) -> tuple[dict[str, Any], Path] | None:
        path = checkpoints / "toy.json"
        return (json.loads(path.read_text()), path) if path.exists() else None

    def _save(self, checkpoints: Path, state: dict[str, Any]) -> Path:
        path = checkpoints / "toy.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        return draft.replace(path)

    def _weights(self, checkpoint: Path) -> str:
        return json.loads(checkpoint.read_text())["weights"]

    def _struck(self, step: int, seed: int) -> bool:
        for poison in self.poisons:
            if poison.kind == "nan" and poison.step == step and poison.seed in (None, seed):
                return True
            poison.strike(step, seed)
        return False


class CheckpointToy(ToyTrainer):
    """A toy whose checkpoints are the real ones: safe archives with checksums, two of them kept while it trains."""

    def _load(
        self, checkpoints: Path, on_passed_over: Callable[[PassedOver], None]
    ) -> tuple[dict[str, Any], Path] | None:
        from core import checkpoint  # torch takes seconds, which most toys need not

        return checkpoint.load_newest(checkpoints, on_passed_over=on_passed_over)

    def _save(self, checkpoints: Path, state: dict[str, Any]) -> Path:
        from core import checkpoint

        return checkpoint.save_checkpoint(checkpoints, state["step"], {"weights": state["weights"]})

    def _weights(self, checkpoint: Path) -> str:
        from core.checkpoint import load_checkpoint

        return load_checkpoint(checkpoint)["weights"]


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


def metrics(ap: float) -> Metrics:
    """Return COCO numbers of which only AP and AP50 are known."""
    names = ("ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    return Metrics(ap=ap, ap50=ap, **dict.fromkeys(names))


def started(step: int, total: int, every: int) -> TrainingStarted:
    """Return the event of a training of `total` steps that begins at `step`; an epoch has `every` of them."""
    return TrainingStarted(
        step=step,
        total_steps=total,
        total_epochs=total // every,
        num_parameters=7,
        threads=1,
        device="cpu",
        process_id=os.getpid(),
    )


def stepped(step: int, every: int, *, pace: float = 1.0) -> StepsTaken:
    """Return the event of a step, of which each takes `pace` seconds."""
    return StepsTaken(
        step=step,
        epoch=step / every,
        losses={"total": 2 / step},
        grad_norm=0.5,
        learning_rate=1e-3,
        pictures_per_s=50.0,
        seconds=pace * step,
    )


def epoch(step: int, every: int, *, pace: float = 1.0, parameters: str = "raw") -> EpochFinished:
    """Return the event of the epoch that ends with a step; its AP is a hundredth of the steps."""
    return EpochFinished(
        step=step,
        epoch=step // every,
        losses={"total": 2 / step},
        grad_norm=0.5,
        learning_rate=1e-3,
        pictures_per_s=50.0,
        peak_memory_bytes=1000,
        seconds=pace * step,
        metrics={parameters: metrics(step / 100)},
    )


def result(outcome: str, step: int, weights: str, checkpoint: Path | None, *, pace: float = 1.0) -> SimpleNamespace:
    """Return what a training comes to."""
    return SimpleNamespace(
        outcome=outcome,
        reason="the loss is nan" if outcome == "diverged" else "",
        step=step,
        seconds=pace * step,
        weights_hash=weights,
        peak_memory_bytes=1000,
        checkpoint=checkpoint,
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
    """Run a plan in a slot, or inline, without MLflow unless told of one; return exit code and what was printed.

    A slot that does not come to an end within `patience` seconds is stopped. `shown` prints at once what stderr gets.
    """
    out, err = io.StringIO(), io.StringIO()
    chosen = Options(**{"executor": "inline", "trainer": trainer, "tracking_uri": NOWHERE, **options})
    inlined = execution.run_inline if inline else partial(_run_in_slot, patience=patience)
    mirror = driving.Mirror if "tracking_uri" in options else _NoMirror
    with mock.patch.multiple(driving, run_inline=inlined, Mirror=mirror):
        code = run_study(plan, store, chosen, out=out, err=sys.stderr if shown else err)
    return code, out.getvalue(), err.getvalue()


class _NoMirror:
    """Copies nothing: to ask an MLflow that is away takes seconds."""

    tracking_uri, cpu_seconds = NOWHERE, 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def start(self) -> None:
        """Do nothing."""

    def finish(self, **_: Any) -> None:
        """Do nothing."""


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
