"""What the tests of records and execution share: a tiny study, and a trainer that only pretends."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from trying import SCALE

sys.path.append(str(Path(__file__).parents[1] / "faults"))

from toys import STUDY, TINY, epoch, metrics, result, started, stepped

from core.events import CheckpointSaved, Diverged
from workbench import bands, gate
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study

PROFILE = """\
looks: {seeds: [2], alpha: [0.05]}
margins: {ap: 0.02}
set:
  model.hidden_dim: 32
  model.num_heads: 4
  model.ffn_dim: 48
  model.backbone: {kind: small_resnet, width: 8}
  model.extra_levels: 0
  model.encoder: {num_layers: 0, attention: {num_points: 2}}
  model.decoder: {num_layers: 2, attention: {num_points: 2}}
  model.queries.num_queries: 10
  data: {kind: coco, resize: {kind: fixed, height: 48, width: 64}, augmentation: flip}
  evaluation.training_subset: 2
  training: {epochs: 3, batch_size: 2, lr: 2.0e-3, lr_backbone: 2.0e-3, ema_decay: 0.9}
"""
TOY_STUDY = STUDY.format(name="toy")
EVERY, PACE = 2, 2.0  # steps of an epoch, seconds of a step


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


@pytest.fixture
def client(store, empty_database):
    """Return a client of the store's embedded MLflow."""
    from mlflow import MlflowClient

    store.mlflow_database.write_bytes(empty_database.read_bytes())
    return MlflowClient(f"sqlite:///{store.mlflow_database}")


@pytest.fixture
def ref(store, toy_plan):
    """Register the toy plan and start its look."""
    ref = store.register(toy_plan, source="study: toy")
    store.start_look(ref, 1)
    return ref


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
        on_event(started(step, self.steps, EVERY))
        while step < self.steps:
            self.before_step(step + 1)
            step += 1
            on_event(stepped(step, EVERY, pace=PACE))
            if step % EVERY == 0:
                on_event(epoch(step, EVERY, pace=PACE, parameters="averaged"))
                checkpoint.write_text(json.dumps(step))
                on_event(CheckpointSaved(step=step, path=checkpoint.name))
            if should_stop():
                checkpoint.write_text(json.dumps(step))
                return result("interrupted", step, f"weights-{step}", checkpoint, pace=PACE)
        if self.outcome == "diverged":
            on_event(Diverged(step=step, reason="the loss is nan"))
        return result(self.outcome, step, f"weights-{step}", checkpoint, pace=PACE)

    def evaluate(self, _config, evaluation, **_):
        """Give every checkpoint an AP of .25."""
        self.calls.append(f"evaluate {evaluation.parameters}")
        predictions = {"image_id": np.arange(3), "score": np.array([0.9, 0.5, 0.1], dtype=np.float32)}
        return SimpleNamespace(metrics=metrics(0.25), predictions=predictions, seconds=0.1)


@pytest.fixture(scope="session")
def toy_trainer():
    """Return the class of a trainer that pretends to train."""
    return ToyTrainer


def _nothing(_step):
    """Before a step that goes well."""


@pytest.fixture
def asked_without_file(toy_study, tmp_path):
    """Return what a gate is asked for, but its official file: the toy study, a tiny model, a folder of 7 pictures."""
    from evaluated import make_folder  # brings torch

    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tiny.yaml").write_text(PROFILE)
    return gate.Asked(profile="tiny", study=toy_study, data=make_folder(tmp_path / "coco"))


@pytest.fixture
def asked(asked_without_file, tmp_path, monkeypatch):
    """Return the same with a file that stands for an official one: its recipe and AP are found at once."""
    path = tmp_path / "official.pth"
    path.write_bytes(b"stands for 160 MB")
    monkeypatch.setattr(gate, "_official", lambda *_: ("deformable", 50))
    monkeypatch.setattr(gate, "scored", lambda *_: {"ap": 0.445, "num_pictures": 3})
    return replace(asked_without_file, checkpoint=path)


@pytest.fixture
def few_steps(monkeypatch):
    """Let a gate train four steps, compared in windows of two."""
    for name, value in (("STEPS", 4), ("WINDOW", 2), ("SEEDS", 2)):
        monkeypatch.setattr(bands, name, value)
