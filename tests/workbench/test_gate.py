"""The gate before hundreds of GPU-hours, on stubs: a tiny folder, a stand-in for official files, published scores."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from costly import PICTURES, passed, recorded, with_band
from evaluated import config_of, make_folder, trained

from workbench import bands, cli, gate, provenance
from workbench.bands import Band
from workbench.errors import WorkbenchError
from workbench.gate import Asked
from workbench.published import PUBLISHED, Published
from workbench.store import Store

sys.path.append(str(Path(__file__).parent.parent / "core"))  # where the published layouts are written down
from official_layouts import deformable, filled, quick_builds, training_file


def test_a_gate_with_both_checks_good_is_passed_and_kept(asked, store, few_steps):
    """The published AP within .001 and losses inside the band; on record with what the gate is of."""
    recorded(asked, store)
    result = passed(asked, store)
    assert result.passed, gate.as_text(result)
    assert "AP 44.50 on 3 pictures; 44.5 was published (a table)" in gate.as_text(result)
    kept = json.loads((store.root / "gates" / "tiny.json").read_text())
    assert (kept["format"], kept["passed"]) == (1, True)
    spec = gate.training(asked, "deformable")
    assert kept["identity"] == {
        "code_hash": provenance.code_hash(),
        "numerics": gate.numerics.VERSION,
        "data_fingerprint": spec.data_fingerprint,
        "recipe": "deformable",
        "device": "cpu",
        "checkpoint": {"name": "official.pth", "sha256": gate._sha256(asked.checkpoint)},
    }
    assert gate.missing("tiny", {"t": spec}, store) is None


@pytest.mark.parametrize(
    ("found", "good"),
    [({"ap": 0.4440}, True), ({"ap": 0.4460}, True), ({"ap": 0.4439}, False), ({"ap": None}, False)],
)
def test_a_score_must_be_the_published_one(asked, store, few_steps, monkeypatch, found, good):
    """A thousandth off is rounding, more is not; a checkpoint that scores nothing has not passed."""
    recorded(asked, store, epoch=False)
    monkeypatch.setattr(gate, "scored", lambda *_: {"num_pictures": PICTURES, **found})
    result = passed(asked, store)
    assert result.passed is good
    assert json.loads((store.root / "gates" / "tiny.json").read_text())["passed"] is good


def test_scores_on_other_pictures_are_not_compared(asked, store, few_steps):
    """The published score is of 5,000 pictures: another folder proves nothing, whatever it scores."""
    recorded(asked, store, epoch=False)
    (ap, _) = passed(asked, store, published=PUBLISHED).checks
    assert not ap.passed
    assert ap.text.endswith("on 5000 pictures: scores of others cannot be compared")


def test_a_recipe_without_a_published_score_cannot_pass(asked, store, few_steps):
    """What nobody published cannot be reproduced."""
    (ap, _) = passed(asked, store, published={}).checks
    assert (ap.passed, ap.text) == (False, "no AP was published of deformable with a ResNet-50")


def test_without_a_band_the_gate_is_not_passed_and_says_how_to_record_one(asked, store, few_steps):
    """The line gives the command."""
    (_, loss) = passed(asked, store).checks
    assert not loss.passed
    assert loss.text.startswith(f"no band stored of the baseline of {asked.study}: record one")
    assert f"`python -m workbench doctor --profile tiny --study {asked.study} --data {asked.data} --record-band`" in (
        loss.text
    )


def test_losses_outside_the_band_do_not_pass(asked, store, few_steps):
    """A training whose losses lie elsewhere is told with both."""
    with_band(store, gate.training(asked, "deformable"), windows=[[0, 99], [1e-3, 2e-3]])
    (_, loss) = passed(asked, store).checks
    assert not loss.passed
    assert "the band (made up) is 0.001 to 0.002 where" in loss.text


def test_a_training_that_diverges_does_not_pass(asked, store, few_steps, monkeypatch):
    """Its loss is not finite, and it has fewer steps than the band."""
    recorded(asked, store)
    diverged = bands.Losses(losses=(3.0, math.nan), steps_per_epoch=2)
    monkeypatch.setattr(bands, "losses", lambda *_, **__: diverged)
    (_, loss) = passed(asked, store).checks
    assert not loss.passed
    assert "where nan was found; 2 windows where 1 were trained" in loss.text


def test_drawn_pictures_have_no_official_file_and_no_gate_on_record(store, monkeypatch):
    """Their losses can be checked; that alone is no gate."""
    monkeypatch.setattr(bands, "known", lambda *_: Band(name="", windows=((0, 9),), first_epoch=None, source="x"))
    monkeypatch.setattr(bands, "losses", lambda *_, **__: bands.Losses(losses=(3.0,), steps_per_epoch=9))
    result = gate.gate(Asked(profile="laptop"), store, tell=print)
    assert result.passed
    assert gate.as_text(result).endswith("What can be checked without an official file is good\n")
    assert not (store.root / "gates" / "laptop.json").exists()


def test_unusable_input_is_told_and_nothing_is_kept(asked_without_file, store, tmp_path):
    """No checkpoint for a folder, one of ours, none at all: each names its option."""
    with pytest.raises(WorkbenchError, match="--profile tiny: its gate needs an official file: name it with --check"):
        passed(asked_without_file, store)
    ours = trained(config_of(asked_without_file.data), tmp_path / "ours", steps=1)
    with pytest.raises(WorkbenchError, match="is one of ours; a gate needs an official file"):
        passed(replace(asked_without_file, checkpoint=ours), store)
    with pytest.raises(WorkbenchError, match=r"--checkpoint .*none\.pth: a checkpoint file was looked for"):
        passed(replace(asked_without_file, checkpoint=tmp_path / "none.pth"), store)
    assert not (store.root / "gates" / "tiny.json").exists()


@pytest.mark.ci
def test_a_gate_reads_and_scores_an_official_file(asked_without_file, store, tmp_path, monkeypatch):
    """A file with every published tensor, of random values: its recipe is found, and what it scores is compared.

    Half of what it finds is the truth of the folder, so the score is not 0. There is no band: only the score is good.
    """
    path, folder = tmp_path / "deformable.pth", asked_without_file.data
    torch.save(training_file(filled(deformable())), path)
    asked = replace(asked_without_file, checkpoint=path)
    with quick_builds():
        results = tmp_path / "found.json"
        assert (
            cli.main(["evaluate", "--checkpoint", str(path), "--data", str(folder), "--predictions", str(results)]) == 0
        )
        _answer(folder, json.loads(results.read_text()))
        metrics = gate.scored(asked, "deformable", lambda _: None)
        ap = metrics["ap"]
        assert ap > 0.05
        monkeypatch.setattr(gate, "scored", lambda *_: metrics)  # it takes seconds
        for off, good in ((0.0, True), (0.0011, False)):
            published = {("deformable", 50): Published(ap=ap + off, source="here", num_pictures=PICTURES)}
            score, loss = passed(asked, store, published=published).checks
            assert (score.passed, loss.passed) == (good, False), score.text


def _answer(folder, results):
    """Make every other detection a true box, of a category that the folder then has."""
    path = folder / "annotations" / "instances_val.json"
    raw = json.loads(path.read_text())
    found = [entry for entry in results if min(entry["bbox"][2:]) > 1][::2]
    names = {entry["category_id"]: f"category {entry['category_id']}" for entry in found}
    names |= {category["id"]: category["name"] for category in raw["categories"]}  # as in the training pictures
    raw["categories"] = [{"id": key, "name": name} for key, name in names.items()]
    raw["annotations"] = [
        {"id": number, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3]}
        | {name: entry[name] for name in ("image_id", "category_id", "bbox")}
        for number, entry in enumerate(found, start=1)
    ]
    path.write_text(json.dumps(raw))


def test_doctor_tells_and_ends_with_1_until_the_gate_is_passed(asked, tmp_path, capsys, few_steps):
    """First there is no band; `--record-band` makes one; then the score decides. Bad input ends with 2."""
    options = ["doctor", "--profile", "tiny", "--study", str(asked.study), "--data", str(asked.data)]
    options += ["--runs", str(tmp_path / "runs")]
    checked = [*options, "--checkpoint", str(asked.checkpoint)]
    assert cli.main(checked) == 1
    assert "NOT PASSED loss: no band stored" in capsys.readouterr().out
    assert cli.main([*options, "--record-band", "steps"]) == 0
    assert "in windows of 2 steps, " in capsys.readouterr().out
    assert cli.main([*checked, "--json"]) == 1  # the folder has other pictures than COCO
    found = json.loads(capsys.readouterr().out)
    assert [(check["name"], check["passed"]) for check in found["checks"]] == [("published AP", False), ("loss", True)]
    assert cli.main(options) == 2
    assert "name it with --checkpoint" in capsys.readouterr().err


def test_published_scores_are_fractions_with_a_source():
    """Every recipe of which official files can be read has one with a ResNet-50."""
    from core.official import DEFORMABLE_RECIPES, DETR_RECIPES

    assert {recipe for recipe, depth in PUBLISHED if depth == 50} == {*DEFORMABLE_RECIPES, *DETR_RECIPES}
    assert all(0.3 < row.ap < 0.5 and "README" in row.source for row in PUBLISHED.values())


def test_evaluate_takes_what_a_gate_gives_it(tmp_path):
    """The options that a gate hands over are all that `evaluate` reads."""
    folder = make_folder(tmp_path / "coco")
    ours = trained(config_of(folder), tmp_path / "ours", steps=1)
    metrics = gate.scored(Asked(profile="", checkpoint=ours, data=folder), None, lambda _: None)
    assert metrics["num_pictures"] == PICTURES


def test_a_gate_keeps_its_folder_apart_from_studies(asked, store, few_steps):
    """The store lists no study of it."""
    passed(asked, store)
    assert Store(store.root).studies() == ()
