"""Scoring a checkpoint equals what its parts give by hand, and the predictions kept say what was scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_oracle import overlaps
from torchvision.ops import box_convert

from core.checkpoint import load_checkpoint
from core.config import (
    Decoder,
    Deformable,
    DeformableSelf,
    Encoder,
    EvaluationConfig,
    ExperimentConfig,
    LearnedQueries,
    ModelConfig,
    Shapes,
    SmallResNet,
    TrainingConfig,
)
from core.data.batching import collate
from core.data.splits import open_data
from core.detector import build_detector
from core.evaluation.coco_ap import coco_metrics
from core.evaluation.score import evaluate, score, without_overlaps
from core.loss.matcher import HungarianMatcher
from core.metrics import NUMBER_NAMES
from core.trainer import Trainer
from core.types import Detections, Target

CPU = torch.device("cpu")
NUM_QUERIES, NUM_CLASSES, TOP_K = 10, 6, 10
CONFIG = ExperimentConfig(
    model=ModelConfig(
        hidden_dim=32,
        num_heads=4,
        ffn_dim=48,
        backbone=SmallResNet(width=8),
        extra_levels=0,
        encoder=Encoder(num_layers=1, attention=DeformableSelf(num_points=2)),
        decoder=Decoder(num_layers=2, attention=Deformable(num_points=2)),
        queries=LearnedQueries(num_queries=NUM_QUERIES, reference="box", anchor_size=0.3),  # they overlap
    ),
    data=Shapes(side=64, num_train=40, num_val=11),  # the last batch is smaller
    training=TrainingConfig(epochs=10, batch_size=4, lr=2e-3, lr_backbone=2e-3, ema_decay=0.9),
)


@pytest.fixture(scope="module")
def data():
    """The drawn pictures."""
    return open_data(CONFIG.data, root=None, cache=None)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """Some steps of training, after which raw and averaged weights are not the same."""
    trainer = Trainer(CONFIG, seed=0, data=data, device=CPU)
    for _ in range(15):
        trainer.step()
    return trainer.save(tmp_path_factory.mktemp("checkpoints"))


def scored(data, checkpoint, parameters):
    """Evaluate a checkpoint."""
    how = EvaluationConfig(parameters=parameters, top_k=TOP_K)
    return evaluate(CONFIG, how, data=data, checkpoint=checkpoint, device=CPU)


def by_hand(data, checkpoint, parameters):
    """Return the detector with those weights, and the pictures as batches of one."""
    detector = build_detector(CONFIG, num_classes=NUM_CLASSES, seed=9)
    detector.load_state_dict(load_checkpoint(checkpoint)[parameters])
    return detector.eval(), [collate([data.scored.read(index)]) for index in range(len(data.scored))]


@pytest.fixture(scope="module")
def answerable(data, checkpoint):
    """The same pictures with a truth that the raw weights nearly find: some of their detections, moved a little."""
    detector, batches = by_hand(data, checkpoint, "raw")
    annotations = []
    for batch in batches:
        (found,) = detector.detect(batch, top_k=TOP_K + 3)
        for place in (0, 3, 7, TOP_K + 2):  # the last one is beyond what is scored
            x0, y0, x1, y1 = found.boxes_xyxy_px[place].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": found.picture_id,
                    "category_id": data.ground_truth.category_ids[found.labels[place]],
                    "bbox": [x0 + 0.01 * place * (x1 - x0), y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    truth = replace(data.ground_truth, coco={**data.ground_truth.coco, "annotations": annotations})
    return replace(data, ground_truth=truth)


@pytest.mark.parametrize("parameters", ["raw", "averaged"])
def test_the_metrics_are_those_of_detecting_by_hand(answerable, checkpoint, parameters):
    """All numbers equal those of the detections of each picture alone: no batch or picture is lost or repeated."""
    data = answerable
    detector, batches = by_hand(data, checkpoint, parameters)
    expected = coco_metrics(
        [found for batch in batches for found in detector.detect(batch, top_k=TOP_K)],
        data.ground_truth,
        class_names=data.class_names,
        picture_ids=data.scored.picture_ids,
    )
    metrics = scored(data, checkpoint, parameters).metrics
    assert 0.01 < expected.numbers()["ap"] < 0.99  # there is something to compare
    for name in NUMBER_NAMES:
        assert getattr(metrics, name) == pytest.approx(getattr(expected, name), abs=1e-6)
    assert metrics.per_class.keys() == expected.per_class.keys()
    for name, numbers in expected.per_class.items():
        assert metrics.per_class[name] == pytest.approx(numbers, abs=1e-6)
    assert (metrics.num_pictures, metrics.num_boxes) == (len(batches), 4 * len(batches))


def test_the_predictions_are_the_models_own(data, checkpoint):
    """Each picture keeps every (query, class) pair once, best first, with the model's score and box, whatever top_k."""
    detector, batches = by_hand(data, checkpoint, "averaged")
    columns = scored(data, checkpoint, "averaged").predictions
    assert {len(column) for column in columns.values()} == {len(batches) * NUM_QUERIES * NUM_CLASSES}
    assert set(columns["layer"]) == {1}  # the second, last one
    for batch in batches:
        prediction = detector.predict(batch)
        rows = columns["image_id"] == batch.targets[0].picture_id
        queries, classes, scores = (columns[name][rows] for name in ("query", "class", "score"))
        assert (np.diff(scores) <= 0).all()
        assert sorted(zip(queries, classes, strict=True)) == list(np.ndindex(NUM_QUERIES, NUM_CLASSES))
        np.testing.assert_allclose(scores, prediction.logits[0].sigmoid()[queries, classes], atol=1e-5)
        cx, cy, w, h = 64 * prediction.boxes[0].numpy()[queries].T
        boxes = np.stack([columns[name][rows] for name in ("x0", "y0", "x1", "y1")])
        np.testing.assert_allclose(boxes, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1e-3)


def test_gt_id_names_the_annotation_that_matching_gives_a_query(data, checkpoint):
    """Read back through the ground truth, in another order of its boxes, each query owns the same annotation."""
    detector, batches = by_hand(data, checkpoint, "raw")
    columns = scored(data, checkpoint, "raw").predictions
    costs = CONFIG.loss.matcher
    match = HungarianMatcher(
        cost=costs.cost, cost_class=costs.cost_class, cost_l1=costs.cost_l1, cost_giou=costs.cost_giou
    )
    for batch in batches:
        picture_id = batch.targets[0].picture_id
        truth = [entry for entry in data.ground_truth.coco["annotations"] if entry["image_id"] == picture_id][::-1]
        x, y, w, h = torch.tensor([entry["bbox"] for entry in truth]).T / 64
        target = Target(
            labels=torch.tensor([data.ground_truth.category_ids.index(entry["category_id"]) for entry in truth]),
            boxes=torch.stack([x + w / 2, y + h / 2, w, h], dim=1),
            annotation_ids=torch.zeros(len(truth), dtype=torch.int64),  # of no use here
            picture_id=picture_id,
            original_size=(64, 64),
        )
        (assignment,) = match(detector.predict(batch), (target,))
        owned = np.full(NUM_QUERIES, -1)
        owned[assignment.queries] = [truth[index]["id"] for index in assignment.targets]
        assert (owned >= 0).sum() == len(truth)
        rows = columns["image_id"] == picture_id
        np.testing.assert_array_equal(columns["gt_id"][rows], owned[columns["query"][rows]])


def test_raw_and_averaged_weights_are_scored_apart(answerable, checkpoint):
    """With averaging on, raw and averaged weights have predictions and scores of their own."""
    raw, averaged = (scored(answerable, checkpoint, parameters) for parameters in ("raw", "averaged"))
    assert raw.predictions.keys() == averaged.predictions.keys()
    assert np.abs(raw.predictions["score"] - averaged.predictions["score"]).max() > 1e-3
    assert raw.metrics.numbers()["ap"] != averaged.metrics.numbers()["ap"]


def test_without_averaging_the_raw_weights_are_scored(data, tmp_path):
    """A checkpoint that has no averaged weights gives the same for both."""
    config = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"ema_decay": None})})
    path = Trainer(config, seed=0, data=data, device=CPU).save(tmp_path)
    raw, averaged = (scored(data, path, parameters) for parameters in ("raw", "averaged"))
    assert raw.metrics == averaged.metrics
    for name, column in raw.predictions.items():
        np.testing.assert_array_equal(column, averaged.predictions[name])


def kept_by_hand(found, iou):
    """Keep each detection that overlaps no kept one of its class by more than `iou`, best first."""
    kept = []
    boxes, labels = box_convert(found.boxes_xyxy_px, "xyxy", "cxcywh").tolist(), found.labels.tolist()
    for place in range(len(boxes)):
        rivals = [other for other in kept if labels[other] == labels[place]]
        if all(overlaps(boxes[other], boxes[place])[0] <= iou for other in rivals):
            kept.append(place)
    return found.keep(torch.tensor(kept, dtype=torch.int64))


@pytest.mark.parametrize("iou", [0.1, 0.2])
def test_nms_removes_what_overlaps_a_better_box_of_its_class(answerable, checkpoint, iou):
    """The score is that of greedy suppression by hand, class by class, before top_k; predictions stay before NMS."""
    data = answerable
    detector, batches = by_hand(data, checkpoint, "raw")
    found = [one for batch in batches for one in detector.detect(batch, top_k=300)]
    expected = coco_metrics(
        [kept_by_hand(one, iou).best(TOP_K) for one in found],
        data.ground_truth,
        class_names=data.class_names,
        picture_ids=data.scored.picture_ids,
    )
    how = EvaluationConfig(parameters="raw", top_k=TOP_K, nms_iou=iou)
    scored_with = evaluate(CONFIG, how, data=data, checkpoint=checkpoint, device=CPU)
    without = scored(data, checkpoint, "raw")
    assert scored_with.metrics.numbers() == pytest.approx(expected.numbers(), abs=1e-6)
    assert scored_with.metrics != without.metrics
    for name, column in without.predictions.items():
        np.testing.assert_array_equal(scored_with.predictions[name], column)


class Recorded:
    """Somebody's detector: it finds two boxes of each class and their twins, and notes how many pictures it saw."""

    def __init__(self, recalled):
        self.recalled = recalled
        self.sizes = []

    def detect(self, batch, *, top_k):
        """Return the same boxes for every picture."""
        self.sizes.append((len(batch.targets), top_k))
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [0, 0, 10, 9]])
        return tuple(
            Detections(
                picture_id=target.picture_id,
                scores=torch.tensor([0.9, 0.8, 0.7, 0.6]),
                labels=torch.tensor([0, 0, 0, 1]),
                boxes_xyxy_px=boxes,
                queries=torch.arange(4),
                gt_ids=torch.full((4,), -1),
                layer=0,
                recalled=None if self.recalled is None else min(self.recalled, len(target.labels)),
            )
            for target in batch.targets
        )


class Crowding:
    """A detector that needs NMS: it finds the first true box of each picture 500 times, and then all of them."""

    def __init__(self):
        self.asked = set()

    def detect(self, batch, *, top_k):
        """Return the best `top_k`."""
        self.asked.add(top_k)
        return tuple(self._found(target).best(top_k) for target in batch.targets)

    def _found(self, target):
        count = 500 + len(target.labels)
        places = torch.cat([torch.zeros(500, dtype=torch.int64), torch.arange(len(target.labels))])
        return Detections(
            picture_id=target.picture_id,
            scores=torch.linspace(0.9, 0.1, count),
            labels=target.labels[places],
            boxes_xyxy_px=64 * box_convert(target.boxes, "cxcywh", "xyxy")[places],
            queries=torch.arange(count),
            gt_ids=torch.full((count,), -1),
            layer=0,
        )


def test_nms_chooses_from_more_than_is_kept(data):
    """Behind 500 repetitions of one box, NMS still finds the others; without NMS they are not asked for."""
    detector = Crowding()
    with_nms, found = score(detector, EvaluationConfig(nms_iou=0.9), data=data, indices=range(11), device=CPU)
    assert with_nms.ar100 == 1.0
    assert min(len(one.scores) for one in found) > 500
    without, _ = score(detector, EvaluationConfig(), data=data, indices=range(11), device=CPU)
    assert without.ar100 < 0.9
    assert detector.asked == {1000, 300}
    wide = EvaluationConfig(nms_iou=0.9, top_k=2000)
    score(detector, wide, data=data, indices=range(1), device=CPU)
    assert detector.asked == {1000, 300, 2000}


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 11), (4, [4, 4, 3])])
def test_pictures_are_scored_in_batches_of_the_evaluations_size(data, batch_size, sizes):
    """`evaluation.batch_size` pictures go through any detector together, which is asked for what is kept."""
    detector = Recorded(None)
    how = EvaluationConfig(batch_size=batch_size, top_k=2)
    metrics, found = score(detector, how, data=data, indices=range(11), device=CPU)
    assert detector.sizes == [(size, 300) for size in sizes]
    assert {len(one.scores) for one in found} == {4}
    assert metrics.ar50_proposals is None


def test_nms_keeps_order_and_other_classes():
    """An overlap of .9 goes, one of .4 stays, and a box of another class is no rival; the first ones stay first."""
    (found,) = Recorded(None).detect(collate([open_data(CONFIG.data, root=None, cache=None).scored.read(0)]), top_k=9)
    assert without_overlaps(found, iou=0.5).queries.tolist() == [0, 2, 3]
    assert without_overlaps(found, iou=0.95).queries.tolist() == [0, 1, 2, 3]
    nothing = found.best(0)
    assert len(without_overlaps(nothing, iou=0.5).scores) == 0


def test_recall_of_proposals_is_over_all_true_boxes(data):
    """The pictures' counts are added up and divided by the true boxes; where nothing is selected it is None."""
    counts = [len(data.scored.read(index).labels) for index in range(11)]
    metrics, _ = score(Recorded(2), EvaluationConfig(), data=data, indices=range(11), device=CPU)
    assert metrics.ar50_proposals == pytest.approx(sum(min(2, count) for count in counts) / sum(counts))
    assert "ar50_proposals" in metrics.numbers()
    assert 0 < metrics.ar50_proposals < 1


def test_how_queries_become_detections_is_the_evaluations(data, checkpoint):
    """Scored with one class a query, a checkpoint of a config that says all keeps one row a query, its best class."""
    how = EvaluationConfig(parameters="raw", classes_per_query="one")
    columns = evaluate(CONFIG, how, data=data, checkpoint=checkpoint, device=CPU).predictions
    detector, batches = by_hand(data, checkpoint, "raw")
    for batch in batches:
        rows = columns["image_id"] == batch.targets[0].picture_id
        queries = columns["query"][rows]
        assert sorted(queries) == list(range(NUM_QUERIES))
        expected = detector.predict(batch).logits[0].argmax(-1).numpy()
        np.testing.assert_array_equal(columns["class"][rows], expected[queries])
