"""How the cost of a study grows with its number of trials, which here take no time of their own.

`growth` runs a study of 10, 100 and 1,000 trials, inline and under Ray, each in a process of its own, with a trainer
that only writes what a trial writes. What is measured: CPU seconds of the parts of `run`, and what one look at all
trials costs, as the progress lines take one every second and the mirror of MLflow every five.
"""

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from measure import table

from core.events import CheckpointSaved, EpochFinished, TrainingStarted
from core.metrics import Metrics
from workbench.driving import Run
from workbench.mlflow_mirror import Mirror
from workbench.options import Options
from workbench.plan import make_plan
from workbench.progress import Progress
from workbench.runner import run_study
from workbench.store import Store
from workbench.study import Plan
from workbench.study_file import Selection, load_study

COUNTS = (10, 100, 1000)
STUDY = """\
version: 1
study: many
question: What does a trial cost?
baseline: w2
variants:
  w2: {}
  w3: {why: more, set: {loss.weight_giou: 3.0}}
claims:
  - {id: heavier, text: A heavier box loss helps., plus: w3, minus: w2, metric: ap, kind: superiority}
scope: seeds
"""
_NONE = ("ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
_METRICS = Metrics(ap=0.25, ap50=0.4, **dict.fromkeys(_NONE))


class NoTrainer:
    """Writes what a trainer writes: the events of one epoch, a checkpoint, a thousand predictions."""

    def open_data(self, _config: Any, **_: Any) -> Any:
        """Return what looks like pictures."""
        return SimpleNamespace(report={})

    def train(self, _config: Any, *, checkpoints: Path, on_event: Callable[[Any], None], **_: Any) -> Any:
        """Tell of one epoch."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoints / "1.pt"
        checkpoint.write_bytes(b"")
        start = {"total_steps": 1, "total_epochs": 1, "num_parameters": 1, "threads": 1, "device": "cpu"}
        on_event(TrainingStarted(step=0, process_id=os.getpid(), **start))
        measured = {"losses": {"total": 1.0}, "grad_norm": 1.0, "learning_rate": 1e-3, "pictures_per_s": 1.0}
        epoch = {**measured, "peak_memory_bytes": 1, "seconds": 0.0, "metrics": {"averaged": _METRICS}}
        on_event(EpochFinished(step=1, epoch=1, **epoch))
        on_event(CheckpointSaved(step=1, path=checkpoint.name))
        told = {"seconds": 0.0, "weights_hash": "0", "peak_memory_bytes": 1, "num_parameters": 1}
        return SimpleNamespace(outcome="finished", reason="", step=1, checkpoint=checkpoint, **told)

    def evaluate(self, _config: Any, _evaluation: Any, **_: Any) -> Any:
        """Score nothing."""
        return SimpleNamespace(metrics=_METRICS, predictions={"score": np.zeros(1000, np.float32)}, seconds=0.0)


def growth(out: Path | None) -> str:
    """Measure all and return the tables; with `out`, draw them there as growth_trials.png."""
    told: list[str] = []
    curves: dict[str, list[float]] = {}
    for executor in ("inline", "ray"):
        found = [_apart(executor, count) for count in COUNTS]
        rows = {name: [measured[name] for measured in found] for name in found[0]}
        curves |= {f"{executor}: {name}": values for name, values in rows.items()}
        lines = [
            (name, *(f"{value:.3g}" for value in values), f"{_slope(values):.2f}") for name, values in rows.items()
        ]
        told.append(table((f"CPU s, {executor}", *(f"{count:,} trials" for count in COUNTS), "slope"), lines))
    if out is not None:
        _draw(curves, out)
    return "\n\n".join([*told, "Slope: of the logarithms from 100 to 1,000 trials; 1 is proportional to their number."])


def _slope(values: list[float]) -> float:
    return math.log(values[-1] / values[-2]) / math.log(COUNTS[-1] / COUNTS[-2])


def _apart(executor: str, count: int) -> dict[str, float]:
    """Measure in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # Not as __main__, which no other process could import the trainer from.
        script = f"import trial_growth as t; t.tell({executor!r}, {count}, {folder!r})"
        command = [sys.executable, "-c", script]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # trials import the trainer, too
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def tell(executor: str, count: int, folder: str) -> None:
    """Measure, and print the numbers as JSON."""
    print(json.dumps(measure(executor, count, Path(folder))))


def measure(executor: str, count: int, folder: Path) -> dict[str, float]:
    """Return the CPU seconds of each part of a run, and of one look at all trials."""
    (folder / "many.yaml").write_text(STUDY, encoding="utf-8")
    spent: dict[str, float] = {}
    with _timed(spent, "plan"):
        plan = make_plan(load_study(folder / "many.yaml", Selection(profile="smoke", seeds=count // 2)))
    store = Store(folder / "runs")
    progress = Progress(store, plan.trials, concurrency=2, stream=io.StringIO())
    with _timed(spent, "a look of the progress lines, all pending"):
        progress.update()
    for owner, name, part in (
        (Run, "_execute", "driver's main thread while trials run"),
        (Run, "judge", "verdicts"),
        (Run, "report", "report"),
        (Progress, "_loop", "progress lines"),
        (Mirror, "_loop", "mirror of MLflow"),
    ):
        _time_method(owner, name, spent, part)
    began = time.process_time()
    trainer: Any = NoTrainer()
    options = Options(executor="ray" if executor == "ray" else "inline", trainer=trainer)
    code = run_study(plan, store, options, out=io.StringIO(), err=io.StringIO())
    spent["all of the driver"] = time.process_time() - began
    if code:
        raise RuntimeError(f"the run ended with {code}")
    return spent | _looks(plan, store)


def _looks(plan: Plan, store: Store) -> dict[str, float]:
    """Return what a look at a study costs when it is over and nothing is new."""
    (ref,) = store.studies()
    mirror, spent = Mirror(store, ref, plan, tracking_uri=None, warn=print), {}
    time.sleep(3)  # until the files are settled
    mirror._sender.up_to_date()
    with _timed(spent, "a look of the mirror, all done"):
        mirror._sender.up_to_date()
    return spent


def _time_method(owner: type, name: str, spent: dict[str, float], part: str) -> None:
    method = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        with _timed(spent, part):
            return method(*args, **options)

    setattr(owner, name, timed)


@contextmanager
def _timed(spent: dict[str, float], part: str) -> Iterator[None]:
    began = time.thread_time()
    yield
    spent[part] = spent.get(part, 0.0) + time.thread_time() - began


def _draw(curves: Mapping[str, list[float]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, executor in zip(figure.subplots(1, 2, sharey=True), ("inline", "ray"), strict=True):
        own = {name: values for name, values in curves.items() if name.startswith(executor)}
        for name, values in own.items():
            axes.loglog(COUNTS, values, "--" if ": a look" in name else "-", marker="o", label=name.split(": ")[1])
        axes.loglog(COUNTS, [count / 100 for count in COUNTS], "k:", label="proportional")
        axes.set_title(executor)
        axes.set_xlabel("trials")
        axes.set_ylabel("CPU s")
        axes.legend(fontsize="x-small")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "growth_trials.png", dpi=150)
