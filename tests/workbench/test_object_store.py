"""Pictures from an object store are a copy on a local disk: complete, kept, and brought up to date."""

import os
from types import SimpleNamespace

import pytest

from core.config import CocoFolder
from core.data.fingerprint import fingerprint
from workbench import cli, object_store
from workbench.errors import DataError
from workbench.object_store import local_copy


def content(folder):
    """Return the files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_is_the_same_data(coco_folder, tmp_path):
    """The copy has the files and so the fingerprint of the source; a second call copies nothing."""
    told = []
    copy = local_copy(coco_folder.as_uri(), cache=tmp_path / "cache", tell=told.append)
    assert content(copy) == content(coco_folder)
    config = CocoFolder(kind="coco")
    assert fingerprint(config, root=copy) == fingerprint(config, root=coco_folder)
    assert local_copy(f"{coco_folder.as_uri()}/", cache=tmp_path / "cache", tell=told.append) == copy
    assert len(told) == 1


def test_a_copy_follows_its_source(coco_folder, tmp_path):
    """What changed, came or went at the source is changed, added or removed, and nothing else is copied."""
    told = []
    copy = local_copy(coco_folder.as_uri(), cache=tmp_path / "cache", tell=told.append)
    picture = coco_folder / "train" / "1.jpg"
    picture.write_bytes(b"x" * picture.stat().st_size + b"y")
    (coco_folder / "train" / "2.jpg").write_bytes(b"new")
    (coco_folder / "val" / "1.jpg").unlink()
    assert local_copy(coco_folder.as_uri(), cache=tmp_path / "cache", tell=told.append) == copy
    assert content(copy) == content(coco_folder)
    assert "Copying 2 of 4 files" in told[1]


def test_an_interrupted_copy_goes_on(coco_folder, tmp_path, monkeypatch):
    """What was copied before a fault is not copied again, and the copy is not taken for complete."""
    real, copied = object_store._copy, []

    def failing(system, source, target, uri):
        if len(copied) == 2:
            raise DataError("the line is dead")
        copied.append(source)
        real(system, source, target, uri)

    monkeypatch.setattr(object_store, "_copy", failing)
    with pytest.raises(DataError, match="the line is dead"):
        local_copy(coco_folder.as_uri(), cache=tmp_path / "cache")
    monkeypatch.setattr(object_store, "_copy", real)
    told = []
    copy = local_copy(coco_folder.as_uri(), cache=tmp_path / "cache", tell=told.append)
    assert "Copying 2 of 4 files" in told[0]
    assert content(copy) == content(coco_folder)


def test_what_cannot_be_copied_is_an_error_with_the_remedy(coco_folder, tmp_path, monkeypatch):
    """No such folder, an unknown scheme, an empty folder and a full disk are told before anything is planned."""
    for uri in ((tmp_path / "none").as_uri(), "swift://nowhere/coco"):
        with pytest.raises(DataError, match=r"cannot be read .* copy the folder to a disk"):
            local_copy(uri, cache=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        local_copy((tmp_path / "empty").as_uri(), cache=tmp_path / "cache")
    monkeypatch.setattr(object_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DataError, match="name a larger disk by WORKBENCH_DATA_CACHE"):
        local_copy(coco_folder.as_uri(), cache=tmp_path / "cache")


def test_the_command_line_takes_a_scheme(toy_study, coco_folder, tmp_path, monkeypatch, capsys):
    """`--data` with a scheme plans with the copy; the study asks for the folder's own trials."""
    monkeypatch.setenv(object_store.VARIABLE, str(tmp_path / "cache"))
    printed = []
    for data in (str(coco_folder), coco_folder.as_uri()):
        assert cli.main(["plan", str(toy_study), "--data", data, "--json", "--runs", str(tmp_path / "runs")]) == 0
        out, err = capsys.readouterr()
        printed.append(out)
    assert "Copying" in err
    ids = [[line for line in out.splitlines() if '"trial_id"' in line or '"plan_hash"' in line] for out in printed]
    assert ids[0] == ids[1]
    assert os.listdir(tmp_path / "cache")  # noqa: PTH208 - a name is enough
