"""Room on the disk: what is estimated, refused, watched and told."""

import errno
import threading

import pytest

from core.config import ExperimentConfig
from core.detector import build_detector
from workbench import disk
from workbench.disk import Size
from workbench.errors import StoreError, WorkbenchError
from workbench.labels import size
from workbench.stopping import StopRequest
from workbench.trial import execute


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": {"kind": "small_resnet"}, "hidden_dim": 64, "ffn_dim": 128, "num_heads": 4},
        pytest.param({"backbone": {"kind": "resnet", "depth": 50}}, marks=pytest.mark.ci),
        pytest.param({"kind": "faster_rcnn", "backbone": {"kind": "resnet", "depth": 50}}, marks=pytest.mark.ci),
    ],
    ids=["laptop", "deformable", "faster_rcnn"],
)
def test_the_guess_of_parameters_is_right_within_a_factor_of_two(model):
    """The rule of the estimate, against detectors that are built."""
    config = ExperimentConfig.model_validate({"model": {"kind": "detr", **model}, "data": {"kind": "shapes"}})
    detector = build_detector(config, num_classes=91, seed=0)
    built = sum(parameter.numel() for parameter in detector.parameters())
    assert built / 2 < disk.parameters(config) < built * 2


def test_what_finished_trials_left_is_the_measure(store, toy_plan, toy_trainer):
    """Before a trial has finished its size is estimated; then the largest of them counts, checkpoint included."""
    specs = list(toy_plan.specs.values())
    assert disk.measured_size(store.root, [store.record(spec.trial_id) for spec in specs]) is None
    estimated = disk.expected_size(specs[0], None)
    assert estimated.checkpoint == 20 * disk.parameters(specs[0].config)
    assert estimated.predictions == 30 * 300 * 8 * len(specs[0].evaluations)
    for spec in specs[:2]:
        execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer())
    (store.trial_dir(specs[1].trial_id) / "checkpoints" / "toy.json").write_bytes(b"6" * 5000)
    measured = disk.measured_size(store.root, [store.record(spec.trial_id) for spec in specs])
    assert measured.checkpoint == 5000
    assert 500 < measured.predictions < 5000
    assert disk.expected_size(specs[2], measured) == measured
    everything = sum(path.stat().st_size for path in store.trial_dir(specs[1].trial_id).rglob("*") if path.is_file())
    assert disk.size_of(store.trial_dir(specs[1].trial_id)).total == everything


def _check(toy_plan, store, monkeypatch, *, free, quota=None, at_once=1):
    monkeypatch.setattr(disk, "free_bytes", lambda _: free)
    monkeypatch.setattr(disk, "expected_size", lambda *_: Size(checkpoint=100, predictions=10, rest=1))
    disk.check_room(store.root, [], list(toy_plan.specs.values()), at_once=at_once, quota_bytes=quota)


def test_trials_start_where_they_fit_and_only_there(toy_plan, store, monkeypatch):
    """Four trials leave 444 bytes, and two at work have two further checkpoints each; the reserve stays free."""
    needed = 4 * 111 + 2 * 200
    _check(toy_plan, store, monkeypatch, free=disk.RESERVE_BYTES + needed, at_once=2)
    with pytest.raises(WorkbenchError, match=r"runs: the 4 trials to run will write about 844 B \(estimated before"):
        _check(toy_plan, store, monkeypatch, free=disk.RESERVE_BYTES + needed - 1, at_once=2)
    disk.check_room(store.root, [], [], at_once=2, quota_bytes=None)  # nothing to run needs nothing


def test_a_quota_bounds_what_is_needed_and_has_a_least(toy_plan, store, monkeypatch):
    """With a quota the checkpoints of finished trials need no more than it; below those at work it is refused."""
    _check(toy_plan, store, monkeypatch, free=disk.RESERVE_BYTES + 300 + 200 + 4, quota=300)
    with pytest.raises(WorkbenchError, match=r"execution.quota is 299 B, .* take about 300 B: raise the quota"):
        _check(toy_plan, store, monkeypatch, free=10**12, quota=299)


@pytest.mark.parametrize("refused", [OSError("Stale file handle"), StoreError("result.json: cannot be read")])
def test_low_space_is_told_once(tmp_path, monkeypatch, refused):
    """The watch says once how much is left, and goes on making room, also when it could not for a while."""
    monkeypatch.setattr(disk, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(disk, "free_bytes", lambda _: 1000)
    told, errors, rounds, enough = [], [], [], threading.Event()

    def also():
        rounds.append(1)
        if len(rounds) == 4:
            enough.set()
        if len(rounds) < 3:
            raise refused

    with disk.watched(tmp_path, on_low=told.append, also=also, on_error=errors.append):
        assert enough.wait(timeout=10)
    assert (len(told), len(errors)) == (1, 2)
    assert "1.0 kB are free, less than the 256 MB that are to stay free: stopping" in told[0]


def test_a_stop_is_asked_for_though_nothing_can_be_written(tmp_path):
    """Where the wish cannot be put down, the driver still knows of it: trials end with the next that they write."""
    stop = StopRequest(tmp_path / "gone" / "stop", announce=lambda _: None)
    stop.stop()
    assert stop.requested()
    assert not stop.path.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_words(tmp_path, number):
    """A driver that cannot write says where and what to do, with the exit code of how far it had come."""
    told = r"plan.json: full. What is on record is whole; make room"
    with pytest.raises(StoreError, match=told) as raised, disk.in_words(tmp_path, exit_code=1):
        raise OSError(number, "Full", str(tmp_path / "plan.json"))
    assert (raised.value.exit_code, StoreError.exit_code) == (1, 2)


def test_other_errors_are_told_where_they_are_ours(tmp_path):
    """What the file system refuses inside the runs folder is told in words; anything else is not caught."""
    with pytest.raises(StoreError, match="input/output error"), disk.in_words(tmp_path):
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "a"))
    with pytest.raises(BrokenPipeError), disk.in_words(tmp_path):
        raise BrokenPipeError


def test_what_must_be_written_waits_for_room(monkeypatch):
    """A failure is put on record as soon as somebody else has given up room; what stays full is an error."""
    monkeypatch.setattr(disk, "_PATIENCE_SECONDS", 0.2)
    tries = []

    def write():
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    disk.patiently(write)
    assert len(tries) == 3
    with pytest.raises(OSError, match="No space"):
        disk.patiently(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (300_000_000, "300 MB")])
def test_bytes_in_words(count, said):
    """As people say them."""
    assert size(count) == said
