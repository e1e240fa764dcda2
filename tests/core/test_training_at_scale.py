"""Training with less memory, in lower precision, and with pictures read ahead: what changes, and what must not."""

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from toggles import BASES, put

import core.trainer
from core.config import DN, ContrastiveDN
from core.data.splits import DataProblem, open_data
from core.events import EpochFinished
from core.trainer import Trainer
from core.training import train

CPU = torch.device("cpu")
DROPOUT = (("model", "dropout"), 0.1)
LONGER = (("training", "epochs"), 3)  # six steps
RECIPES = {
    "deformable": BASES["deformable"],
    "accumulated": put(BASES["deformable"], (("training", "accumulate"), 2), DROPOUT),
    "dn": put(BASES["anchors"], (("model", "denoising"), DN(groups=2)), DROPOUT),
    "cdn, accumulated": put(
        BASES["dino"], (("model", "denoising"), ContrastiveDN(num_queries=8)), (("training", "accumulate"), 2), DROPOUT
    ),
    "detr": put(BASES["detr"], DROPOUT),
    "faster_rcnn": BASES["faster_rcnn"],
}


def _trainer(config):
    return Trainer(config, seed=0, data=open_data(config.data, root=None, cache=None), device=CPU)


def _train(config, folder, *, stop_after=None):
    """Train to the end, or until asked to stop after some steps; return the result and the events."""
    events, asked = [], []

    def should_stop():
        asked.append(1)
        return stop_after is not None and len(asked) >= stop_after

    data = open_data(config.data, root=None, cache=None)
    result = train(
        config, seed=0, data=data, checkpoints=folder, on_event=events.append, should_stop=should_stop, device=CPU
    )
    return result, events


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_training_is_bit_exact_with_every_toggle_on(name, tmp_path):
    """With denoising, averages, dropout and accumulation a trial that was stopped ends at the same weights."""
    config = put(RECIPES[name], LONGER)
    whole, _ = _train(config, tmp_path / "whole")
    first, _ = _train(config, tmp_path / "broken", stop_after=3)
    second, _ = _train(config, tmp_path / "broken")
    assert (first.outcome, second.outcome, second.step) == ("interrupted", "finished", 6)
    assert second.weights_hash == whole.weights_hash


@pytest.mark.parametrize("workers", [1, 2])
def test_pictures_read_ahead_are_the_same(workers, tmp_path):
    """Any number of reading processes gives the weights of none, bit for bit, and they end with the training."""
    config = put(RECIPES["accumulated"], LONGER)
    alone, _ = _train(config, tmp_path / "alone")
    ahead, events = _train(put(config, (("training", "data_workers"), workers)), tmp_path / "ahead")
    assert ahead.weights_hash == alone.weights_hash
    shares = [event.data_share for event in events if isinstance(event, EpochFinished)]
    assert all(0 <= share <= 1 for share in shares)


class Unreadable:
    """Training pictures of which none can be read."""

    def __init__(self, pictures):
        self.picture_ids = pictures.picture_ids

    def __len__(self):
        return len(self.picture_ids)

    def read(self, index):
        """Fail, as a file does that was removed."""
        raise DataProblem(f"{index}.jpg: gone")


@pytest.mark.parametrize("ending", ["finished", "interrupted", "unreadable"])
def test_no_reader_outlives_its_training(ending, tmp_path):
    """The reading processes end with the training, however that ends; what stopped them is raised as it was."""
    config = put(BASES["deformable"], (("training", "data_workers"), 2), LONGER)
    others = set(multiprocessing.active_children())
    running = []

    def should_stop():
        running.append(len(set(multiprocessing.active_children()) - others))
        return ending == "interrupted"

    data = open_data(config.data, root=None, cache=None)
    if ending == "unreadable":
        data = replace(data, train=Unreadable(data.train))
    with pytest.raises(DataProblem, match="gone") if ending == "unreadable" else nullcontext():
        result = train(
            config, seed=0, data=data, checkpoints=tmp_path, on_event=id, should_stop=should_stop, device=CPU
        )
        assert (result.outcome, running[0]) == (ending, 2)
    assert set(multiprocessing.active_children()) == others


def test_readers_leave_stopping_to_the_training():
    """Ctrl-C reaches every process of a terminal; a reader ignores it, since the training asks for a last step."""
    config = put(BASES["deformable"], (("training", "data_workers"), 1), LONGER)
    trainer = _trainer(config)
    others = set(multiprocessing.active_children())
    trainer.step()
    (reader,) = set(multiprocessing.active_children()) - others
    os.kill(reader.pid, signal.SIGINT)
    for _ in range(5):
        trainer.step()
    assert trainer.num_step == trainer.total_steps
    trainer.close()
    assert not reader.is_alive()


@pytest.mark.parametrize("name", ["accumulated", "dn", "detr"])
def test_activation_checkpointing_changes_nothing_but_memory(name):
    """Layers computed again in the backward pass give the same weights bit for bit, dropout included."""
    config = RECIPES[name]
    ends = []
    for checkpointing in (False, True):
        trainer = _trainer(put(config, (("training", "activation_checkpointing"), checkpointing)))
        for _ in range(2):
            trainer.step()
        ends.append(trainer.detector.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("base", ["deformable_two_stage", "dino", "detr", "faster_rcnn"])
def test_lower_precision_trains_without_nan(base, precision):
    """Twenty steps have finite losses that fall, and leave fp32 weights; fp16 scales its loss for that."""
    config = put(BASES[base], (("training", "precision"), precision), (("training", "epochs"), 20))
    trainer = _trainer(config)
    totals = [trainer.step()[0]["total"] for _ in range(20)]
    assert all(math.isfinite(total) for total in totals)
    assert sum(totals[-5:]) < 0.95 * sum(totals[:5])
    assert {p.dtype for p in trainer.detector.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in trainer.detector.parameters())


def test_an_overflowing_fp16_step_is_skipped_and_counted(tmp_path):
    """The weights stay, the scale is lowered, the events count the step, and the trial goes on."""
    config = put(BASES["deformable"], (("training", "precision"), "fp16"), LONGER)
    trainer = _trainer(config)
    before = {name: value.clone() for name, value in trainer.detector.state_dict().items()}
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    losses, norm = trainer.step()
    assert math.isfinite(losses["total"])
    assert not math.isfinite(norm)
    weights = [name for name, _ in trainer.detector.named_parameters()]
    assert all(torch.equal(before[name], trainer.detector.state_dict()[name]) for name in weights)
    assert trainer.scaler.get_scale() == 2.0**39
    sums = core.trainer.Sums({})
    sums.add(losses, norm, seconds=1.0, waited=0.0)
    assert sums.means(4)["skipped_steps"] == 1


def test_an_fp16_gradient_that_no_scale_helps_diverges(monkeypatch):
    """Once the loss is not scaled up any more, an infinite gradient is an outcome, not a step to skip."""
    trainer = _trainer(put(BASES["deformable"], (("training", "precision"), "fp16"), LONGER))
    monkeypatch.setattr(core.trainer, "gradient_norm", lambda _: torch.tensor(math.inf))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.step()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(FloatingPointError, match="gradient norm inf at step 1"):
        trainer.step()


def test_the_scale_of_fp16_survives_a_resumption(tmp_path):
    """A checkpoint holds the loss scale, so a resumed fp16 trial ends at the same weights."""
    config = put(BASES["deformable"], (("training", "precision"), "fp16"), LONGER)
    whole, _ = _train(config, tmp_path / "whole")
    _train(config, tmp_path / "broken", stop_after=3)
    assert _train(config, tmp_path / "broken")[0].weights_hash == whole.weights_hash


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: apt-get install g++")
def test_a_compiled_backbone_computes_the_same():
    """The losses agree, the weights keep their names, and the average is updated all the same."""
    ends = []
    for compiled in (False, True):
        trainer = _trainer(put(BASES["deformable"], (("training", "compile"), compiled)))
        ends.append(([trainer.step()[0]["total"] for _ in range(2)], trainer))
    (eager, first), (compiled, second) = ends
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert first.detector.state_dict().keys() == second.detector.state_dict().keys()
    assert second.averaged.model.state_dict().keys() == second.detector.state_dict().keys()


def test_without_a_compiler_the_key_is_named(monkeypatch):
    """Where torch cannot compile, the error says which key asks for it and what to install."""

    def fail(_function):
        raise RuntimeError("no C++ compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RuntimeError, match=r"training.compile: .*no C\+\+ compiler.*install a C\+\+ compiler"):
        _trainer(put(BASES["deformable"], (("training", "compile"), True)))


MEMORY = """
import sys
from pathlib import Path
import torch
from toggles import BASES, put
from core.data.splits import open_data
from core.training import train

def peak(side, folder):
    config = put(BASES["deformable"], (("data", "side"), side), (("data", "num_val"), 1))
    config = put(config, (("model", "hidden_dim"), 32 if side == 64 else 128))
    data = open_data(config.data, root=None, cache=None)
    result = train(config, seed=0, data=data, checkpoints=Path(folder), on_event=lambda e: None,
                   should_stop=lambda: False, device=torch.device("cpu"))
    return result.peak_memory_bytes / 2**20

alone = peak(64, sys.argv[1] + "/a")
big = peak(512, sys.argv[1] + "/b")
after = peak(64, sys.argv[1] + "/c")
print(alone, big, after)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's peak can be reset on Linux only")
def test_peak_memory_is_of_the_trial_alone(tmp_path):
    """A small trial after a big one in the same process has the peak of a small one."""
    path = ":".join(sys.path)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": path, "PATH": "/bin"}
    )
    assert done.returncode == 0, done.stderr
    alone, big, after = map(float, done.stdout.split())
    assert big > alone + 400
    assert after < alone + 0.25 * (big - alone)


LARGE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from toggles import put
from core.config import ExperimentConfig, Shapes
from core.data.pictures import DataSplits
from core.data.splits import open_data
from core.memory import peak_memory_bytes
from core.recipes import RECIPES
from core.trainer import Trainer
from core.data.transforms import resize_to

config = RECIPES["deformable_two_stage"].model_dump(mode="json")
config["data"] = {"kind": "shapes", "side": 640, "num_train": 4, "num_val": 1, "augmentation": "none"}
config["training"] |= {"batch_size": 2, "activation_checkpointing": True, "epochs": 1}
config = ExperimentConfig.model_validate(config)
data = open_data(config.data, root=None, cache=None)

class Landscape:
    def __init__(self, pictures):
        self.pictures = pictures
        self.picture_ids = pictures.picture_ids
    def __len__(self):
        return len(self.pictures)
    def read(self, index):
        return resize_to(self.pictures.read(index), height=480, width=640)

trainer = Trainer(config, seed=0, data=replace(data, train=Landscape(data.train)), device=torch.device("cpu"))
losses = [trainer.step()[0]["total"] for _ in range(2)]
print(peak_memory_bytes(torch.device("cpu")) / 1e9, *losses)
"""


@pytest.mark.ci
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's peak can be reset on Linux only")
def test_the_published_two_stage_model_trains_in_6_gb():
    """Two steps of Deformable DETR ++two-stage, ResNet-50, 640 x 480, two pictures, with activation checkpointing."""
    path = ":".join(sys.path)
    command = [sys.executable, "-c", LARGE]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": path, "PATH": "/bin"}
    )
    assert done.returncode == 0, done.stderr
    gigabytes, *losses = map(float, done.stdout.split())
    assert all(math.isfinite(loss) for loss in losses)
    assert gigabytes < 6.0
