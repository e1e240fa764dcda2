"""`evaluate`: any checkpoint on real picture files, by category id; what is printed, written and refused."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as TF  # noqa: N812 - the name everybody knows

from core.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from core.config import (
    CocoFolder,
    Decoder,
    Deformable,
    DeformableSelf,
    Encoder,
    EvaluationConfig,
    ExperimentConfig,
    FixedSize,
    LearnedQueries,
    ModelConfig,
    ResNet,
    Shapes,
    SmallResNet,
    TrainingConfig,
)
from core.data.splits import open_data
from core.detector import build_detector
from core.evaluation.checkpoints import open_checkpoint
from core.evaluation.score import evaluate as evaluate_trial
from core.official import read_official
from core.training import Trainer
from core.types import Batch, Target
from workbench import cli

sys.path.append(str(Path(__file__).parent.parent / "core"))  # where the published layouts are written down
from official_layouts import deformable, filled, training_file

CPU = torch.device("cpu")
MODEL = ModelConfig(
    hidden_dim=32,
    num_heads=4,
    ffn_dim=48,
    dropout=0.1,
    backbone=SmallResNet(width=8),
    extra_levels=0,
    encoder=Encoder(num_layers=1, attention=DeformableSelf(num_points=2)),
    decoder=Decoder(num_layers=2, attention=Deformable(num_points=2)),
    queries=LearnedQueries(num_queries=10, reference="box"),
)
TRAINING = TrainingConfig(epochs=10, batch_size=2, lr=2e-3, lr_backbone=2e-3, ema_decay=0.9)
CATEGORIES = [{"id": 7, "name": "plate"}, {"id": 3, "name": "cup"}]
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures to learn from and three to score, as JPEG files, with a bright rectangle on each box."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        raw = {"images": [], "annotations": [], "categories": CATEGORIES}
        (root / split).mkdir()
        for picture in range(1, count + 1):
            image = rng.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            for category in (3, 7):
                x, y = int(rng.integers(2, 30)), int(rng.integers(2, 20))
                image[y : y + 20, x : x + 24] = (220, 60, 200) if category == 3 else (20, 240, 60)
                entry = {"id": len(raw["annotations"]) + 1, "image_id": picture, "category_id": category}
                raw["annotations"].append(entry | {"bbox": [x, y, 24, 20], "area": 480, "iscrowd": 0})
            name = f"{picture}.jpg"
            raw["images"].append({"id": picture, "file_name": name, "height": HEIGHT, "width": WIDTH})
            assert cv2.imwrite(str(root / split / name), image)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(raw))
    return root


def trained(config, data, where):
    """Train some steps, after which raw and averaged weights are not the same."""
    trainer = Trainer(config, seed=0, data=data, device=CPU)
    for _ in range(12):
        trainer.step()
    return trainer.save(where)


@pytest.fixture(scope="module")
def config(folder):
    """A tiny experiment on the folder."""
    data = CocoFolder(root=str(folder), resize=FixedSize(height=48, width=64), augmentation="flip")
    return ExperimentConfig(model=MODEL, data=data, training=TRAINING)


@pytest.fixture(scope="module")
def ours(config, folder, tmp_path_factory):
    """A checkpoint of it."""
    return trained(config, open_data(config.data, root=folder, cache=None), tmp_path_factory.mktemp("ours"))


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


def run(capsys, *arguments):
    """Run evaluate; return its exit code, standard output and standard error."""
    code = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def described(capsys, *arguments):
    """Run it with --json; it must succeed."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("parameters", ["raw", "averaged"])
def test_our_checkpoint_scores_as_its_trial_did(parameters, ours, config, answerable, capsys):
    """A checkpoint alone knows its configuration and classes: the numbers equal the trial's own evaluation exactly."""
    found = described(capsys, "--checkpoint", ours, "--data", answerable, "--parameters", parameters)
    data = open_data(config.data, root=answerable, cache=None)
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


def test_losses_are_means_of_single_pictures(ours, config, folder, capsys):
    """Every term and the norm equal what a plain loop over pictures gives, without dropout."""
    found = described(capsys, "--checkpoint", ours, "--data", folder, "--losses", "--parameters", "raw")
    detector = build_detector(config, num_classes=2, seed=4)
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
        _wrong(lambda state, iou=iou: _with_nms(state, iou))(path)
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


def test_pretrained_weights_need_not_be_there(tmp_path):
    """A checkpoint replaces the weights that its backbone began with, so their file is not asked for."""
    backbone = ResNet(depth=18, weights=None)
    config = ExperimentConfig(model=MODEL.model_copy(update={"backbone": backbone}), data=Shapes())
    detector = build_detector(config, num_classes=2, seed=3)
    plain = config.model_dump(mode="json")
    plain["model"]["backbone"]["weights"] = str(tmp_path / "gone.pth")
    state = {"config": plain, "classes": {3: "cup", 7: "plate"}, "raw": detector.state_dict(), "averaged": None}
    loaded = open_checkpoint(save_checkpoint(tmp_path, 1, state), recipe=None, parameters=None, allow_code=False)
    assert weights_hash(loaded.detector.state_dict()) == weights_hash(detector.state_dict())
    assert (loaded.parameters, loaded.classes) == ("raw", {3: "cup", 7: "plate"})


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
    path = trained(config, data, tmp_path)
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


def _with_custom_head(state):
    state["config"]["model"]["box_head"] = {"kind": "custom", "target": "mine:Head", "args": {}}
    return state


def _with_nms(state, iou):
    state["config"]["evaluation"]["nms_iou"] = iou
    return state


def _wrong(content):
    def change(path):
        state = torch.load(path, weights_only=True)
        torch.save(content(state), path)

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        (lambda path: path.unlink(), [], "--checkpoint {path}: a checkpoint file was looked for, nothing is there"),
        (lambda path: path.write_bytes(b"text"), [], "--checkpoint {path}: cannot be read as a torch checkpoint"),
        (_wrong(lambda state: state | {"format": 9}), [], "checkpoint format 9, this version reads 1"),
        (_wrong(lambda _: {"a": torch.ones(1)}), [], "neither one of our checkpoints nor an official"),
        (
            _wrong(lambda state: {key: value for key, value in state.items() if key != "config"}),
            [],
            "before checkpoints held their configuration",
        ),
        (_wrong(lambda state: state | {"averaged": None}), ["--parameters", "averaged"], "use --parameters raw"),
        (_wrong(_with_custom_head), [], "code of your own (mine:Head): allow it with"),
        (None, ["--recipe", "detr"], "holds its own configuration: omit --recipe"),
        (None, ["--data", "{tmp}/none"], "{tmp}/none: a folder of pictures was looked for, nothing is there"),
        (None, ["--data", "{tmp}"], "instances_val.json: no such file"),
        (None, ["--device", "warp"], "--device warp: cannot be used"),
        (None, ["--num-pictures", "0"], "--num-pictures 0: at least 1"),
        (None, ["--predictions", "{tmp}"], "{tmp}: is a folder; --predictions needs the name of a file"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_is_wrong(change, arguments, told, ours, folder, tmp_path, capsys):
    """Whatever is wrong is one line with the path or flag, exit code 2, and nothing on standard output."""
    path = tmp_path / "copy.pt"
    shutil.copy(ours, path)
    if change:
        change(path)
    places = {"path": path, "tmp": tmp_path}
    arguments = [argument.format(**places) for argument in arguments]
    code, out, err = run(capsys, "--checkpoint", path, "--data", folder, *arguments)
    assert (code, out) == (2, "")
    assert told.format(**places) in err
    assert len(err.splitlines()) == 1


def test_a_damaged_checkpoint_is_refused(ours, folder, tmp_path, capsys):
    """Where the checksum lies beside the file, it must hold."""
    path = tmp_path / ours.name
    for source in (ours, ours.with_name(ours.name + ".sha256")):
        shutil.copy(source, tmp_path)
    assert run(capsys, "--checkpoint", path, "--data", folder)[0] == 0
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, _, err = run(capsys, "--checkpoint", path, "--data", folder)
    assert code == 2
    assert "damaged" in err or "cannot be read" in err


def test_a_folder_of_which_the_model_knows_nothing_is_refused(ours, folder, tmp_path, capsys):
    """Where no category id is the model's, AP could only be 0: that is bad input."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "annotations" / "instances_val.json"
    path.write_text(
        path.read_text()
        .replace('"category_id": 3', '"category_id": 2')
        .replace('"id": 3, "n', '"id": 2, "n')
        .replace('"category_id": 7', '"category_id": 8')
        .replace('"id": 7, "n', '"id": 8, "n')
    )
    code, out, err = run(capsys, "--checkpoint", ours, "--data", other)
    assert (code, out) == (2, "")
    assert "knows none of the folder's categories, 2 (cup), 8 (plate); its ids are 3, 7" in err


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """A single-scale Deformable DETR with random weights, in the form of a published file."""
    path = tmp_path_factory.mktemp("official") / "r50_deformable_detr_single_scale.pth"
    torch.save(training_file(filled(deformable(levels=1))), path)
    yield path
    path.unlink()


def test_an_official_file_needs_a_recipe_where_two_fit(official_file, folder, capsys):
    """Exit code 2 names the candidates."""
    code, out, err = run(capsys, "--checkpoint", official_file, "--data", folder)
    assert (code, out) == (2, "")
    assert "fits deformable_single_scale and deformable_single_scale_dc5" in err
    assert "--recipe" in err
    code, out, err = run(capsys, "--checkpoint", official_file, "--data", folder, "--recipe", "deformable_refine")
    assert (code, out) == (2, "")
    assert "does not fit recipe deformable_refine: " in err


def test_an_official_file_is_evaluated_as_its_authors_do(official_file, folder, tmp_path, capsys):
    """One picture a batch, Pillow's resizing to 800 x 1066, the 100 best pairs, category ids kept: as done by hand."""
    out = tmp_path / "found.json"
    recipe = "deformable_single_scale"
    arguments = ["--checkpoint", official_file, "--data", folder, "--recipe", recipe, "--num-pictures", 1]
    found = described(capsys, *arguments, "--predictions", out)
    results = json.loads(out.read_text())
    image = TF.resize(Image.open(folder / "val" / "1.jpg"), [800, 1066])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    nobody = torch.zeros(0, dtype=torch.int64)
    target = Target(
        labels=nobody,
        boxes=torch.zeros(0, 4),
        annotation_ids=nobody,
        picture_id=1,
        original_size=(HEIGHT, WIDTH),
    )
    batch = Batch(images=pixels, padding_mask=torch.zeros(1, 800, 1066, dtype=torch.bool), targets=(target,))
    with torch.no_grad():
        prediction = read_official(official_file, recipe).detector.model(batch)[-1]
    best, pairs = prediction.logits.sigmoid().flatten().topk(100)
    assert [entry["category_id"] for entry in results] == (pairs % 91).tolist()
    np.testing.assert_allclose([entry["score"] for entry in results], best, rtol=1e-6)
    x, y, w, h = prediction.boxes[0][pairs // 91].T
    expected = torch.stack([(x - w / 2) * WIDTH, (y - h / 2) * HEIGHT, w * WIDTH, h * HEIGHT], dim=1)
    np.testing.assert_allclose([entry["bbox"] for entry in results], expected, atol=1e-4)
    inside = sum(entry["category_id"] in (3, 7) for entry in results)
    assert (found["recipe"], found["parameters"], found["detections"]) == (recipe, "raw", 100)
    assert found["detections_of_other_categories"] == 100 - inside
