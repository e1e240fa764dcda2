"""Parts of a batch, one after another or in several processes, add up to the batch as a whole."""

import os
from unittest import mock

import pytest
import torch
from toggles import BASES, put
from torch import distributed, multiprocessing

import core.trainer
from core.config import DN, MatchedExtra, ResNet
from core.data.batching import training_batch, training_parts
from core.data.splits import open_data
from core.detector import DetrDetector, build_detector
from core.distributed import ALONE, World
from core.events import CheckpointSaved
from core.trainer import Trainer
from core.training import train

CPU = torch.device("cpu")
# Frozen norms and pictures of one size: nothing that a picture's company would change.
SHARED = [
    (("model", "backbone"), ResNet(depth=18, frozen_stages=0)),
    (("training", "clip_norm"), None),
    (("data", "num_train"), 16),
    (("training", "epochs"), 3),
]
CONFIGS = {
    "deformable": put(BASES["deformable"], *SHARED),
    "detr": put(BASES["detr"], *SHARED),
    "two_stage": put(BASES["deformable_two_stage"], *SHARED),
    "cdn": put(BASES["dino"], *SHARED),
    "dn": put(BASES["anchors"], *SHARED, (("model", "denoising"), DN(groups=2))),
    "matched": put(BASES["anchors"], *SHARED, (("model", "denoising"), MatchedExtra(groups=2))),
    "random_boxes": put(BASES["anchors"], *SHARED, (("model", "queries", "anchors"), "random")),
    "no_auxiliary": put(BASES["deformable_two_stage"], *SHARED, (("loss", "auxiliary"), False)),
}
ACCUMULATE = (("training", "accumulate"), 2)


def _exact(*arguments, **values):
    """Build a detector in double precision: a rounded sampling position could fall into the next cell."""
    return build_detector(*arguments, **values).double()


def _first_step(config, world=ALONE):
    """Return losses and gradient of the first step, computed in double precision up to the loss."""
    with mock.patch.object(core.trainer, "build_detector", _exact):
        trainer = Trainer(config, seed=0, data=open_data(config.data, root=None, cache=None), device=CPU, world=world)
    for module in trainer.detector.modules():  # zero starts would hide most of the gradient
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    losses, norm = trainer.step()
    gradients = {n: p.grad.clone() for n, p in trainer.detector.named_parameters() if p.grad is not None}
    return losses, norm, {name: gradient for name, gradient in gradients.items() if gradient.any()}


def _process(rank, folder):
    """Be one of two processes: take the first step of every configuration, then train one to its end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank=rank, size=2)
    found = {}
    for name, config in CONFIGS.items():
        found[name] = _first_step(config, world)
    found["deformable, accumulated"] = _first_step(put(CONFIGS["deformable"], ACCUMULATE), world)
    found["cdn, accumulated"] = _first_step(put(CONFIGS["cdn"], ACCUMULATE), world)
    config = CONFIGS["deformable"]
    events, asked = [], []

    def stop():
        asked.append(1)
        return rank == 1 and len(asked) == 3  # the second process alone is asked, after three steps

    runs = []
    for should_stop in (stop, lambda: False):
        result = train(
            config,
            seed=0,
            data=open_data(config.data, root=None, cache=None),
            checkpoints=folder / "checkpoints",
            on_event=events.append,
            should_stop=should_stop,
            device=CPU,
            world=world,
        )
        runs.append((result.outcome, result.step, result.weights_hash, str(result.checkpoint)))
    torch.save(
        {
            "first": found,
            "runs": runs,
            "events": [type(e).__name__ for e in events],
            "diverged": _one_diverges(config, world, folder),
            "apart": _resume_apart(config, world, folder),
        },
        folder / f"{rank}.pt",
    )
    distributed.destroy_process_group()


def _run(config, world, folder):
    """Train in a folder, to the end."""
    return train(
        config,
        seed=0,
        data=open_data(config.data, root=None, cache=None),
        checkpoints=folder,
        on_event=lambda _: None,
        should_stop=lambda: False,
        device=CPU,
        world=world,
    )


def _one_diverges(config, world, folder):
    """Let the second process alone meet a number that is not finite, in its second step; return how both end."""
    calls = []

    def loss(self, batch, generator):
        calls.append(1)
        if world.rank == 1 and len(calls) == 2:
            raise FloatingPointError("a cost is not finite")
        return whole(self, batch, generator)

    whole = DetrDetector.loss
    with mock.patch.object(DetrDetector, "loss", loss):
        result = _run(config, world, folder / "diverging")
    return result.outcome, result.reason, result.step


def _resume_apart(config, world, folder):
    """Let the second process look for checkpoints elsewhere; return what each is told."""
    try:
        _run(config, world, folder / ("checkpoints" if world.rank == 0 else "empty"))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Return what each of two gloo processes saw."""
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(_process, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _assert_same_step(found, expected):
    losses, norm, gradients = found
    assert losses.keys() == expected[0].keys()
    for name, value in losses.items():
        assert value == pytest.approx(expected[0][name], rel=1e-5), name
    assert norm == pytest.approx(expected[1], rel=1e-5)
    assert gradients.keys() == expected[2].keys()
    whole = torch.stack([gradient.norm() for gradient in expected[2].values()]).norm()
    apart = {name: (gradient - expected[2][name]).norm() for name, gradient in gradients.items()}
    assert torch.stack(list(apart.values())).norm() / whole < 1e-6
    assert max(float(distance) for distance in apart.values()) < 1e-5


@pytest.mark.ci
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_equal_one_on_the_joint_batch(name, two_processes):
    """Losses and gradients agree to 1e-5, also of denoising, whose groups follow the fullest picture of both."""
    expected = _first_step(CONFIGS[name])
    for seen in two_processes:
        _assert_same_step(seen["first"][name], expected)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["deformable", "cdn"])
def test_two_processes_that_accumulate_equal_one_batch(name, two_processes):
    """Two processes of two parts each give what one batch gives."""
    _assert_same_step(two_processes[0]["first"][f"{name}, accumulated"], _first_step(CONFIGS[name]))


@pytest.mark.ci
def test_processes_stop_and_go_on_together(two_processes):
    """When one is asked to stop, both do after the same step; resumed, they end at the same weights."""
    first, second = (seen["runs"] for seen in two_processes)
    assert first == second
    assert [(outcome, step) for outcome, step, *_ in first] == [("interrupted", 3), ("finished", 12)]


@pytest.mark.ci
def test_the_first_process_alone_tells_and_writes(two_processes):
    """Events come from one process; the checkpoint that it wrote is the one that both know."""
    told = [seen["events"] for seen in two_processes]
    assert told[0].count(CheckpointSaved.__name__) >= 4
    assert told[1] == []


@pytest.mark.ci
def test_processes_diverge_together(two_processes):
    """A number that is not finite in one process ends the trial in both, with its reason; none waits for the other."""
    assert [seen["diverged"] for seen in two_processes] == [("diverged", "a cost is not finite", 1)] * 2


@pytest.mark.ci
def test_processes_that_find_different_checkpoints_are_refused(two_processes):
    """Processes that would go on from different steps are told which, and that they need one folder."""
    for seen in two_processes:
        assert "checkpoints of steps [12, 0]" in seen["apart"]
        assert "one folder that they share" in seen["apart"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulated_parts_equal_the_batch(name):
    """A batch in two parts, one after another, has the losses and gradients of the whole."""
    _assert_same_step(_first_step(put(CONFIGS[name], ACCUMULATE)), _first_step(CONFIGS[name]))


def test_parts_are_the_pictures_of_the_step_in_order():
    """Ranks and parts cut the step's batch into equal pieces without a gap."""
    config = put(CONFIGS["deformable"], ACCUMULATE)
    data = open_data(config.data, root=None, cache=None)
    whole = training_batch(data, config, seed=3, step=2)
    for size in (1, 2):
        parts = [
            part for rank in range(size) for part in training_parts(data, config, seed=3, step=2, rank=rank, size=size)
        ]
        assert len(parts) == 2 * size
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_a_batch_that_does_not_divide_is_refused():
    """The error names both numbers and what to set."""
    with pytest.raises(ValueError, match="make it a multiple of 3"):
        training_parts(None, CONFIGS["deformable"], seed=0, step=0, rank=0, size=3)


def test_a_world_needs_its_process_group():
    """Several processes without a group, or a rank that does not exist, are told."""
    with pytest.raises(ValueError, match="init_process_group first"):
        World(rank=0, size=2)
    with pytest.raises(ValueError, match="ranks are 0 to 1"):
        World(rank=2, size=2)
