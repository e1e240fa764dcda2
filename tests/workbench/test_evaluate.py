"""`evaluate`: any checkpoint on real picture files, by category id; what is printed, written and refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluated import CPU, HEIGHT, MODEL, TRAINING, WIDTH, config_of, described, make_folder, rewritten, run, trained
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from core.checkpoint import load_checkpoint
from core.config import (
    EvaluationConfig,
    ExperimentConfig,
    Shapes,
)
from core.data.splits import open_data
from core.detector import build_detector
from core.evaluation.score import evaluate as evaluate_trial
from core.types import Batch, Target
from workbench import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pictures."""
    return make_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory):
    """A checkpoint of a trial on them."""
    return trained(config_of(folder), tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def answerable(ours, folder, tmp_path_factory):
    """The same pictures with a truth that the averaged weights nearly find: some of their detections, moved."""
    root = tmp_path_factory.mktemp("answerable") / "coco"
    shutil.copytree(folder, root)
    arguments = ["--checkpoint", str(ours), "--data", str(folder), "--predictions", str(root.parent / "found.json")]
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    results = json.loads((root.parent / "found.json").read_text())
    path = root / "annotations" / "instances_val.json"
    raw = json.loads(path.read_text())
    raw["annotations"] = []
    for image in raw["images"]:
        own = [entry for entry in results if entry["image_id"] == image["id"]]
        for place in (0, 2, 5, 9, 14):
            x, y, w, h = own[place]["bbox"]
            left, top = max(x, 0) + 1, max(y, 0) + 1
            box = [left, top, min(x + w, WIDTH) - left, min(y + h, HEIGHT) - top]
            entry = {"id": len(raw["annotations"]) + 1, "image_id": image["id"], "bbox": box, "iscrowd": 0}
            entry |= {"category_id": own[place]["category_id"], "area": box[2] * box[3]}
            raw["annotations"].append(entry)
    path.write_text(json.dumps(raw))
    return root


@pytest.mark.parametrize("parameters", ["raw", "averaged"])
def test_our_checkpoint_scores_as_its_trial_did(parameters, ours, answerable, capsys):
    """A checkpoint alone knows its configuration and classes: the numbers equal the trial's own evaluation exactly."""
    found = described(capsys, "--checkpoint", ours, "--data", answerable, "--parameters", parameters)
    config = config_of(answerable)
    data = open_data(config.data, root=None, cache=None)
    how = EvaluationConfig(parameters=parameters)
    expected = evaluate_trial(config, how, data=data, checkpoint=ours, device=CPU)
    assert found["metrics"] == expected.metrics.to_json()
    assert (found["recipe"], found["parameters"]) == (None, parameters)
    assert (found["checkpoint"], found["data"]) == (str(ours), str(answerable))
    assert found["metrics"]["num_pictures"] == 3
    assert found["metrics"]["ap50"] > 0.1  # so that the comparison says something
    assert "losses" not in found


def test_averaged_weights_are_the_default_as_configured(ours, folder, capsys):
    """Without --parameters the configuration's choice is taken and told."""
    default = described(capsys, "--checkpoint", ours, "--data", folder, "--losses")
    averaged = described(capsys, "--checkpoint", ours, "--data", folder, "--losses", "--parameters", "averaged")
    raw = described(capsys, "--checkpoint", ours, "--data", folder, "--losses", "--parameters", "raw")
    assert default["parameters"] == "averaged"
    assert default["losses"] == averaged["losses"] != raw["losses"]


def test_predictions_are_a_coco_result_list(ours, answerable, tmp_path, capsys):
    """The file holds every kept detection with the folder's category ids, and pycocotools gives the same AP from it."""
    out = tmp_path / "new" / "found.json"
    found = described(capsys, "--checkpoint", ours, "--data", answerable, "--predictions", out)
    results = json.loads(out.read_text())
    assert len(results) == found["detections"] == 3 * 10 * 2  # every (query, class) pair is among the best 100
    assert {entry["image_id"] for entry in results} == {1, 2, 3}
    assert {entry["category_id"] for entry in results} == {3, 7}
    assert found["detections_of_other_categories"] == 0
    assert all(set(entry) == {"image_id", "category_id", "bbox", "score"} for entry in results)
    assert [path.name for path in out.parent.iterdir()] == ["found.json"]
    assert rescored(results, answerable) == pytest.approx(found["metrics"]["ap"], abs=1e-12)
    assert found["metrics"]["ap50"] > 0.1  # so that the comparison says something


def rescored(results, folder):
    """Return the AP of a result list by the scorer's own loader."""
    truth = COCO(str(folder / "annotations" / "instances_val.json"))
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_losses_are_means_of_single_pictures(ours, folder, capsys):
    """Every term and the norm equal what a plain loop over pictures gives, without dropout."""
    found = described(capsys, "--checkpoint", ours, "--data", folder, "--losses", "--parameters", "raw")
    detector = build_detector(config_of(folder), num_classes=2, seed=4)
    detector.load_state_dict(load_checkpoint(ours)["raw"])
    detector.eval()
    sums, gradient, total = {}, 0.0, 0.0
    for batch in single_batches(folder):
        terms = detector.loss(batch, torch.Generator())
        loss = sum(term.weight * term.value for term in terms)
        names = [f"{term.source}/{term.layer}/{term.name}" for term in terms]
        sums = {
            name: sums.get(name, 0.0) + float(term.value.detach()) / 3 for name, term in zip(names, terms, strict=True)
        }
        wanted = [parameter for parameter in detector.parameters() if parameter.requires_grad]
        parts = torch.autograd.grad(loss, wanted, allow_unused=True)
        gradient = gradient + torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(wanted, parts, strict=True)]
        )
        total += float(loss.detach()) / 3
    assert set(found["loss_weights"]) == set(sums)
    assert found["losses"] == pytest.approx(sums | {"total": total}, rel=1e-4)
    assert found["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    weighted = sum(found["losses"][name] * weight for name, weight in found["loss_weights"].items())
    assert found["losses"]["total"] == pytest.approx(weighted, rel=1e-5)


def single_batches(folder):
    """Read the folder by hand: each picture alone in its batch, labels in the order of the category ids."""
    raw = json.loads((folder / "annotations" / "instances_val.json").read_text())
    for image in raw["images"]:
        pixels = np.array(Image.open(folder / "val" / image["file_name"]))
        own = [entry for entry in raw["annotations"] if entry["image_id"] == image["id"]]
        x, y, w, h = np.array([entry["bbox"] for entry in own], np.float32).T
        boxes = np.stack([(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT], axis=1)
        yield Batch(
            images=torch.from_numpy(pixels).permute(2, 0, 1)[None],
            padding_mask=torch.zeros(1, *pixels.shape[:2], dtype=torch.bool),
            targets=(
                Target(
                    labels=torch.tensor([[3, 7].index(entry["category_id"]) for entry in own]),
                    boxes=torch.from_numpy(boxes),
                    annotation_ids=torch.tensor([entry["id"] for entry in own]),
                    picture_id=image["id"],
                    original_size=pixels.shape[:2],
                ),
            ),
        )


def test_a_folder_with_other_categories_is_scored_by_id(ours, answerable, tmp_path, capsys):
    """An added category shifts no label: its boxes count as missed, the model's others are found as before."""
    other = tmp_path / "other"
    shutil.copytree(answerable, other)
    path = other / "annotations" / "instances_val.json"
    raw = json.loads(path.read_text())
    raw["categories"] = [{"id": 1, "name": "fork"}, {"id": 7, "name": "dish"}]
    for entry in raw["annotations"]:
        entry["category_id"] = 1 if entry["category_id"] == 3 else 7
    path.write_text(json.dumps(raw))
    before = described(capsys, "--checkpoint", ours, "--data", answerable)
    code, out, err = run(capsys, "--checkpoint", ours, "--data", other, "--json", "--predictions", tmp_path / "p.json")
    found = json.loads(out)
    assert code == 0
    assert before["metrics"]["per_class"]["plate"]["ap50"] > 0.1
    assert found["metrics"]["per_class"]["dish"] == before["metrics"]["per_class"]["plate"]
    assert found["metrics"]["per_class"]["fork"] == {"ap": 0.0, "ap50": 0.0}
    assert found["detections_of_other_categories"] == 30
    assert {entry["category_id"] for entry in json.loads((tmp_path / "p.json").read_text())} == {3, 7}
    assert "does not know the categories 1 (fork): their boxes count as missed" in err
    assert "category 7 is 'plate' in the checkpoint and 'dish' in the folder: scored by id" in err


def test_nms_is_applied_as_configured(ours, folder, tmp_path, capsys):
    """With nms_iou no two detections of a class in a picture overlap by more; the best of a picture stays."""
    path = tmp_path / "copy.pt"
    kept = {}
    for iou in (None, 0.01):  # the boxes are small and apart
        shutil.copy(ours, path)
        rewritten(lambda state, iou=iou: _with_nms(state, iou))(path)
        described(capsys, "--checkpoint", path, "--data", folder, "--predictions", tmp_path / "found.json")
        kept[iou] = json.loads((tmp_path / "found.json").read_text())
    assert most_overlap(kept[None]) > 0.02 > 0.01 >= most_overlap(kept[0.01])
    assert kept[None][0] == kept[0.01][0]


def most_overlap(results):
    """Return the largest IoU between two detections of one class and picture."""
    largest = 0.0
    for picture, category in {(entry["image_id"], entry["category_id"]) for entry in results}:
        own = [e["bbox"] for e in results if (e["image_id"], e["category_id"]) == (picture, category)]
        boxes = torch.tensor(own, dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
        largest = max(largest, float(overlaps.max()))
    return largest


def test_only_the_scored_split_is_read(ours, folder, tmp_path, capsys):
    """Neither training pictures nor their annotations are needed; --num-pictures takes the first ones."""
    lone = tmp_path / "lone"
    shutil.copytree(folder, lone)
    shutil.rmtree(lone / "train")
    (lone / "annotations" / "instances_train.json").unlink()
    whole = described(capsys, "--checkpoint", ours, "--data", folder)
    assert described(capsys, "--checkpoint", ours, "--data", lone)["metrics"] == whole["metrics"]
    assert described(capsys, "--checkpoint", ours, "--data", lone, "--num-pictures", 2)["metrics"]["num_boxes"] == 4


def test_a_checkpoint_of_drawn_pictures_needs_no_folder(tmp_path, capsys):
    """Its pictures are drawn again; a folder's categories are others, unless their ids are the same."""
    config = ExperimentConfig(model=MODEL, data=Shapes(side=64, num_train=8, num_val=11), training=TRAINING)
    data = open_data(config.data, root=None, cache=None)
    path = trained(config, tmp_path)
    expected = evaluate_trial(config, config.evaluation, data=data, checkpoint=path, device=CPU)
    found = described(capsys, "--checkpoint", path)
    assert found["metrics"] == expected.metrics.to_json()
    assert found["data"] == "drawn shapes"
    assert described(capsys, "--checkpoint", path, "--num-pictures", 5)["metrics"]["num_pictures"] == 5


def test_the_text_is_in_points(ours, folder, capsys):
    """Without --json a short table is printed, with the losses where they are asked for."""
    metrics = described(capsys, "--checkpoint", ours, "--data", folder)["metrics"]
    code, out, err = run(capsys, "--checkpoint", ours, "--data", folder, "--losses")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{ours} (ours, averaged weights)"
    assert lines[1].startswith(f"3 pictures with 6 boxes of {folder} (val), ")
    assert f"AP50      {100 * metrics['ap50']:6.1f}" in lines
    assert any(line.startswith("decoder/1/giou ") for line in lines)
    assert lines[-1].startswith("norm of the summed gradient ")


def _with_nms(state, iou):
    state["config"]["evaluation"]["nms_iou"] = iou
    return state
