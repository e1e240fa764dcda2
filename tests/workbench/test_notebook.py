"""A study's records in a notebook."""

import pytest

import workbench
from core.metrics import NUMBER_NAMES
from workbench.errors import StudyFileError
from workbench.notebook import LoadedStudy


def test_frame_has_a_row_for_each_trial(fake_results):
    """Finished trials carry their COCO numbers as fractions, the others are there without numbers."""
    results = fake_results({"base": [0.30, 0.32], "other": [0.35]}, looks=((2, 0.05),))
    frame = LoadedStudy(results).to_pandas()
    assert list(frame["variant"]) == ["base", "other", "base", "other"]
    assert list(frame["state"]) == ["finished", "finished", "finished", "pending"]
    assert list(frame["ap"][:3]) == [0.30, 0.35, 0.32]
    assert frame["ap"].isna().tolist() == [False, False, False, True]
    assert set(frame.columns) <= {"trial_id", "variant", "seed", "state", "seconds", "parameters", *NUMBER_NAMES}


def test_study_is_found_by_name_or_path(tmp_path, monkeypatch, toy_study):
    """`load("toy")` looks for studies/toy.yaml; a path is taken as it is; nothing has to have been run."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "named.yaml").write_text(toy_study.read_text())
    monkeypatch.chdir(tmp_path)
    by_name = workbench.load("named", profile="smoke")
    by_path = workbench.load(toy_study, profile="smoke", seeds=1, variants=["all"], data=None)
    assert len(by_name.to_pandas()) == 4
    assert len(by_path.to_pandas()) == 2
    assert not (tmp_path / "runs").exists()


def test_unknown_study_says_where_it_was_looked_for(tmp_path, monkeypatch):
    """A misspelt name is told with both places."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StudyFileError, match=r"nothing: no such study; looked for that file and for studies/nothing.yaml"
    ):
        workbench.load("nothing")
