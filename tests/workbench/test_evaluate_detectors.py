"""`evaluate`: other detectors than plain DETR, and parts of the user's own."""

import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluated import CPU, MODEL, TRAINING, config_of, described, make_folder, run, trained

from core.checkpoint import load_checkpoint
from core.config import (
    EncoderSupervision,
    EvaluationConfig,
    ExperimentConfig,
    FasterRCNN,
    SelectedQueries,
    Shapes,
    SmallResNet,
)
from core.data.batching import collate
from core.data.splits import open_data
from core.detector import build_detector
from core.evaluation.score import evaluate as evaluate_trial
from core.seeding import torch_stream
from workbench import durable
from workbench.options import Options
from workbench.plan import make_plan
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "box_moves.yaml"
SHAPES = Shapes(side=64, num_train=8, num_val=5)
REGIONS = ExperimentConfig(
    model=FasterRCNN(backbone=SmallResNet(width=8), fpn_dim=16, head_dim=32, anchor_scale=0.1, proposals=90),
    data=SHAPES,
    training=TRAINING.model_copy(update={"epochs": 100, "batch_size": 8, "lr": 3e-3, "lr_backbone": 3e-3}),
    evaluation=EvaluationConfig(nms_iou=0.3, top_k=40),
)


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """A checkpoint of a tiny Faster R-CNN."""
    return trained(REGIONS, tmp_path_factory.mktemp("regions"), steps=25)


def trials_own(config, checkpoint, **changes):
    """Score a checkpoint as its trial does."""
    how = config.evaluation.model_copy(update=changes)
    return evaluate_trial(
        config, how, data=open_data(config.data, root=None, cache=None), checkpoint=checkpoint, device=CPU
    )


def test_faster_rcnn_scores_as_its_trial_did(regions, capsys):
    """With NMS the numbers equal the trial's own, which chooses from more pairs than it keeps as predictions."""
    found = described(capsys, "--checkpoint", regions)
    expected, without = trials_own(REGIONS, regions), trials_own(REGIONS, regions, nms_iou=None)
    assert found["metrics"] == expected.metrics.to_json()
    assert expected.metrics.ar100 > 0.02  # so that the comparison says something
    assert expected.metrics != without.metrics
    assert found["metrics"]["ar50_proposals"] is None
    assert expected.predictions["image_id"].tolist() == without.predictions["image_id"].tolist()
    assert len(expected.predictions["image_id"]) == 5 * 300


def test_faster_rcnn_has_losses(regions, capsys):
    """Its four terms are those of single pictures in evaluation mode, the regions sampled by the picture's id."""
    found = described(capsys, "--checkpoint", regions, "--losses", "--parameters", "raw")
    data = open_data(SHAPES, root=None, cache=None)
    detector = build_detector(REGIONS, num_classes=len(data.class_names), seed=1)
    detector.load_state_dict(load_checkpoint(regions)["raw"])
    detector.eval()
    sums = {}
    for index in range(5):
        picture = data.scored.read(index)
        for term in detector.loss(collate([picture]), torch_stream(0, "losses", picture.picture_id)):
            name = f"{term.source}/{term.layer}/{term.name}"
            sums[name] = sums.get(name, 0.0) + float(term.value.detach()) / 5
    assert found["losses"] == pytest.approx(sums | {"total": sum(sums.values())}, rel=1e-5)
    assert set(sums) == {"encoder/0/class", "encoder/0/l1", "decoder/0/class", "decoder/0/l1"}
    assert found["grad_norm"] > 0


def two_stage(config):
    """Return an experiment whose queries are selected from the encoder's proposals."""
    supervision = EncoderSupervision(anchor_scale=0.4)
    changes = {"queries": SelectedQueries(num_queries=10), "encoder_supervision": supervision}
    return config.model_copy(update={"model": MODEL.model_copy(update=changes)})


def test_the_recall_of_proposals_is_the_trials(tmp_path, capsys):
    """In two stages `ar50_proposals` is there, as the trial has it, and the text tells it in points."""
    config = two_stage(ExperimentConfig(data=SHAPES, training=TRAINING))
    path = trained(config, tmp_path)
    found = described(capsys, "--checkpoint", path)
    assert found["metrics"] == trials_own(config, path).metrics.to_json()
    assert 0 < found["metrics"]["ar50_proposals"] < 1
    assert f"\nproposals {100 * found['metrics']['ar50_proposals']:6.1f}  " in run(capsys, "--checkpoint", path)[1]


def test_boxes_of_unknown_categories_are_no_recalled_ones(tmp_path, capsys):
    """A box whose category the model does not know counts as missed in the recall of proposals, too."""
    folder = make_folder(tmp_path / "coco")
    path = trained(two_stage(config_of(folder)), tmp_path / "checkpoints")
    before = described(capsys, "--checkpoint", path, "--data", folder)["metrics"]
    annotations = folder / "annotations" / "instances_val.json"
    raw = json.loads(annotations.read_text())
    for entry in (*raw["categories"], *raw["annotations"]):
        key = "id" if "name" in entry else "category_id"
        entry[key] = 1 if entry[key] == 3 else entry[key]
    annotations.write_text(json.dumps(raw))
    after = described(capsys, "--checkpoint", path, "--data", folder)["metrics"]
    assert before["num_boxes"] == after["num_boxes"] == 6
    assert 0 < after["ar50_proposals"] < before["ar50_proposals"]


@pytest.fixture(scope="module")
def own_code(tmp_path_factory):
    """Run the example of docs/your-own-idea.md; return the folder of the trial that has a custom box head."""
    small = ("data.num_train=32", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")
    plan = make_plan(load_study(EXAMPLE, Selection(profile="smoke", seeds=1, sets=small)))
    store, err = Store(tmp_path_factory.mktemp("own") / "runs"), StringIO()
    nowhere = "http://127.0.0.1:9"
    code = run_study(
        plan, store, Options(executor="inline", tracking_uri=nowhere, allow_code=True), out=StringIO(), err=err
    )
    assert code == 0, err.getvalue()
    (spec,) = (spec for spec in plan.specs.values() if spec.code)
    return store.trial_dir(spec.trial_id)


def newest(trial):
    """Return the last checkpoint of a trial."""
    return max((trial / "checkpoints").glob("step_*.pt"))


@pytest.mark.parametrize("parameters", ["raw", "averaged"])
def test_code_of_ones_own_runs_from_the_record(parameters, own_code, tmp_path, capsys):
    """With --allow-code the trial's text is run: numbers, scores and boxes are the trial's; nothing stays behind."""
    out = tmp_path / "found.json"
    arguments = ["--parameters", parameters, "--predictions", out, "--allow-code"]
    found = described(capsys, "--checkpoint", newest(own_code), *arguments)
    kept = {path.parent: json.loads(path.read_text()) for path in own_code.glob("evaluations/*/metrics.json")}
    (folder,) = (path for path, one in kept.items() if one["evaluation"]["parameters"] == parameters)
    assert found["metrics"] == kept[folder]["metrics"]
    assert found["metrics"]["num_pictures"] == 8
    columns = pq.read_table(folder / "predictions.parquet").to_pydict()
    for picture in set(columns["image_id"]):
        own = [entry for entry in json.loads(out.read_text()) if entry["image_id"] == picture]
        start = columns["image_id"].index(picture)
        theirs = slice(start, start + len(own))
        assert [entry["score"] for entry in own] == columns["score"][theirs]
        assert [entry["bbox"][0] for entry in own] == columns["x0"][theirs]
        width = np.subtract(columns["x1"][theirs], columns["x0"][theirs])
        np.testing.assert_allclose([entry["bbox"][2] for entry in own], width, atol=1e-4)
    assert [name for name in sys.modules if name.startswith("box_moves")] == []
    state = torch.load(newest(own_code), weights_only=True)
    assert state["config"]["model"]["box_head"]["target"] == "box_moves:RelativeBoxHead"


def test_code_of_ones_own_is_refused_without_the_flag(own_code, capsys):
    """Exit code 2 names the part and the flag."""
    code, out, err = run(capsys, "--checkpoint", newest(own_code))
    assert (code, out) == (2, "")
    assert err.endswith("uses code of your own (box_moves:RelativeBoxHead): allow it with --allow-code\n")


def with_text(change):
    """Return a function that changes the texts in a trial's record."""

    def write(trial):
        spec = json.loads((trial / "spec.json").read_text())
        spec["code"] = change(spec["code"])
        durable.write_json(trial / "spec.json", spec)

    return write


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda trial: (trial / "spec.json").unlink(), "{trial}/spec.json is not there: name the checkpoint where"),
        (with_text(lambda _: {}), "{trial}/spec.json holds no such text: name the checkpoint where its trial wrote"),
        (
            with_text(lambda code: {name: text.replace("RelativeBoxHead", "Other") for name, text in code.items()}),
            "step_{step}.pt: target box_moves:RelativeBoxHead cannot be found (box_moves has no class RelativeBoxHead",
        ),
        (
            with_text(lambda code: {name: f"import not_there_xyz\n{text}" for name, text in code.items()}),
            "step_{step}.pt: box_moves imports not_there_xyz, which is not installed here",
        ),
        (
            with_text(lambda code: {name: text.replace("**values: Any", "dim: int") for name, text in code.items()}),
            "it takes no ",
        ),
    ],
)
def test_code_that_cannot_be_built_ends_with_2(change, told, own_code, tmp_path, capsys):
    """A record without the text, and a text that does not fit, are told in one line."""
    trial = tmp_path / "trial"
    shutil.copytree(own_code, trial)
    change(trial)
    code, out, err = run(capsys, "--checkpoint", newest(trial), "--allow-code")
    assert (code, out) == (2, "")
    assert told.format(trial=trial, step=newest(trial).stem.removeprefix("step_")) in err
    assert len(err.splitlines()) == 1
