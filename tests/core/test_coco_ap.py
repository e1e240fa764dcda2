"""COCO's numbers against pycocotools used by hand, and what it does not handle; every test with each scorer."""

import contextlib
import copy
import io
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.config import Shapes
from core.data.pictures import GroundTruth
from core.data.splits import open_data
from core.evaluation import coco_ap
from core.evaluation.coco_ap import coco_metrics
from core.metrics import COCO_NAMES
from core.seeding import numpy_stream
from core.types import Detections

CATEGORY_IDS = (3, 7, 90)
NAMES = ("cell", "plate", "dust")
NUM_RANDOM_SETS = 200


@pytest.fixture(autouse=True, params=["hotcoco", "pycocotools"])
def scorer(request, monkeypatch):
    """Score by one of the two."""
    monkeypatch.setenv("WORKBENCH_SCORER", request.param)
    return request.param


def truth(annotations, num_pictures=2, thresholds=(32.0, 96.0)):
    """Number annotations (picture, label, box xywh, crowd) as a file would, from 1."""
    return GroundTruth(
        coco={
            "images": [{"id": 10 + number, "height": 400, "width": 400} for number in range(num_pictures)],
            "annotations": [
                {
                    "id": number,
                    "image_id": 10 + picture,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
                for number, (picture, label, box, crowd) in enumerate(annotations, start=1)
            ],
            "categories": [{"id": key, "name": name} for key, name in zip(CATEGORY_IDS, NAMES, strict=True)],
        },
        category_ids=CATEGORY_IDS,
        size_thresholds_px=thresholds,
    )


def detected(picture_id, boxes_xywh, labels, scores):
    """Return the detections of one picture."""
    boxes = torch.tensor(boxes_xywh, dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        picture_id=picture_id,
        scores=torch.tensor(scores, dtype=torch.float64),
        labels=torch.tensor(labels, dtype=torch.int64),
        boxes_xyxy_px=boxes,
        queries=torch.arange(len(scores)),
        gt_ids=torch.full((len(scores),), -1),
        layer=0,
    )


def score(detections, ground_truth):
    """Score all pictures of a ground truth."""
    picture_ids = [image["id"] for image in ground_truth.coco["images"]]
    return coco_metrics(detections, ground_truth, class_names=NAMES, picture_ids=picture_ids)


def drawn_case():
    """Return a ground truth with every size, crowds and an empty picture, and imperfect detections of it."""
    rng = numpy_stream(0, "case")
    annotations, detections = [], []
    for picture in range(12):
        found = []
        for _ in range(int(rng.integers(0, 8)) if picture else 0):
            x, y = rng.uniform(0, 250, 2)
            w, h = np.exp(rng.uniform(np.log(8), np.log(140), 2))
            label, crowd = int(rng.integers(3)), int(rng.random() < 0.15)
            annotations.append((picture, label, (x, y, w, h), crowd))
            for _ in range(int(rng.integers(0, 3))):
                moved = np.array([x, y, w, h]) + rng.normal(0, 0.06, 4) * [w, h, w, h]
                found.append((moved, label if rng.random() < 0.85 else int(rng.integers(3)), rng.random()))
        found += [(rng.uniform(5, 120, 4), int(rng.integers(3)), rng.random() * 0.5) for _ in range(3)]
        boxes, labels, scores = zip(*found, strict=True)
        detections.append(detected(10 + picture, np.array(boxes), labels, scores))
    return truth(annotations, num_pictures=12), detections


def by_hand(ground_truth, detections, thresholds=(32.0, 96.0)):
    """Score with pycocotools as its demo does."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth.coco)
        coco.createIndex()
        entries = [
            {
                "image_id": one.picture_id,
                "category_id": ground_truth.category_ids[label],
                "bbox": [x, y, x1 - x, y1 - y],
                "score": s,
            }
            for one in detections
            for (x, y, x1, y1), label, s in zip(
                one.boxes_xyxy_px.tolist(), one.labels.tolist(), one.scores.tolist(), strict=True
            )
        ]
        results = coco.loadRes(entries) if entries else COCO()  # it fails on an empty list
        evaluation = COCOeval(coco, results, "bbox")
        small, large = (value**2 for value in thresholds)
        evaluation.params.areaRng = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("thresholds", [(32.0, 96.0), (16.0, 38.4)])
def test_the_twelve_numbers_equal_pycocotools(thresholds):
    """On a drawn case with crowds, an empty picture and both kinds of size limits, to the last bit."""
    ground_truth, detections = drawn_case()
    ground_truth = GroundTruth(
        coco=ground_truth.coco, category_ids=ground_truth.category_ids, size_thresholds_px=thresholds
    )
    metrics = score(detections, ground_truth)
    expected = by_hand(ground_truth, detections, thresholds).stats
    assert [getattr(metrics, name) for name in COCO_NAMES] == expected.tolist()
    assert 0.1 < metrics.ap < 0.9
    assert metrics.num_pictures == 12
    assert metrics.num_boxes == sum(not entry["iscrowd"] for entry in ground_truth.coco["annotations"])
    assert any(entry["iscrowd"] for entry in ground_truth.coco["annotations"])


def test_the_classes_average_to_the_whole():
    """AP is the mean of the classes' AP, and AP50 of their AP50."""
    ground_truth, detections = drawn_case()
    metrics = score(detections, ground_truth)
    assert set(metrics.per_class) == set(NAMES)
    assert np.mean([entry["ap"] for entry in metrics.per_class.values()]) == pytest.approx(metrics.ap)
    assert np.mean([entry["ap50"] for entry in metrics.per_class.values()]) == pytest.approx(metrics.ap50)


def test_a_detection_inside_a_crowd_is_no_mistake():
    """The same box counts as false where no crowd is, and is ignored where one is."""
    real = (0, 0, (10, 10, 50, 50), 0)
    found = [detected(10, [(200, 200, 40, 40), (10, 10, 50, 50)], [0, 0], [0.9, 0.8])]
    alone = score(found, truth([real]))
    with_crowd = score(found, truth([real, (0, 0, (180, 180, 120, 120), 1)]))
    assert alone.ap == pytest.approx(0.5, abs=0.01)
    assert with_crowd.ap == pytest.approx(1)
    assert with_crowd.num_boxes == 1


def test_a_detector_that_finds_nothing_scores_zero():
    """Neither an empty list nor empty pictures crash; sizes without boxes stay None."""
    ground_truth = truth([(0, 0, (10, 10, 20, 20), 0)])
    for nothing in ([], [detected(10, [], [], []), detected(11, [], [], [])]):
        metrics = score(nothing, ground_truth)
        assert (metrics.ap, metrics.ap50, metrics.ap_small, metrics.ar100) == (0.0, 0.0, 0.0, 0.0)
        assert (metrics.ap_medium, metrics.ap_large, metrics.ar_large) == (None, None, None)
        assert metrics.per_class["cell"] == {"ap": 0.0, "ap50": 0.0}
        assert metrics.per_class["dust"] == {"ap": None, "ap50": None}


@pytest.mark.parametrize("annotations", [[], [(0, 0, (10, 10, 50, 50), 1)]], ids=["no boxes", "crowds only"])
def test_without_boxes_there_is_nothing_to_score(annotations):
    """Every number is None, with or without detections."""
    for found in ([], [detected(10, [(10, 10, 50, 50)], [0], [0.9])]):
        metrics = score(found, truth(annotations))
        assert metrics.numbers() == {}
        assert metrics.num_boxes == 0


def test_only_the_asked_pictures_count():
    """Scoring a subset ignores the boxes of the other pictures."""
    ground_truth = truth([(0, 0, (10, 10, 50, 50), 0), (1, 0, (10, 10, 50, 50), 0)])
    found = [detected(10, [(10, 10, 50, 50)], [0], [0.9])]
    assert score(found, ground_truth).ap == pytest.approx(0.5, abs=0.01)
    subset = coco_metrics(found, ground_truth, class_names=NAMES, picture_ids=[10])
    assert subset.ap == pytest.approx(1)
    assert (subset.num_pictures, subset.num_boxes) == (1, 1)


def test_pictures_out_of_place_are_refused():
    """A picture that the truth does not know, or a detection of one that is not scored, is the caller's mistake."""
    ground_truth = truth([(0, 0, (10, 10, 50, 50), 0)])
    with pytest.raises(ValueError, match=r"pictures \[99\] are not in the ground truth"):
        coco_metrics([], ground_truth, class_names=NAMES, picture_ids=[10, 99])
    with pytest.raises(ValueError, match=r"detections of pictures \[11\], which are not scored"):
        coco_metrics([detected(11, [], [], [])], ground_truth, class_names=NAMES, picture_ids=[10])


@pytest.mark.parametrize("first_id", [0, 5])
def test_ids_in_the_file_do_not_matter(first_id):
    """An annotation of id 0, or two of one id, score as any other."""
    ground_truth = truth([(0, 0, (10, 10, 50, 50), 0), (0, 1, (100, 100, 50, 50), 0)])
    for entry in ground_truth.coco["annotations"]:
        entry["id"] = first_id
    found = [detected(10, [(10, 10, 50, 50), (100, 100, 50, 50)], [0, 1], [0.9, 0.8])]
    assert score(found, ground_truth).ap == pytest.approx(1)


def test_nothing_is_printed_and_nothing_changed(capfd):
    """The scorer's talk stays inside, and the ground truth is as before."""
    ground_truth, detections = drawn_case()
    before = copy.deepcopy(ground_truth.coco)
    score(detections, ground_truth)
    assert capfd.readouterr() == ("", "")
    assert ground_truth.coco == before


def test_drawn_shapes_need_both_boxes_and_labels():
    """True boxes with true labels score 1; with random labels they score under .1, so place alone wins nothing."""
    data = open_data(Shapes(side=64, num_train=1, num_val=150), root=None, cache=None)
    rng = numpy_stream(0, "labels")
    right, wrong = [], []
    for index in range(len(data.scored)):
        picture = data.scored.read(index)
        boxes = picture.boxes_xyxy_px.copy()
        boxes[:, 2:] -= boxes[:, :2]
        count = len(boxes)
        right.append(detected(picture.picture_id, boxes.tolist(), picture.labels.tolist(), [1.0] * count))
        labels, scores = rng.integers(len(data.class_names), size=count), rng.random(count)
        wrong.append(detected(picture.picture_id, boxes.tolist(), labels.tolist(), scores.tolist()))

    def ap(detections):
        return coco_metrics(
            detections, data.ground_truth, class_names=data.class_names, picture_ids=data.scored.picture_ids
        ).ap

    assert ap(right) > 0.999
    assert 0 < ap(wrong) < 0.1


def random_set(number):
    """Return a small ground truth and detections in which everything that scorers may treat differently is frequent.

    Equal scores, equal overlaps, crowds, areas that are not the boxes', pictures without boxes or detections, more than
    a hundred detections, ids up to the largest int64 in no order, names of any alphabet, boxes without height.
    """
    rng = numpy_stream(number, "random set")
    ids = sorted({0, 7, (1 << 53) + 1, (1 << 63) - 1, *rng.integers(1 << 62, size=6).tolist()})
    picture_ids = rng.permutation(ids)[: int(rng.integers(1, 7))].tolist()
    category_ids = sorted(rng.permutation(ids)[: int(rng.integers(1, 5))].tolist())
    annotations, detections = [], []
    for picture_id in picture_ids:
        boxes = rng.integers(0, 60, (int(rng.integers(0, 6)), 4)) * 4.0 + [0, 0, 4, 4]
        for box in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture_id,
                    "category_id": int(rng.choice(category_ids)),
                    "bbox": box.tolist(),
                    "area": float(rng.choice([box[2] * box[3], 32.0**2, 96.0**2, rng.uniform(1, 20000)])),
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
        count = int(rng.choice([0, 3, 12, 130]))
        found = rng.integers(0, 60, (count, 4)) * 4.0
        if len(boxes):
            near = rng.random(count) < 0.6
            found[near] = boxes[rng.integers(len(boxes), size=near.sum())]
            found[near] += rng.integers(-1, 2, (near.sum(), 4)) * rng.choice([0.0, 2.0, 4.0])
        scores = rng.choice([0.0, 0.25, 0.5, 0.5, 1.0], count) if rng.random() < 0.5 else rng.random(count)
        labels = rng.integers(len(category_ids), size=count)
        if rng.random() < 0.8:  # else nothing is said of the picture
            detections.append(detected(picture_id, found.clip(0), labels.tolist(), scores.tolist()))
    names = tuple(
        ["\u7ec6\u80de", "\u03ba\u03cd\u03c4\u03c4\u03b1\u03c1\u03bf", "a b", "\U0001f9eb"][: len(category_ids)]
    )
    ground_truth = GroundTruth(
        coco={
            "images": [{"id": key, "height": 250, "width": 250} for key in picture_ids],
            "annotations": annotations,
            "categories": [{"id": key, "name": name} for key, name in zip(category_ids, names, strict=True)],
        },
        category_ids=tuple(category_ids),
        size_thresholds_px=(32.0, 96.0) if rng.random() < 0.5 else (31.25, 75.0),
    )
    return ground_truth, detections, names


def test_random_sets_score_as_with_pycocotools_to_the_last_bit():
    """All twelve numbers and those of every category, on hundreds of sets full of ties, crowds and odd ids."""
    scored = 0
    for number in range(NUM_RANDOM_SETS):
        ground_truth, detections, names = random_set(number)
        picture_ids = [image["id"] for image in ground_truth.coco["images"]]
        metrics = coco_metrics(detections, ground_truth, class_names=names, picture_ids=picture_ids)
        expected = by_hand(ground_truth, detections, ground_truth.size_thresholds_px)
        found = [getattr(metrics, name) for name in COCO_NAMES]
        assert found == [None if value == -1 else value for value in expected.stats], number
        for place, name in enumerate(names):
            for key, precision in (("ap", expected.eval["precision"]), ("ap50", expected.eval["precision"][:1])):
                values = precision[:, :, place, 0, -1]
                wanted = values[values > -1].mean() if (values > -1).any() else None
                assert metrics.per_class[name][key] == wanted, (number, name, key)
        scored += metrics.ap is not None and 0 < metrics.ap < 1
    assert scored > NUM_RANDOM_SETS / 2


def test_equal_scores_are_taken_in_the_order_of_pictures_and_detections():
    """Of equal scores the first detection counts first, and the picture with the smaller id, wherever it is listed."""
    ground_truth = truth([(0, 0, (10, 10, 50, 50), 0), (1, 0, (10, 10, 50, 50), 0)])
    right, wrong = (10, 10, 50, 50), (200, 200, 50, 50)
    first = [detected(10, [right], [0], [0.5]), detected(11, [wrong], [0], [0.5])]
    last = [detected(10, [wrong], [0], [0.5]), detected(11, [right], [0], [0.5])]
    assert score(first, ground_truth).ap == score(first[::-1], ground_truth).ap
    assert score(first, ground_truth).ap > score(last, ground_truth).ap > 0
    within = [detected(10, boxes, [0, 0], [0.5, 0.5]) for boxes in ([right, wrong], [wrong, right])]
    assert score(within[:1], ground_truth).ap > score(within[1:], ground_truth).ap > 0


def test_scores_that_are_no_numbers_count_as_with_pycocotools():
    """A detector whose weights overflowed is scored, not an error: what is no number comes last."""
    ground_truth = truth([(0, 0, (10, 10, 50, 50), 0)])
    found = [detected(10, [(200, 200, 50, 50), (10, 10, 50, 50)], [0, 0], [float("nan"), 0.5])]
    assert score(found, ground_truth).ap == pytest.approx(1)


def test_another_word_for_the_scorer_is_refused(monkeypatch):
    """What WORKBENCH_SCORER may say is told where it says something else."""
    monkeypatch.setenv("WORKBENCH_SCORER", "matlab")
    with pytest.raises(ValueError, match="WORKBENCH_SCORER is 'matlab': one of auto, hotcoco and pycocotools"):
        score([], truth([(0, 0, (10, 10, 50, 50), 0)]))


def test_hotcoco_scores_unless_told_otherwise(monkeypatch):
    """It is what the installation brings; pycocotools is for where it cannot be imported."""
    monkeypatch.delenv("WORKBENCH_SCORER")
    monkeypatch.setattr(coco_ap, "_by_pycocotools", None)
    found = [detected(10, [(10, 10, 50, 50)], [0], [0.9])]
    assert score(found, truth([(0, 0, (10, 10, 50, 50), 0)])).ap == pytest.approx(1)


@pytest.mark.parametrize("asked", ["auto", "hotcoco"])
def test_a_scorer_that_cannot_be_imported_is_told(asked, monkeypatch):
    """Left to itself the other one scores, and one line says so, once; asked for by name it is an error."""
    monkeypatch.setenv("WORKBENCH_SCORER", asked)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    coco_ap._scorer.cache_clear()
    case = [detected(10, [(10, 10, 50, 50)], [0], [0.9])], truth([(0, 0, (10, 10, 50, 50), 0)])
    if asked == "hotcoco":
        with pytest.raises(ImportError, match="hotcoco"):
            score(*case)
    else:
        with pytest.warns(UserWarning, match="hotcoco cannot be imported .*: pycocotools scores, the same but slower"):
            assert score(*case).ap == pytest.approx(1)
        assert score(*case).ap == pytest.approx(1)
    coco_ap._scorer.cache_clear()
