"""Folders in COCO format as they are in the wild: real JPEG files, and every flaw counted."""

import json

import cv2
import numpy as np
import pytest
from coco_folder import CATEGORIES, CONFIG, HEIGHT, WIDTH, Folder, open_folder, small_folder

from core.config import CocoFolder, ExperimentConfig, ShorterSide, TrainingConfig
from core.data import coco, fingerprint
from core.data.batching import scoring_batches, training_batch
from core.data.splits import DataProblem, left_out, open_data


@pytest.fixture
def folder(tmp_path):
    """Return a small folder, not yet written."""
    return small_folder(tmp_path / "data")


def boxes_of(pictures, picture_id):
    """Return the boxes that training sees in a picture."""
    return pictures.read(pictures.picture_ids.index(picture_id)).boxes_xyxy_px.tolist()


def truth_of(data, picture_id):
    """Return the boxes that scoring sees in a picture."""
    return [entry["bbox"] for entry in data.ground_truth.coco["annotations"] if entry["image_id"] == picture_id]


def test_a_clean_folder_is_used_as_a_whole(folder):
    """Pictures, boxes, labels and names come as written, and nothing is reported as left out."""
    data = open_folder(folder)
    assert data.train.picture_ids == (5, 9, 12)
    assert data.scored.picture_ids == (2, 4)
    assert data.class_names == ("cell", "plate")  # in the order of the ids 3, 7
    assert data.ground_truth.category_ids == (3, 7)
    assert data.ground_truth.size_thresholds_px == (32.0, 96.0)
    picture = data.train.read(0)
    assert picture.labels.tolist() == [0, 1]
    assert picture.original_size == (HEIGHT, WIDTH)
    assert picture.image.shape == (24, 32, 3)
    np.testing.assert_array_equal(picture.boxes_xyxy_px, [[5, 6, 15, 14], [20, 4, 26, 19]])
    red = picture.image[10, 10].astype(int)
    assert red[0] > 180 > 60 > red[2]  # RGB, not BGR
    assert left_out(data.report) == []
    assert data.report["train.boxes"] == 6
    assert json.loads(json.dumps(data.report)) == data.report


def test_cocos_own_names_are_found(tmp_path):
    """`train2017` and `instances_train2017.json` serve as well."""
    folder = Folder(tmp_path / "coco", names=("train2017", "val2017"))
    folder.picture("train", 1, [(3, 10, 12, 20, 16)])
    folder.picture("val", 1, [(3, 10, 12, 20, 16)])
    assert len(open_folder(folder).scored) == 1


def test_a_picture_without_objects_stays(folder):
    """It is scored, since finding something in it is a mistake, and learned from."""
    folder.picture("train", 20)
    data = open_folder(folder)
    assert data.train.read(3).boxes_xyxy_px.shape == (0, 4)
    assert data.report["train.pictures_without_boxes"] == 1
    assert data.report["val.pictures_without_boxes"] == 1
    assert {image["id"] for image in data.ground_truth.coco["images"]} == {2, 4}


@pytest.mark.parametrize(
    "box", [(5, 5, 0, 0), (5, 5, 0, 10), (5, 5, 10, -3), (float("nan"), 5, 4, 4), (5, 5, float("inf"), 4)]
)
def test_degenerate_boxes_are_left_out(folder, box):
    """A box without area, or with a coordinate that is no number, is neither learned nor scored."""
    folder.box("train", 5, 3, box)
    folder.box("val", 2, 3, box)
    data = open_folder(folder)
    assert data.report["train.degenerate_boxes"] == data.report["val.degenerate_boxes"] == 1
    assert data.report["val.degenerate_boxes.examples"][0].startswith("picture_2.jpg [")
    assert len(boxes_of(data.train, 5)) == 2
    assert len(truth_of(data, 2)) == 1


def test_boxes_are_clipped_to_the_picture(folder):
    """What passes an edge is cut, and what lies outside goes."""
    folder.box("val", 4, 3, (-10, 40, 30, 20), area=600)
    folder.box("val", 4, 3, (70, 5, 10, 10))
    data = open_folder(folder)
    assert truth_of(data, 4) == [[0, 40, 20, 8]]
    assert data.ground_truth.coco["annotations"][-1]["area"] == 160
    assert boxes_of(data.scored, 4) == [[0, 20, 10, 24]]
    assert data.report["val.clipped_boxes"] == 1
    assert data.report["val.boxes_outside_the_picture"] == 1


def test_rounding_at_the_edge_is_no_flaw(folder):
    """A box that passes the edge by less than a pixel is scored as written and learned clipped, uncounted."""
    folder.box("val", 4, 3, (44.5, 30.25, 20.0, 18.0), area=123.5)
    data = open_folder(folder)
    assert truth_of(data, 4) == [[44.5, 30.25, 20.0, 18.0]]
    assert data.ground_truth.coco["annotations"][-1]["area"] == 123.5  # of the mask, as COCO sorts by size
    assert boxes_of(data.scored, 4) == [[22.25, 15.125, 32, 24]]
    assert left_out(data.report) == []


def test_crowds_are_for_scoring_only(folder):
    """A crowd is kept in the ground truth and is no target."""
    folder.box("train", 5, 3, (2, 2, 30, 30), iscrowd=1)
    folder.box("val", 2, 3, (2, 2, 30, 30), iscrowd=1)
    data = open_folder(folder)
    assert len(boxes_of(data.train, 5)) == 2
    assert len(boxes_of(data.scored, 2)) == 1
    assert [entry["iscrowd"] for entry in data.ground_truth.coco["annotations"]] == [0, 1]
    assert (data.report["val.crowd_boxes"], data.report["val.boxes"]) == (1, 1)
    assert left_out(data.report) == []


def test_missing_and_unreadable_pictures_are_left_out_before_scoring(folder):
    """Neither counts as a picture in which nothing was found: their boxes leave the ground truth."""
    for number, name in ((30, "gone.jpg"), (31, "empty.jpg"), (32, "page.jpg")):
        folder.picture("val", number, [(3, 10, 12, 20, 16)], name=name)
    root = folder.write()
    (root / "val" / "gone.jpg").unlink()
    (root / "val" / "empty.jpg").write_bytes(b"")
    (root / "val" / "page.jpg").write_text("<html>404</html>")
    data = open_data(CONFIG, root=root, cache=None)
    assert data.scored.picture_ids == (2, 4)
    assert {entry["image_id"] for entry in data.ground_truth.coco["annotations"]} == {2}
    assert data.report["val.missing_pictures.examples"] == ["gone.jpg"]
    assert data.report["val.unreadable_pictures.examples"] == ["empty.jpg", "page.jpg"]
    assert left_out(data.report) == [
        "val: missing pictures: 1 (gone.jpg)",
        "val: unreadable pictures: 2 (empty.jpg; page.jpg)",
    ]


def test_annotations_of_the_unknown_are_left_out(folder):
    """Boxes of pictures or categories that the file does not list are counted."""
    folder.box("train", 999, 3, (1, 1, 5, 5))
    folder.box("train", 5, 8, (1, 1, 5, 5))
    data = open_folder(folder)
    assert data.report["train.boxes_of_unknown_pictures"] == 1
    assert data.report["train.boxes_of_unknown_categories.examples"] == ["annotation 8: category 8"]
    assert data.report["train.boxes"] == 6


def test_repeated_ids_keep_the_first_picture_and_every_box(folder):
    """A second picture of an id goes, an exact copy of an annotation goes, another box under the same id stays."""
    folder.picture("val", 2, name="other.jpg")
    folder.box("val", 2, 7, (10, 12, 20, 16), id=1)
    folder.box("val", 2, 7, (30, 12, 20, 16), id=1)
    data = open_folder(folder)
    assert data.scored.picture_ids == (2, 4)
    assert data.report["val.repeated_picture_ids.examples"] == ["2 (other.jpg)"]
    assert data.report["val.repeated_annotations"] == 1
    assert truth_of(data, 2) == [[10, 12, 20, 16], [30, 12, 20, 16]]


def test_every_annotation_has_an_id_of_its_own(folder):
    """The first user of a good id keeps it; the others get numbers that are free, in training and in scoring alike."""
    good, largest = 9_001, 2**63 - 1
    for number in (good, good, largest, largest + 1, -1, None, "7", 1.5, [3]):
        folder.box("val", 4, 3, (5, 5, 10, 10 + len(folder.raw["val"]["annotations"])), id=number)
    folder.box("val", 4, 3, (5, 5, 30, 30), iscrowd=1, id=2)
    del folder.raw["val"]["annotations"][-2]["id"]
    data = open_folder(folder)
    ids = [entry["id"] for entry in data.ground_truth.coco["annotations"]]
    assert ids == [1, good, 3, largest, 4, 5, 6, 7, 8, 9, 2]
    picture = data.scored.read(1)
    assert picture.annotation_ids.tolist() == ids[1:-1]
    assert picture.annotation_ids.dtype == np.int64


def test_malformed_entries_are_left_out(folder):
    """An image without a name or an annotation without a box stops nothing."""
    folder.raw["train"]["images"] += [{"id": 77}, "text", {"id": "x", "file_name": "a.jpg"}]
    folder.raw["train"]["annotations"] += [{"image_id": 5, "category_id": 3}, {"bbox": [1, 2, 3]}, None]
    folder.box("train", 5, 3, (1, 2, 3, 4), bbox=[1, 2, "3", 4])
    data = open_folder(folder)
    assert data.report["train.malformed_images"] == 3
    assert data.report["train.malformed_annotations"] == 4
    assert data.report["train.boxes"] == 6


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_no_picture_is_read_outside_the_folder(folder, name):
    """An annotation file with a name that leaves the folder is refused, even where a picture is there."""
    cv2.imwrite(str(folder.root.parent / "secret.jpg"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    folder.raw["val"]["images"].append({"id": 50, "file_name": name})
    with pytest.raises(DataProblem, match=r"1 file names lead out of the folder of pictures, such as '.*secret"):
        open_folder(folder)
    (problem,) = fingerprint.check_folder(CONFIG, folder.root)
    assert "lead out of the folder" in problem


def test_links_that_lead_round_in_circles_end(folder):
    """A folder in which links lead back to it is named, and not walked through for ever."""
    root = folder.write()
    for name in ("a", "b"):
        (root / "val" / name).symlink_to(root / "val")
    with pytest.raises(DataProblem, match=r"cannot be looked through \(Too many levels of symbolic links\)"):
        fingerprint.fingerprint(CONFIG, root=root)


def test_links_that_multiply_folders_end(folder, monkeypatch):
    """Twenty folders with two links each to the next one make a million paths: told, not walked through."""
    monkeypatch.setattr(fingerprint, "MOST_FOLDERS", 500)
    root = folder.write()
    for number in range(20):
        (root / f"{number}").mkdir()
        for name in ("a", "b"):
            (root / f"{number}" / name).symlink_to(root / f"{number + 1}")
    (root / "val" / "first").symlink_to(root / "0")
    (root / "20").mkdir()
    with pytest.raises(DataProblem, match="holds more than 500 folders: remove links that multiply them"):
        fingerprint.fingerprint(CONFIG, root=root)


def test_link_to_nothing_is_a_missing_picture(folder):
    """A picture's name that is a link to a file that has gone is counted as missing."""
    root = folder.write()
    (root / "val" / "picture_2.jpg").unlink()
    (root / "val" / "picture_2.jpg").symlink_to(root / "gone.jpg")
    assert fingerprint.fingerprint(CONFIG, root=root)
    assert fingerprint.check_folder(CONFIG, root) == []  # another picture of the split is there


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800.jpg"])
def test_name_that_no_file_can_have_is_a_missing_picture(folder, name):
    """An entry whose name is too long for a file, or no text, stops nothing."""
    for split in ("train", "val"):
        folder.raw[split]["images"].append({"id": 50, "file_name": name})
    assert open_folder(folder, cache=folder.root / "cache").report["val.missing_pictures"] == 1
    assert not coco._is_held_out({"file_name": "\ud800.jpg"})


def test_annotations_nested_without_end_are_no_json(folder):
    """Brackets by the hundred thousand are told as what they are."""
    path = folder.write() / "annotations" / "instances_val.json"
    path.write_text("[" * 200_000)
    (problem,) = fingerprint.check_folder(CONFIG, folder.root)
    assert "is not JSON" in problem


def test_pictures_in_subfolders_are_found(folder):
    """A file name may have folders in it."""
    folder.picture("val", 60, [(3, 10, 12, 20, 16)], name="plate_a/x.png")
    assert 60 in open_folder(folder).scored.picture_ids


def test_the_pixels_decide_about_the_size(folder):
    """Where the annotated size is wrong, the picture's own holds and the picture is counted."""
    folder.raw["val"]["images"][0] |= {"height": 480, "width": 640}
    del folder.raw["val"]["images"][1]["height"]
    data = open_folder(folder)
    assert data.scored.read(0).original_size == (HEIGHT, WIDTH)
    assert data.ground_truth.coco["images"][0]["height"] == HEIGHT
    assert data.report["val.pictures_of_another_size_than_annotated"] == 1


def test_examples_are_few(folder):
    """A flaw that is everywhere is counted in full and shown five times."""
    for _ in range(40):
        folder.box("train", 5, 3, (5, 5, 0, 0))
    data = open_folder(folder)
    assert data.report["train.degenerate_boxes"] == 40
    assert len(data.report["train.degenerate_boxes.examples"]) == 5


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_left_is_a_problem_with_its_reasons(folder, split):
    """A split without any usable box names the folder, the counts and the flag."""
    folder.raw[split]["annotations"] = []
    folder.box(split, 5 if split == "train" else 2, 3, (5, 5, 0, 0))
    with pytest.raises(DataProblem, match=rf"data: no usable box is left in {split} \(.*1 degenerate boxes.*--data"):
        open_folder(folder)


def test_tune_is_a_tenth_of_train_that_training_does_not_see(tmp_path):
    """By hashed file name, so other pictures in the folder move none across; val is not even read."""
    folder = Folder(tmp_path / "data")
    for number in range(200):
        folder.picture("train", number, [(3, 10, 12, 20, 16)])
    root = folder.write()
    (root / "annotations" / "instances_val.json").unlink()
    tune = open_data(CONFIG.model_copy(update={"split": "tune"}), root=root, cache=None)
    held_out = set(tune.scored.picture_ids)
    assert 8 <= len(held_out) <= 35
    assert held_out.isdisjoint(tune.train.picture_ids)
    assert len(held_out) + len(tune.train) == 200
    assert {image["id"] for image in tune.ground_truth.coco["images"]} == held_out


def test_a_smaller_subset_lies_within_a_larger_one(folder):
    """`num_train` chooses the same pictures every time; more of them than there are means all."""
    for number in range(100, 130):
        folder.picture("train", number, [(3, 10, 12, 20, 16)])
    root = folder.write()

    def chosen(count):
        config = CONFIG.model_copy(update={"num_train": count})
        return open_data(config, root=root, cache=None).train.picture_ids

    assert len(chosen(8)) == 8
    assert set(chosen(8)) < set(chosen(20))
    assert chosen(8) != tuple(sorted(chosen(20)))[:8]
    assert len(chosen(500)) == 33


def test_the_cache_remembers_sizes_until_a_file_changes(folder, tmp_path):
    """The second opening gives the same pictures and report; a picture that became unreadable is found again."""
    cache = tmp_path / "cache"
    first = open_folder(folder, cache=cache)
    again = open_data(CONFIG, root=folder.root, cache=cache)
    assert again.report == first.report
    assert again.ground_truth == first.ground_truth
    names = sorted(path.name.rpartition("-")[0] for path in cache.iterdir() if not path.name.startswith("."))
    assert names == ["picture-sizes"] * 2 + ["pictures"] * 2  # one for each split, and nothing half-written
    (folder.root / "val" / "picture_4.jpg").write_bytes(b"broken")
    assert open_data(CONFIG, root=folder.root, cache=cache).report["val.unreadable_pictures"] == 1


def test_memory_holds_pictures_up_to_its_limit(folder, monkeypatch):
    """Beyond the limit pictures are read anew, with the same result."""
    unlimited = open_folder(folder)
    monkeypatch.setattr(coco, "KEPT_BYTES", 24 * 32 * 3)  # one picture
    limited = open_data(CONFIG, root=folder.root, cache=None)
    for _ in range(2):
        for index in range(3):
            np.testing.assert_array_equal(limited.train.read(index).image, unlimited.train.read(index).image)
    assert unlimited.train.read(2) is unlimited.train.read(2)
    assert limited.train.read(0) is limited.train.read(0)
    assert limited.train.read(2) is not limited.train.read(2)


def test_a_picture_that_vanishes_later_is_named(folder):
    """A file that breaks while training is a problem of the data, with its path."""
    data = open_folder(folder)
    (folder.root / "train" / "picture_9.jpg").write_bytes(b"broken")
    with pytest.raises(DataProblem, match=r"picture_9.jpg: could be read before and cannot now"):
        data.train.read(1)


def test_orientation_tags_are_ignored(folder):
    """Boxes are in the coordinates of the stored pixels, so a rotation tag turns nothing."""
    root = folder.write()
    path = root / "val" / "picture_2.jpg"
    plain = path.read_bytes()
    tag = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6: a quarter turn
    path.write_bytes(plain[:2] + b"\xff\xe1" + (len(tag) + 2).to_bytes(2, "big") + tag + plain[2:])
    assert cv2.imread(str(path)).shape[:2] == (WIDTH, HEIGHT)  # the tag is there and works
    data = open_data(CONFIG, root=root, cache=None)
    assert data.scored.read(0).original_size == (HEIGHT, WIDTH)


def test_batches_of_real_pictures(folder):
    """The published augmentation trains on varying sizes; scoring resizes to the rule."""
    config = ExperimentConfig(
        data=CocoFolder(resize=ShorterSide(size=40, longest=60)), training=TrainingConfig(batch_size=2)
    )
    data = open_folder(folder, config.data)
    shapes = {tuple(training_batch(data, config, seed=0, step=step).images.shape[2:]) for step in range(8)}
    assert len(shapes) > 2
    (batch,) = scoring_batches(data.scored, [0, 1], batch_size=4)
    assert batch.images.shape == (2, 3, 40, 53)
    x, y, w, h = batch.targets[0].boxes[0].tolist()
    assert (x * WIDTH, y * HEIGHT, w * WIDTH, h * HEIGHT) == pytest.approx((20, 20, 20, 16), abs=1e-4)


def test_classes_of_one_name_are_told_apart(folder):
    """Two categories with the same name get their ids beside it."""
    for raw in folder.raw.values():
        raw["categories"] = [*CATEGORIES, {"id": 11, "name": "cell"}]
    assert open_folder(folder).class_names == ("cell (3)", "plate", "cell (11)")


@pytest.mark.parametrize(
    ("kind", "change", "counted"),
    [
        ("annotations", {"bbox": [10**400, 1, 1, 1]}, "degenerate_boxes"),
        ("annotations", {"bbox": [1, 1, 1, 10**400]}, "degenerate_boxes"),
        ("images", {"id": 10**400}, "malformed_images"),
        ("images", {"height": 10**400}, "pictures_of_another_size_than_annotated"),
        ("annotations", {"area": 10**400}, "boxes"),
    ],
)
def test_numbers_that_nobody_can_count_with_end_no_training(folder, kind, change, counted):
    """What has them is left out and counted; an area alone is that of the box."""
    folder.raw["train"][kind][0].update(change)
    data = open_folder(folder)
    assert data.report[f"train.{counted}"] == (6 if counted == "boxes" else 1)
