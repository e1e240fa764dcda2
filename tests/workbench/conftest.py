"""What the tests of records and execution share: a tiny study, and a trainer that only pretends."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from trying import SCALE

from core.events import CheckpointSaved, Diverged, EpochFinished, StepsTaken, TrainingStarted
from core.metrics import Metrics
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study

TOY_STUDY = """\
version: 1
study: toy
question: Does a heavier box loss help?
baseline: plain
variants:
  plain: {}
  sharp: {why: boxes weigh more, set: {loss.weight_giou: 4.0}}
claims:
  - {id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}
scope: seeds
"""
TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")


@pytest.fixture
def toy_study(tmp_path):
    """Return the file of a study with two variants."""
    path = tmp_path / "toy.yaml"
    path.write_text(TOY_STUDY)
    return path


@pytest.fixture
def toy_plan(toy_study):
    """Return its plan at smoke scale, with even fewer and smaller pictures: two variants, two seeds."""
    return make_plan(load_study(toy_study, Selection(profile="smoke", sets=TINY)))


@pytest.fixture(scope="session")
def plan_in():
    """Return a function that makes such a plan of a file in a folder."""

    def plan(folder):
        (folder / "toy.yaml").write_text(TOY_STUDY)
        return make_plan(load_study(folder / "toy.yaml", Selection(profile="smoke", sets=TINY)))

    return plan


@pytest.fixture
def write_study(tmp_path):
    """Return a writer of a study with its profile `laptop`: returns the path of the study file."""

    def write(text, profile=SCALE):
        (tmp_path / "profiles").mkdir(exist_ok=True)
        (tmp_path / "profiles" / "laptop.yaml").write_text(profile)
        path = tmp_path / "trying.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def store(tmp_path):
    """Return an empty store."""
    return Store(tmp_path / "runs")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Return a migrated MLflow database: creating one takes seconds, a copy takes none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


class ToyTrainer:
    """A trainer that counts: its "weights" are the number of steps, its checkpoint a JSON file, an epoch two steps.

    `before_step` is called with each step's number and may raise. `calls` tells what was asked of the trainer.
    """

    def __init__(self, *, steps=6, outcome="finished", before_step=None):
        self.steps, self.outcome, self.before_step = steps, outcome, before_step or _nothing
        self.calls = []

    def open_data(self, _config, **_):
        """Return what looks like pictures."""
        self.calls.append("open_data")
        return SimpleNamespace(report={"train.boxes": 3})

    def train(self, _config, *, checkpoints, on_event, should_stop, **_):
        """Count to `steps`, from the checkpoint."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoints / "toy.json"
        step = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
        self.calls.append(f"train from {step}")
        on_event(_started(step, self.steps))
        while step < self.steps:
            self.before_step(step + 1)
            step += 1
            on_event(_steps(step))
            if step % 2 == 0:
                on_event(epoch_event(step // 2, ap=step / 100))
                checkpoint.write_text(json.dumps(step))
                on_event(CheckpointSaved(step=step, path=checkpoint.name))
            if should_stop():
                checkpoint.write_text(json.dumps(step))
                return _result("interrupted", step, checkpoint)
        if self.outcome == "diverged":
            on_event(Diverged(step=step, reason="the loss is nan"))
        return _result(self.outcome, step, checkpoint)

    def evaluate(self, _config, evaluation, **_):
        """Give every checkpoint an AP of .25."""
        self.calls.append(f"evaluate {evaluation.parameters}")
        predictions = {"image_id": np.arange(3), "score": np.array([0.9, 0.5, 0.1], dtype=np.float32)}
        return SimpleNamespace(metrics=coco(0.25), predictions=predictions, seconds=0.1)


@pytest.fixture(scope="session")
def toy_trainer():
    """Return the class of a trainer that pretends to train."""
    return ToyTrainer


def _nothing(_step):
    """Before a step that goes well."""


def coco(ap):
    """COCO numbers of which only AP and AP50 are known."""
    names = ("ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    return Metrics(ap=ap, ap50=ap, **dict.fromkeys(names))


def epoch_event(epoch, *, ap):
    """An epoch of two steps."""
    return EpochFinished(
        step=2 * epoch,
        epoch=epoch,
        losses={"total": 1 / epoch},
        grad_norm=0.5,
        learning_rate=1e-3,
        pictures_per_s=50.0,
        peak_memory_bytes=1000,
        seconds=4.0 * epoch,
        metrics={"averaged": coco(ap)},
    )


def _started(step, total):
    return TrainingStarted(
        step=step, total_steps=total, total_epochs=total // 2, num_parameters=7, threads=1, device="cpu", process_id=1
    )


def _steps(step):
    return StepsTaken(
        step=step,
        epoch=step / 2,
        losses={"total": 2 / step},
        grad_norm=0.5,
        learning_rate=1e-3,
        pictures_per_s=50.0,
        seconds=2.0 * step,
    )


def _result(outcome, step, checkpoint: Path):
    return SimpleNamespace(
        outcome=outcome,
        reason="the loss is nan" if outcome == "diverged" else "",
        step=step,
        seconds=2.0 * step,
        weights_hash=f"weights-{step}",
        peak_memory_bytes=1000,
        checkpoint=checkpoint,
        num_parameters=7,
    )
