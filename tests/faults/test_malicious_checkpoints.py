"""Checkpoints of strangers that mean harm: each is refused in words, and what it wanted to happen has not happened."""

import hashlib
import pickle
import random
import zipfile
from functools import partial

import pytest
import torch
from mutants import PROFILE
from strangers import HEAD, TINY, Payload

from core.checkpoint import CheckpointProblem, read_safely
from core.checkpoint_files import sidecar_of
from core.config import ExperimentConfig
from workbench import cli
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute


def test_the_payload_does_run_where_nothing_guards(tmp_path):
    """Else the tests below would prove nothing."""
    folder = tmp_path / "proof"
    path = tmp_path / "file.pt"
    torch.save({"model": Payload(folder)}, path)
    torch.load(path, weights_only=False)
    assert folder.is_dir()


_FORMS = {
    "archive": (torch.save, "holds a posix.mkdir, which reading would run as code"),
    "older form": (
        partial(torch.save, _use_new_zipfile_serialization=False),
        "holds a posix.mkdir, which reading would run as code",
    ),
    "bare pickle": (
        lambda state, path: path.write_bytes(pickle.dumps(state)),
        "cannot be read as a torch checkpoint: it is none",
    ),
}


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("ours", [False, True])
def test_evaluate_refuses_a_malicious_checkpoint(tmp_path, proof, capsys, form, ours):
    """In any form, dressed as ours or as an official file: exit code 2 and one line that does not say to trust it."""
    path = tmp_path / "step_000000001.pt"
    save, told = _FORMS[form]
    save({"format": 1, "raw": Payload(proof), "config": {}} if ours else {"model": Payload(proof)}, path)
    assert cli.main(["evaluate", "--checkpoint", str(path), "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.splitlines()) == 1
    assert "weights_only" not in said


def test_a_trial_does_not_go_on_from_a_malicious_checkpoint(tmp_path, proof):
    """A checkpoint in a runs folder whose checksum holds is still only read as tensors: the trial fails and says so."""
    path = tmp_path / "toy.yaml"
    path.write_text(HEAD + "variants: {v0: {}, v1: {set: {loss.weight_giou: 4.0}}}\n")
    plan = make_plan(load_study(path, Selection(profile="smoke", seeds=1, sets=TINY)))
    store = Store(tmp_path / "runs")
    spec = plan.specs[plan.trials[0].trial_id]
    checkpoint = store.trial_dir(spec.trial_id) / "checkpoints" / "step_000000001.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"format": 1, "step": 1, "raw": Payload(proof)}, checkpoint)
    sidecar_of(checkpoint).write_text(hashlib.sha256(checkpoint.read_bytes()).hexdigest())
    assert execute(spec, store.root, should_stop=lambda: False) == "failed"
    error = store.record(spec.trial_id).error
    assert "posix.mkdir, which reading would run as code" in error["message"]


@pytest.mark.parametrize(
    "backbone",
    [
        "{kind: resnet, depth: 18, frozen_stages: 0, weights: FILE}",
        "{kind: timm, name: resnet18, frozen_stages: 0, weights: FILE}",
    ],
    ids=["torchvision", "timm"],
)
def test_malicious_pretrained_weights_are_not_run(tmp_path, proof, backbone):
    """Weights that a study names are read as tensors alone, by our own reader and by timm's."""
    weights = tmp_path / "weights.pt"
    torch.save({"conv1.weight": Payload(proof)}, weights)
    path = tmp_path / "weights.yaml"
    named = backbone.replace("FILE", str(weights))
    path.write_text(HEAD + f"variants: {{v0: {{set: {{model.backbone: {named}, model.extra_levels: 0}}}}}}\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tiny.yaml").write_text(PROFILE)
    plan = make_plan(load_study(path, Selection(profile="tiny", seeds=1)))
    store = Store(tmp_path / "runs")
    (spec,) = plan.specs.values()
    assert execute(spec, store.root, should_stop=lambda: False) == "failed"
    error = store.record(spec.trial_id).error
    assert error["class"] == "bad_config", error
    assert str(weights) in error["message"]
    assert "posix.mkdir, which reading would run as code" in error["message"]


def _packed(path):
    """Write an archive that is small and holds much."""
    torch.save({"model": {"w": torch.zeros(1 << 22)}}, path)
    with zipfile.ZipFile(path) as plain:
        parts = {part.filename: plain.read(part) for part in plain.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    assert path.stat().st_size < 1 << 16


def _ours(**changes):
    config = ExperimentConfig().model_dump(mode="json")
    return {"format": 1, "raw": {}, "averaged": None, "config": config, "classes": {1: "a"}, **changes}


def _asking_for_much():
    config = ExperimentConfig().model_dump(mode="json")
    config["model"]["queries"]["num_queries"] = 10**11
    return _ours(config=config)


def _holding_itself():
    config: dict[str, object] = {}
    config["model"] = config
    return _ours(config=config)


_SAVED = {
    "tensor of terabytes": ({"model": {"w": torch.zeros(1).expand(1 << 42)}}, "larger than what is stored of it"),
    "sparse": ({"model": {"w": torch.zeros(4, 4).to_sparse()}}, "larger than what is stored of it"),
    "terabytes deep inside": ({"a": [{"b": (torch.zeros(1).expand(1 << 42),)}]}, "larger than what is stored of it"),
    "detector of terabytes": (_asking_for_much(), "its weights do not fit the detector"),
    "configuration that holds itself": (_holding_itself(), "its configuration is of another version"),
    "weights that are none": (_ours(raw=[1]), "raw or averaged holds no weights"),
    "weights without names": (_ours(raw={1: torch.zeros(1)}), "raw or averaged holds no weights"),
    "no averaged weights": (
        {key: value for key, value in _ours().items() if key != "averaged"},
        "raw or averaged holds no weights",
    ),
    "classes that are none": (_ours(classes=7), "classes holds no names"),
    "classes without names": (_ours(classes={1: None}), "classes holds no names"),
}


@pytest.mark.parametrize("what", _SAVED)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(tmp_path, capsys, what):
    """A small file asks for no more memory than it has bytes, and wrong parts of ours are told in one line."""
    state, told = _SAVED[what]
    path = tmp_path / "step_000000001.pt"
    torch.save(state, path)
    assert cli.main(["evaluate", "--checkpoint", str(path), "--data", str(tmp_path), "--allow-code"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """A small archive that would become a large one is none of torch's, which packs nothing."""
    path = tmp_path / "bomb.pt"
    _packed(path)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointProblem, match="bytes that would become 167"):
        read_safely(path)


@pytest.mark.parametrize("old_form", [False, True])
def test_no_damaged_checkpoint_raises_anything_else(tmp_path, old_form):
    """Of 300 files with changed, lost or repeated bytes each is read or refused in words, in either form of torch's."""
    path = tmp_path / "file.pt"
    state = {"model": {"a": torch.arange(6.0), "b": torch.ones(2, 3)}, "step": 7, "names": ["x", "y"]}
    torch.save(state, path, _use_new_zipfile_serialization=not old_form)
    whole = path.read_bytes()
    refused = 0
    for number in range(300):
        rng = random.Random(number)
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice((1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
        path.write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)
        try:
            read_safely(path)
        except CheckpointProblem:
            refused += 1
    assert refused > 100
