"""What identifies the pictures of a trial, and the checks before anything starts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from core.config import CocoFolder, Shapes
from core.data.fingerprint import DataProblem, check_folder, fingerprint, inspect_folder
from core.data.splits import open_data

CONFIG = CocoFolder()
ANNOTATIONS = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "annotations": [],
    "categories": [{"id": 1, "name": "cell"}],
}


@pytest.fixture
def folder(tmp_path):
    """A folder whose outline is right; its pictures are only named and sized."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(ANNOTATIONS))
        (root / split).mkdir()
        (root / split / "a.jpg").write_bytes(b"12345")
    return root


def test_the_path_does_not_matter(folder, tmp_path):
    """A copy elsewhere is the same data, so its trials are too; so is a folder named in the configuration."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    assert fingerprint(CONFIG, root=copy) == fingerprint(CONFIG, root=folder)
    assert fingerprint(CocoFolder(root=str(copy)), root=None) == fingerprint(CONFIG, root=folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "val" / "b.jpg").write_bytes(b"1"),
        lambda root: (root / "train" / "a.jpg").write_bytes(b"1234567"),
        lambda root: (root / "train" / "a.jpg").rename(root / "train" / "b.jpg"),
        lambda root: (root / "annotations" / "instances_val.json").write_text(json.dumps(ANNOTATIONS) + " "),
    ],
    ids=["one more picture", "another size", "another name", "another annotation file"],
)
def test_other_data_is_another_fingerprint(folder, change):
    """Annotation bytes, names and sizes of pictures count, also within one process."""
    before = fingerprint(CONFIG, root=folder)
    change(folder)
    assert fingerprint(CONFIG, root=folder) != before


def test_what_is_no_picture_or_not_read_does_not_count(folder):
    """A note beside the pictures changes nothing; nor does val where tune is scored."""
    tune = CocoFolder(split="tune")
    before, before_tune = fingerprint(CONFIG, root=folder), fingerprint(tune, root=folder)
    (folder / "train" / "Thumbs.db").write_bytes(b"x")
    assert fingerprint(CONFIG, root=folder) == before
    (folder / "val" / "b.jpg").write_bytes(b"x")
    assert fingerprint(tune, root=folder) == before_tune
    assert before != before_tune


def test_an_edit_within_the_same_second_is_seen(folder):
    """Annotation digests are kept by size and time in nanoseconds; an edit of the same length counts."""
    path = folder / "annotations" / "instances_val.json"
    before = fingerprint(CONFIG, root=folder)
    stat = path.stat()
    path.write_text(json.dumps(ANNOTATIONS).replace("cell", "call"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(CONFIG, root=folder) != before


def test_drawn_shapes_are_known_by_their_generator():
    """No folder is needed, and sizes and numbers are the configuration's own identity."""
    assert fingerprint(Shapes(), root=None) == fingerprint(Shapes(side=64), root=None) == "shapes-2"
    assert check_folder(Shapes(), None) == []


def test_a_usable_folder_has_no_problems(folder):
    """The checks find nothing to say."""
    assert check_folder(CONFIG, folder) == []


def _spoil(key, value):
    def change(root):
        (root / "annotations" / "instances_val.json").write_text(json.dumps(ANNOTATIONS | {key: value}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"data: a folder of pictures was looked for, nothing is there; name it with --data DIR"),
        (
            lambda root: (root / "annotations" / "instances_val.json").unlink(),
            r"annotations/instances_val.json: no such file, nor instances_val2017.json; --data needs a folder with",
        ),
        (
            lambda root: shutil.rmtree(root / "val"),
            r"data/val: no such folder, nor val2017; --data needs a folder with",
        ),
        (
            lambda root: (root / "annotations" / "instances_val.json").write_text("{oops"),
            r"instances_val.json: is not JSON \(Expecting property name.*another folder with --data",
        ),
        (
            lambda root: (root / "annotations" / "instances_val.json").write_bytes(b"\xff\xfe\xfa"),
            r"instances_val.json: is not JSON",
        ),
        (
            lambda root: (root / "annotations" / "instances_val.json").write_text("[]"),
            r"instances_val.json: holds a list, not a JSON object",
        ),
        (_spoil("categories", None), r"instances_val.json: has no list 'categories', found \['annotations', "),
        (_spoil("categories", []), r"instances_val.json: the list 'categories' names no class"),
        (_spoil("images", []), r"instances_val.json: the list 'images' is empty"),
        (
            _spoil("categories", [{"id": 1, "name": "dust"}]),
            r"data: category 1 is 'cell' in train and 'dust' in val; export both with the same ones",
        ),
        (
            lambda root: (root / "val" / "a.jpg").unlink(),
            r"data/val: holds none of the 1 pictures that .*instances_val.json names",
        ),
    ],
)
def test_an_unusable_folder_says_what_and_where(folder, change, message):
    """One line for a problem: the path, what was found, and what to do."""
    change(folder)
    (problem,) = check_folder(CONFIG, folder)
    assert re.search(message, problem)


def test_all_problems_are_told_at_once(folder):
    """Both splits are looked at before anything is said."""
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_text("?")
    assert len(check_folder(CONFIG, folder)) == 2


def test_annotations_alone_can_be_planned_with(folder):
    """Without its pictures a folder has another fingerprint, and what is missing is told apart from what is wrong."""
    whole = fingerprint(CONFIG, root=folder)
    (folder / "train" / "a.jpg").unlink()
    shutil.rmtree(folder / "val")
    check = inspect_folder(CONFIG, folder)
    assert check.problems == []
    assert [line.partition(":")[0].rpartition("/")[2] for line in check.missing_pictures] == ["train", "val"]
    assert fingerprint(CONFIG, root=folder) not in (whole, fingerprint(Shapes(), root=None))
    with pytest.raises(DataProblem, match="no such folder"):
        open_data(CONFIG, root=folder, cache=None)


def test_no_folder_or_a_file_in_its_place(tmp_path):
    """Naming no folder asks for the flag; a file is told from nothing."""
    (problem,) = check_folder(CONFIG, None)
    assert problem.startswith("this study needs a folder of pictures in COCO format")
    assert problem.endswith("name it with --data DIR")
    (tmp_path / "data").write_text("")
    (problem,) = check_folder(CONFIG, tmp_path / "data")
    assert "a folder of pictures was looked for, a file is there" in problem


def test_opening_and_fingerprinting_refuse_what_the_check_refuses(folder):
    """Called without the check, they raise the same problem."""
    (folder / "annotations" / "instances_val.json").unlink()
    (problem,) = check_folder(CONFIG, folder)
    for call in (lambda: open_data(CONFIG, root=folder, cache=None), lambda: fingerprint(CONFIG, root=folder)):
        with pytest.raises(DataProblem) as caught:
            call()
        assert str(caught.value) == problem


def test_no_torch_is_needed():
    """`plan` and `check` ask these questions in under a second."""
    code = "import sys, core.data.fingerprint; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
