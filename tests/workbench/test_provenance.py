"""What a result says of where it comes from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_the_kernel_is_what_has_computed():
    """Nothing before the first attention, and torch is not loaded to find that out; then the form that was used."""
    code = (
        "import sys\n"
        "from workbench import provenance\n"
        "assert provenance.kernel() is None and 'torch' not in sys.modules\n"
        "import torch\n"
        "from core.model.sampling import sample_and_sum\n"
        "assert provenance.kernel() is None\n"
        "sample_and_sum(torch.ones(1, 4, 1, 4), ((2, 2),), torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))\n"
        "print(provenance.kernel())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"WORKBENCH_KERNEL": "torch"},
        cwd=Path(core.__path__[0]).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("torch\n", "")


def test_the_code_hash_follows_the_detectors_code(monkeypatch, tmp_path):
    """Any change of a source file in core changes it, be it Python or C++, and nothing else does."""
    copy = tmp_path / "core"
    shutil.copytree(core.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(core, "__path__", [str(copy)])
    hashed = provenance.code_hash.__wrapped__
    before = hashed()
    (copy / "notes.txt").write_text("not code")
    assert hashed() == before
    for name in ("boxes.py", "model/deformable.cpp", "model/deformable.h"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        after = hashed()
        assert after != before
        before = after
