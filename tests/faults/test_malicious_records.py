"""Pictures and records of strangers that mean harm: nothing is read or written elsewhere, and texts stay texts."""

import json

import pytest
from strangers import HEAD, tiny_plan

from workbench.errors import DataError, StoreError
from workbench.mlflow_mirror import sync
from workbench.plan import make_plan, plan_from_json, plan_to_json
from workbench.store import Store
from workbench.study_file import Selection, load_study


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../x.jpg", "..", "a\0b"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_that_lead_out_of_the_folder_are_refused(coco_folder, tmp_path, name, split):
    """Plan, run and evaluate name the file and the entry, before a picture is read."""
    path = coco_folder / "annotations" / f"instances_{split}.json"
    raw = json.loads(path.read_text())
    raw["images"].append({"id": 9, "file_name": name, "width": 4, "height": 4})
    path.write_text(json.dumps(raw))
    study = tmp_path / "study.yaml"
    study.write_text(HEAD + "variants: {v0: {set: {loss.weight_giou: 4.0}}}\n")
    with pytest.raises(DataError, match=r"1 file names lead out of the folder of pictures"):
        make_plan(load_study(study, Selection(profile="pictures", data=coco_folder)))


def test_records_of_strangers_name_no_folder_elsewhere(tmp_path):
    """A plan whose names would lead out of the runs folder is left out, so that sync sends no other file."""
    plain = plan_to_json(tiny_plan(tmp_path))
    trial = plain["trials"][0]["trial_id"]
    text = json.dumps(plain)
    for wrong in ("../../../home", "/etc", "..", ".ssh", "a\\u0000b"):
        with pytest.raises(StoreError, match="a plan with a name that is none"):
            plan_from_json(json.loads(text.replace(trial, wrong)))
    eval_id = next(iter(plain["trials"][0]["evaluations"].values()))
    with pytest.raises(StoreError, match="a plan with a name that is none"):
        plan_from_json(json.loads(text.replace(eval_id, "../../../../.ssh")))
    store = Store(tmp_path / "runs")
    folder = store.root / "studies" / "mutant" / "tiny" / plain["plan_hash"]
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(text.replace(eval_id, "../../../../.ssh"))
    (folder / "registered.json").write_text('{"format": 1, "registered_at": "2026-01-01T00:00:00.000+00:00"}')

    class Screen(list):
        write = list.append

    screen = Screen()
    assert sync(store, tracking_uri="http://127.0.0.1:9", err=screen) == 1
    assert "a plan with a name that is none" in "".join(screen)
