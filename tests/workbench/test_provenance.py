"""What a result says of where it comes from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import core
from workbench import code_state, provenance


def clear():
    """Forget what was found of the working tree."""
    for known in (provenance.git, code_state.current, code_state._tree):
        known.cache_clear()


def test_it_is_complete_without_git(monkeypatch):
    """On a machine without git the revision is unknown and everything else is told."""
    clear()
    monkeypatch.setenv("PATH", "")
    found = json.loads(json.dumps(provenance.collect(threads=2, device="cpu", precision="bf16")))
    monkeypatch.undo()
    clear()
    assert (found["git_revision"], found["git_dirty"], found["diff"]) == (None, None, None)
    assert found["precision"] == "bf16"
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


def test_torchs_switches_are_told_where_torch_is_loaded():
    """What decides how sums are done is read from torch, without a warning of it, and without loading it."""
    code = (
        "import sys\n"
        "from workbench import provenance\n"
        "assert provenance.computed('cpu') == {'kernel': None, 'gpu': None, 'switches': {}}\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "torch.use_deterministic_algorithms(True)\n"
        "torch.set_float32_matmul_precision('high')\n"
        "found = provenance.computed('cpu')['switches']\n"
        "print(found['deterministic_algorithms'], found['matmul_precision'], found['cudnn_benchmark'])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(core.__path__[0]).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("True high False\n", "")


@pytest.mark.parametrize(
    ("shown", "names"),
    [
        (None, ("A100", "H100", "H100")),
        ("1", ("H100",)),
        ("2,0", ("H100", "A100")),
        ("GPU-aa", ("A100",)),
        ("", ()),
        ("MIG-7", ("A100",)),
    ],
)
def test_visible_gpus_are_those_that_are_named(monkeypatch, shown, names):
    """CUDA_VISIBLE_DEVICES names GPUs by number or by id, of several types perhaps."""
    listed = "0, GPU-aaaa, A100\n1, GPU-bbbb, H100\n2, GPU-cccc, H100"
    monkeypatch.setattr(code_state, "said_by", lambda *_: listed)
    monkeypatch.setattr(shutil, "which", lambda _: "nvidia-smi")
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert provenance.visible_gpus.__wrapped__() == names


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """Return a working tree of git that holds a package of the name core."""
    if shutil.which("git") is None:
        pytest.skip("needs git, whose working tree is looked at: apt-get install git")
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "config.py").write_text("WIDTH = 1\n")
    for command in (["init", "-q"], ["add", "core"], ["commit", "-qm", "first"]):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *command], check=True)
    monkeypatch.setattr(core, "__path__", [str(tmp_path / "core")])
    clear()
    yield tmp_path
    clear()


def test_changes_of_the_working_tree_are_kept_once(tree, tmp_path):
    """The difference to the revision is a text of its own, named by its content, with untracked sources listed."""
    assert code_state.current().diff is None
    clear()
    (tree / "core" / "config.py").write_text("WIDTH = 2\n")
    (tree / "core" / "new.py").write_text("pass\n")
    state = code_state.current()
    assert state.diff is not None
    assert {"-WIDTH = 1", "+WIDTH = 2"} <= set(state.diff.splitlines())
    assert state.diff.startswith("# untracked: core/new.py ")
    folder = tmp_path / "kept"
    code_state.keep(state, folder)
    code_state.keep(state, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(state.files())
    assert (folder / str(state.to_json()["diff"])).read_text() == state.diff
    assert f"torch=={provenance.installed('torch')}\n" in state.packages


def test_files_that_may_hold_secrets_are_no_part_of_the_changes(tree, monkeypatch):
    """Only sources of core and workbench are compared; a secret of the environment in one of them is hidden."""
    monkeypatch.setenv("MY_API_TOKEN", "abcdef-123456")
    (tree / ".env").write_text("PASSWORD=hunter2hunter2\n")
    (tree / "core" / "key.pem").write_text("private\n")
    (tree / "core" / "config.py").write_text("TOKEN = 'abcdef-123456'\nURI = 'https://me:hunter2@host/x'\n")
    subprocess.run(["git", "-C", str(tree), "add", "-f", ".env", "core/key.pem"], check=True)
    diff = code_state.current().diff or ""
    assert "TOKEN = '***'" in diff
    assert "https://***@host/x" in diff
    for secret in ("hunter2", "private", "abcdef", ".env", "pem"):
        assert secret not in diff


def test_large_changes_are_cut_off(tree, monkeypatch):
    """A file that was generated does not fill the records: the beginning is kept, and how much there was."""
    monkeypatch.setattr(code_state, "MOST_BYTES", 500)
    (tree / "core" / "config.py").write_text("x = 1\n" * 10_000)
    diff = code_state.current().diff or ""
    assert len(diff) < 600
    assert diff.splitlines()[-1].startswith("# cut off: ")
