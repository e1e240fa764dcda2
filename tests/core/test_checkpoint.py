"""Checkpoints: what is durable, and what a damaged one costs."""

import os
import resource

import pytest
import torch

from core.checkpoint import CheckpointProblem, load_checkpoint, load_newest, save_checkpoint, weights_hash
from core.checkpoint_files import is_intact, keep_only


def _state(value):
    return {"raw": {"weight": torch.full((3,), float(value))}}


def test_the_newest_two_are_kept(tmp_path):
    """Saving a third drops the first, with its checksum."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, _state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000000002.pt",
        "step_000000002.pt.sha256",
        "step_000000003.pt",
        "step_000000003.pt.sha256",
    ]
    state, path = load_newest(tmp_path)
    assert (state["step"], path.name) == (3, "step_000000003.pt")
    assert torch.equal(state["raw"]["weight"], torch.full((3,), 3.0))


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "no checksum", "deleted"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    """Whatever befell the newest file, the previous one is loaded."""
    save_checkpoint(tmp_path, 1, _state(1))
    newest = save_checkpoint(tmp_path, 2, _state(2))
    content = bytearray(newest.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif damage == "truncated":
        newest.write_bytes(content[:-10])
    elif damage == "no checksum":
        newest.with_name(newest.name + ".sha256").unlink()
    else:
        newest.unlink()
    assert not is_intact(newest)
    assert load_newest(tmp_path)[0]["step"] == 1


@pytest.mark.parametrize(
    ("damage", "reason", "left"),
    [
        ("flipped byte", "damaged", {".damaged", ".damaged.sha256"}),
        ("checksum that is no text", "damaged", {".damaged", ".damaged.sha256"}),
        ("no checksum", "damaged", {".damaged"}),
        ("deleted", "missing", {".damaged.sha256"}),
    ],
)
def test_a_damaged_checkpoint_is_told_and_set_aside(tmp_path, damage, reason, left):
    """What is passed over is named with the reason and kept under another name, where no later reader meets it."""
    save_checkpoint(tmp_path, 1, _state(1))
    newest = save_checkpoint(tmp_path, 2, _state(2))
    sidecar = newest.with_name(newest.name + ".sha256")
    if damage == "flipped byte":
        content = bytearray(newest.read_bytes())
        content[100] ^= 1
        newest.write_bytes(content)
    elif damage == "checksum that is no text":
        sidecar.write_bytes(b"\xff" + sidecar.read_bytes()[1:])
    else:
        (sidecar if damage == "no checksum" else newest).unlink()
    told = []
    assert load_newest(tmp_path, on_passed_over=told.append)[0]["step"] == 1
    assert [(one.name, one.reason) for one in told] == [("step_000000002.pt", reason)]
    assert {path.name.removeprefix("step_000000002.pt") for path in tmp_path.glob("step_000000002*")} == left
    assert load_newest(tmp_path, on_passed_over=told.append)[0]["step"] == 1
    assert len(told) == 1


def test_a_second_one_set_aside_does_not_replace_the_first(tmp_path):
    """A step whose checkpoint is damaged twice leaves both, by number."""
    for _ in range(2):
        save_checkpoint(tmp_path, 1, _state(1)).write_bytes(b"")
        assert load_newest(tmp_path, on_passed_over=lambda _: None) is None
    assert {path.name for path in tmp_path.glob("*.damaged*")} == {
        "step_000000001.pt.damaged",
        "step_000000001.pt.damaged.sha256",
        "step_000000001.pt.damaged-2",
        "step_000000001.pt.damaged-2.sha256",
    }


@pytest.mark.parametrize("writes", [1, 2], ids=["the archive", "its checksum"])
def test_a_save_that_fails_leaves_the_earlier_ones_and_no_part(tmp_path, monkeypatch, writes):
    """On a disk with room for a part only, the last checkpoint stays whole, and what was written of the next goes."""
    save_checkpoint(tmp_path, 1, _state(1))
    synced, sync = [], os.fsync

    def full(handle):
        synced.append(handle)
        if len(synced) == writes:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, _state(2))
    assert load_newest(tmp_path)[0]["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step_000000001.pt", "step_000000001.pt.sha256"}


def test_what_the_file_system_says_is_told(tmp_path):
    """An archive that meets a limit in its middle is an error of the file system, which torch would hide."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 1, {"raw": {"weight": torch.zeros(10_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_only_one_is_kept_of_a_trial_that_ended(tmp_path):
    """Others go, with what a kill left of one; damaged ones that were set aside stay for whoever asks why."""
    save_checkpoint(tmp_path, 1, _state(1))
    last = save_checkpoint(tmp_path, 2, _state(2))
    (tmp_path / "step_000000003.tmp").touch()
    (tmp_path / "step_000000000.pt.damaged").touch()
    keep_only(last)
    assert {path.name for path in tmp_path.iterdir()} == {
        last.name,
        last.name + ".sha256",
        "step_000000000.pt.damaged",
    }


def test_nothing_to_load(tmp_path):
    """A folder without an intact checkpoint, or none at all, gives None."""
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


class _Malicious:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    """A pickle that would run code is refused."""
    path = tmp_path / "step_000000001.pt"
    torch.save({"format": 1, "raw": _Malicious()}, path)
    with pytest.raises(CheckpointProblem, match="holds a print, which reading would run as code"):
        load_checkpoint(path)
    assert capsys.readouterr().out == ""


def test_a_later_format_is_refused(tmp_path):
    """A checkpoint of another format says which one it has."""
    path = tmp_path / "step_000000001.pt"
    torch.save({"format": 9}, path)
    with pytest.raises(CheckpointProblem, match="format 9, this version reads 1"):
        load_checkpoint(path)


def test_weights_hash_sees_every_byte_and_name():
    """Equal weights hash equally; another value, name or dtype does not."""
    weight = torch.arange(4.0)
    reference = weights_hash({"a": weight})
    assert reference == weights_hash({"a": weight.clone()})
    assert (
        len(
            {
                reference,
                weights_hash({"b": weight}),
                weights_hash({"a": weight + 1e-7 * weight}),
                weights_hash({"a": weight.double()}),
            }
        )
        == 4
    )
