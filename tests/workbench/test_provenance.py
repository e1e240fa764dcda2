"""What a result says of where it comes from."""

import json
import shutil

import core
from workbench import provenance


def test_it_is_complete_without_git(monkeypatch):
    """On a machine without git the revision is unknown and everything else is told."""
    provenance.git.cache_clear()
    monkeypatch.setenv("PATH", "")
    found = json.loads(json.dumps(provenance.collect(threads=2, device="cpu")))
    monkeypatch.undo()
    provenance.git.cache_clear()
    assert (found["git_revision"], found["git_dirty"]) == (None, None)
    assert (found["threads"], found["device"], found["gpus"]) == (2, "cpu", [])
    assert found["versions"]["torch"] == found["torch"] is not None
    assert found["cores"] >= 1


def test_the_code_hash_follows_the_detectors_code(monkeypatch, tmp_path):
    """Any change of a Python file in core changes it, and nothing else does."""
    copy = tmp_path / "core"
    shutil.copytree(core.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(core, "__path__", [str(copy)])
    hashed = provenance.code_hash.__wrapped__
    before = hashed()
    (copy / "notes.txt").write_text("not code")
    assert hashed() == before
    (copy / "boxes.py").write_text((copy / "boxes.py").read_text() + "\n")
    assert hashed() != before
