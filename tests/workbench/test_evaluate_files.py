"""`evaluate`: official files, and input that is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated import MODEL, config_of, described, make_folder, rewritten, run, trained
from PIL import Image
from torchvision.transforms.v2 import functional as TF  # noqa: N812 - the name everybody knows

from core.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from core.config import ExperimentConfig, ResNet, Shapes
from core.detector import build_detector
from core.evaluation.checkpoints import load_detector
from core.official import read_official
from core.types import Batch, Target

sys.path.append(str(Path(__file__).parent.parent / "core"))  # where the published layouts are written down
from official_layouts import deformable, filled, quick_builds, training_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pictures."""
    return make_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory):
    """A checkpoint of a trial on them."""
    return trained(config_of(folder), tmp_path_factory.mktemp("ours"))


def _of_another_version(state):
    state["config"]["model"]["colour"] = "red"
    state["config"]["training"]["lr"] = "fast"
    return state


def _of_other_layers(state):
    state["config"]["model"]["ffn_dim"] = 40
    return state


def _with_custom_head(state):
    state["config"]["model"]["box_head"] = {"kind": "custom", "target": "mine:Head", "args": {}}
    return state


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        (lambda path: path.unlink(), [], "--checkpoint {path}: a checkpoint file was looked for, nothing is there"),
        (lambda path: path.write_bytes(b"text"), [], "--checkpoint {path}: cannot be read as a torch checkpoint"),
        (rewritten(lambda state: state | {"format": 9}), [], "checkpoint format 9, this version reads 1"),
        (rewritten(lambda _: {"a": torch.ones(1)}), [], "neither one of our checkpoints nor an official"),
        (
            rewritten(lambda state: {key: value for key, value in state.items() if key != "config"}),
            [],
            "before checkpoints held their configuration",
        ),
        (rewritten(lambda state: state | {"averaged": None}), ["--parameters", "averaged"], "use --parameters raw"),
        (rewritten(_with_custom_head), [], "code of your own (mine:Head): allow it with"),
        (rewritten(_with_custom_head), ["--allow-code"], "code of your own (mine:Head), whose text is looked for in"),
        (
            rewritten(_of_another_version),
            [],
            "{path}: its configuration is of another version (model.detr.colour: Extra inputs are not permitted; "
            "training.lr: Input should be a valid number): evaluate it with the version that wrote it, or train",
        ),
        (rewritten(_of_other_layers), [], "{path}: its weights do not fit the detector that this version builds"),
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


def test_pretrained_weights_need_not_be_there(tmp_path):
    """A checkpoint replaces the weights that its backbone began with, so their file is not asked for."""
    backbone = ResNet(depth=18, weights=None)
    config = ExperimentConfig(model=MODEL.model_copy(update={"backbone": backbone}), data=Shapes())
    detector = build_detector(config, num_classes=2, seed=3)
    plain = config.model_dump(mode="json")
    plain["model"]["backbone"]["weights"] = str(tmp_path / "gone.pth")
    state = {"config": plain, "classes": {3: "cup", 7: "plate"}, "raw": detector.state_dict(), "averaged": None}
    path = save_checkpoint(tmp_path, 1, state)
    loaded = load_detector(load_checkpoint(path), path=path, recipe=None, parameters=None, allow_code=False)
    assert weights_hash(loaded.detector.state_dict()) == weights_hash(detector.state_dict())
    assert (loaded.parameters, loaded.classes) == ("raw", {3: "cup", 7: "plate"})


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """A single-scale Deformable DETR with random weights, in the form of a published file."""
    path = tmp_path_factory.mktemp("official") / "r50_deformable_detr_single_scale.pth"
    torch.save(training_file(filled(deformable(levels=1))), path)
    yield path
    path.unlink()


@pytest.fixture
def quick():
    """Save the time that starting weights take."""
    with quick_builds():
        yield


@pytest.mark.usefixtures("quick")
def test_an_official_file_needs_a_recipe_where_two_fit(official_file, folder, capsys):
    """Exit code 2 names the candidates."""
    code, out, err = run(capsys, "--checkpoint", official_file, "--data", folder)
    assert (code, out) == (2, "")
    assert "fits deformable_single_scale and deformable_single_scale_dc5" in err
    assert "--recipe" in err
    code, out, err = run(capsys, "--checkpoint", official_file, "--data", folder, "--recipe", "deformable_refine")
    assert (code, out) == (2, "")
    assert "does not fit recipe deformable_refine: " in err


@pytest.mark.usefixtures("quick")
def test_an_official_file_is_evaluated_as_its_authors_do(official_file, folder, tmp_path, capsys):
    """One picture a batch, Pillow's resizing by the official rule, the 100 best pairs, category ids: as by hand.

    The pictures are of two sizes, and so long that the longer side's limit makes them small.
    """
    out = tmp_path / "found.json"
    coco = shutil.copytree(folder, tmp_path / "coco")
    sizes = {1: (48, 960), 2: (50, 800)}
    path = coco / "annotations" / "instances_val.json"
    raw = json.loads(path.read_text())
    for number, (height, width) in sizes.items():
        raw["images"][number - 1] |= {"height": height, "width": width}
        Image.open(coco / "val" / f"{number}.jpg").resize((width, height)).save(coco / "val" / f"{number}.jpg")
    path.write_text(json.dumps(raw))
    recipe = "deformable_single_scale"
    arguments = ["--checkpoint", official_file, "--data", coco, "--recipe", recipe, "--num-pictures", 2]
    found = described(capsys, *arguments, "--predictions", out)
    results = json.loads(out.read_text())
    detector = read_official(official_file, recipe).detector
    for number, resized in ((1, [67, 1340]), (2, [83, 1328])):
        assert_equals_by_hand(
            [entry for entry in results if entry["image_id"] == number],
            detector,
            Image.open(coco / "val" / f"{number}.jpg"),
            resized,
        )
    inside = sum(entry["category_id"] in (3, 7) for entry in results)
    assert (found["recipe"], found["parameters"], found["detections"]) == (recipe, "raw", 200)
    assert found["detections_of_other_categories"] == 200 - inside


def assert_equals_by_hand(results, detector, image, size):
    """Resize with torchvision, detect in a batch of one, keep the best pairs; compare with the entries of a picture."""
    pixels = torch.from_numpy(np.array(TF.resize(image, size))).permute(2, 0, 1)[None]
    nobody = torch.zeros(0, dtype=torch.int64)
    target = Target(
        labels=nobody, boxes=torch.zeros(0, 4), annotation_ids=nobody, picture_id=1, original_size=image.size[::-1]
    )
    batch = Batch(images=pixels, padding_mask=torch.zeros(1, *size, dtype=torch.bool), targets=(target,))
    with torch.no_grad():
        prediction = detector.model(batch)[-1]
    best, pairs = prediction.logits.sigmoid().flatten().topk(100)
    assert [entry["category_id"] for entry in results] == (pairs % 91).tolist()
    np.testing.assert_allclose([entry["score"] for entry in results], best, rtol=1e-6)
    x, y, w, h = prediction.boxes[0][pairs // 91].T
    width, height = image.size
    expected = torch.stack([(x - w / 2) * width, (y - h / 2) * height, w * width, h * height], dim=1)
    np.testing.assert_allclose([entry["bbox"] for entry in results], expected, atol=1e-3)
