"""The losses against their formulas, one query, class and box at a time."""

from dataclasses import replace

import pytest
import torch
from loss_oracle import class_loss, given, prediction_of, targets_of, terms
from pydantic import ValidationError

from core.config import (
    CrossEntropy,
    Custom,
    EncoderSupervision,
    ExperimentConfig,
    Focal,
    IoUAware,
    LossConfig,
    Matcher,
    ModelConfig,
)
from core.loss.classification import FocalLoss
from core.loss.criterion import build_criterion

LOSSES = [Focal(alpha=0.3, gamma=1.5), IoUAware(), CrossEntropy(no_object_weight=0.2)]
KINDS = pytest.mark.parametrize("classification", LOSSES, ids=lambda part: part.kind)


def _criterion(classification=LOSSES[0], *, supervision=None, **changes):
    matcher = Matcher(cost="probability", repeats=changes.pop("repeats", 1))
    loss = LossConfig(classification=classification, matcher=matcher, **changes)
    return build_criterion(loss, encoder_supervision=supervision)


def _activation(classification):
    return "softmax" if classification.kind == "cross_entropy" else "sigmoid"


def _values(found, **which):
    """Return the terms with those attributes, by name."""
    chosen = [term for term in found if all(getattr(term, name) == value for name, value in which.items())]
    assert [term.name for term in chosen] == ["class", "l1", "giou"]
    return {term.name: term.value.item() for term in chosen}


def _close(expected):
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def _mask(prediction, share, seed=1):
    """Return the prediction with some queries invalid, the first one of each picture not."""
    drawn = torch.rand(prediction.logits.shape[:2], generator=torch.Generator().manual_seed(seed)) < share
    drawn[:, 0] = True
    return replace(prediction, valid=drawn)


@KINDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("counts", [(2, 1), (2, 1, 9, 0)], ids=["whole step", "part of a step"])
def test_class_losses_equal_the_formulas(classification, masked, repeats, counts):
    """Each loss is the sum over its own pictures, over the normaliser of the step, with masks and repetitions."""
    loss = _criterion(classification).classification
    prediction = prediction_of(2, num_queries=7, activation=_activation(classification))
    background = prediction.num_classes
    labels = torch.tensor([[background, 0, 2, 2, background, 1, 0], [1, background, background, 0, 1, background, 2]])
    iou = torch.rand(2, 7, generator=torch.Generator().manual_seed(2)) * (labels < background)
    valid = _mask(prediction, 0.6).valid if masked else None
    found = loss(prediction.logits, labels, iou=iou, valid=valid, counts=counts, repeats=repeats)
    assert found.shape == ()
    plain = (labels.tolist(), iou.tolist(), valid.tolist() if masked else None)
    expected = class_loss(classification, prediction.logits.tolist(), *plain, counts, repeats)
    assert found.item() == _close(expected)
    assert expected > 0.01


@KINDS
@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0), (9, 2)])
def test_terms_equal_the_formulas(classification, counts):
    """Also without boxes in a picture or in the step, and with more boxes than queries."""
    criterion = _criterion(classification)
    prediction, targets = prediction_of(2, activation=_activation(classification)), targets_of(*counts)
    found = criterion((prediction,), targets, counts)
    assignments = criterion.matcher(prediction, targets)
    assert _values(found) == _close(terms(prediction, targets, assignments, classification, counts))
    assert {term.name: term.weight for term in found} == {"class": 2, "l1": 5, "giou": 2}
    assert (found[0].source, found[0].layer) == ("decoder", 0)


@KINDS
def test_one_to_many_gives_each_box_its_queries(classification):
    """With `repeats` 2 each box has two queries in the decoder's rows, and the sums are divided by twice the boxes."""
    criterion = _criterion(classification, repeats=2)
    counts = (2, 1, 0)
    prediction = prediction_of(3, num_queries=6, activation=_activation(classification))
    encoder = replace(prediction, source="encoder", layer=1)
    targets = targets_of(*counts)
    found = criterion((encoder, prediction), targets, counts)
    repeated = replace(prediction, matching="one_to_many", repeats=2)
    assignments = criterion.matcher(repeated, targets)
    assert [sorted(a.targets.tolist()) for a in assignments] == [[0, 0, 1, 1], [0, 0], []]
    assert _values(found, source="decoder") == _close(terms(repeated, targets, assignments, classification, counts))
    once = criterion.matcher(encoder, targets)
    assert _values(found, source="encoder") == _close(terms(encoder, targets, once, classification, counts))


@KINDS
def test_given_matches_are_trained_as_they_are(classification):
    """Denoising rows: what is assigned has that label and box, other valid queries are no objects, padding is none."""
    criterion = _criterion(classification)
    counts = (2, 1)
    assignments = given([(0, 1), (1, 0), (4, 1), (5, 0)], [(0, 0), (4, 0)])  # two groups of two, each with its twins
    valid = torch.tensor([[True] * 8, [True, False] * 4])
    prediction = prediction_of(
        2,
        num_queries=8,
        activation=_activation(classification),
        source="denoising",
        group="denoising",
        matching="given",
        assignments=assignments,
        valid=valid,
        repeats=2,
    )
    found = criterion((prediction, prediction_of(2, activation=prediction.activation)), targets_of(*counts), counts)
    expected = terms(prediction, targets_of(*counts), assignments, classification, counts)
    assert _values(found, source="denoising") == _close(expected)
    unpadded = replace(prediction, valid=None)
    found = criterion((unpadded,), targets_of(*counts), counts)
    assert _values(found) == _close(terms(unpadded, targets_of(*counts), assignments, classification, counts))


def test_given_matching_without_matches_is_refused():
    """A denoising row that lacks its assignments is told by its name."""
    prediction = prediction_of(1, source="denoising", matching="given")
    with pytest.raises(ValueError, match="denoising layer 0 is to be matched as given"):
        _criterion()((prediction,), targets_of(1), (1,))


@KINDS
def test_groups_of_extra_queries_are_divided_by_their_number(classification):
    """Extra rows of three groups match each group alone, and are divided by three times the boxes."""
    criterion = _criterion(classification)
    counts = (2, 1)
    prediction = prediction_of(
        2, num_queries=6, activation=_activation(classification), source="auxiliary", group="extra", repeats=3
    )
    targets = targets_of(*counts)
    assignments = criterion.matcher(prediction, targets)
    assert [len(a.queries) for a in assignments] == [6, 3]
    found = criterion((prediction,), targets, counts)
    assert _values(found) == _close(terms(prediction, targets, assignments, classification, counts))


def test_encoder_terms_skip_invalid_tokens_and_ignore_labels_when_class_agnostic():
    """Invalid tokens give no class loss, and a class-agnostic prediction sees every label as 0."""
    valid = torch.tensor([[True, False, True, True, True], [True] * 5])
    criterion = _criterion()
    encoder = prediction_of(2, source="encoder", layer=1, valid=valid, class_agnostic=True)
    targets = targets_of(2, 2)
    found = criterion((encoder, prediction_of(2)), targets, (2, 2))
    expected = terms(encoder, targets, criterion.matcher(encoder, targets), LOSSES[0], (2, 2))
    assert _values(found, source="encoder") == _close(expected)


@KINDS
def test_the_encoder_may_have_a_loss_and_a_weight_of_its_own(classification):
    """`encoder_supervision.classification` and `.weight` hold for every encoder row and for no other."""
    supervision = EncoderSupervision(classification=classification, weight=0.5, labels="class_aware")
    criterion = _criterion(Focal(), supervision=supervision)
    kind = _activation(classification)
    rows = [prediction_of(2, source="encoder", layer=layer, activation=kind) for layer in (1, 2)]
    decoder, targets, counts = prediction_of(2), targets_of(2, 1), (2, 1)
    found = criterion((*rows, decoder), targets, counts)
    for row in rows:
        expected = terms(row, targets, criterion.matcher(row, targets), classification, counts)
        assert _values(found, source="encoder", layer=row.layer) == _close(expected)
    assert [term.weight for term in found] == [1, 2.5, 1] * 2 + [2, 5, 2]
    expected = terms(decoder, targets, criterion.matcher(decoder, targets), Focal(), counts)
    assert _values(found, source="decoder") == _close(expected)


def test_only_the_selected_tokens_may_be_trained():
    """With tokens `selected` the encoder's loss sees as many of its best valid tokens as there are queries."""
    criterion = _criterion(supervision=EncoderSupervision(tokens="selected"))
    encoder = _mask(prediction_of(2, num_queries=12, source="encoder", layer=1), 0.8)
    targets, counts = targets_of(2, 1), (2, 1)
    extra = prediction_of(2, num_queries=6, source="auxiliary", group="extra", repeats=2)
    found = criterion((encoder, extra, prediction_of(2, num_queries=4)), targets, counts)
    chosen = encoder.best(4)
    expected = terms(chosen, targets, criterion.matcher(chosen, targets), LOSSES[0], counts)
    assert _values(found, source="encoder") == _close(expected)
    with pytest.raises(ValueError, match=r"set encoder_supervision\.tokens to all"):
        criterion((encoder,), targets, counts)


def test_tokens_detect_where_there_is_no_decoder():
    """Without decoder rows the encoder's are trained as they are, and it is they that are matched one to many."""
    encoder = _mask(prediction_of(2, num_queries=9, source="encoder", layer=2), 0.9)
    targets, counts = targets_of(2, 1), (2, 1)
    for repeats in (1, 2):
        criterion = _criterion(repeats=repeats, auxiliary=False, supervision=EncoderSupervision(labels="class_aware"))
        seen = replace(encoder, matching="one_to_many", repeats=repeats)
        found = criterion((replace(encoder, layer=1), encoder), targets, counts)
        assert [term.layer for term in found] == [1, 1, 1, 2, 2, 2]
        expected = terms(seen, targets, criterion.matcher(seen, targets), LOSSES[0], counts)
        assert _values(found, layer=2) == _close(expected)


def test_only_the_last_layer_is_trained_without_auxiliary_losses():
    """`auxiliary: false` drops the earlier layers of the decoder, of denoising and of extra queries, not the encoder's.

    DINO's denoising losses follow the decoder's in this, too.
    """
    predictions = tuple(
        prediction_of(2, num_queries=4, layer=layer, source=source, matching=matching, assignments=assignments)
        for layer in range(3)
        for source, matching, assignments in [
            ("encoder", "one_to_one", None),
            ("decoder", "one_to_one", None),
            ("denoising", "given", given([(0, 0)], [(3, 0)])),
            ("auxiliary", "one_to_one", None),
        ]
    )
    targets = targets_of(2, 1)
    with_all = _criterion()(predictions, targets, (2, 1))
    alone = _criterion(auxiliary=False)(predictions, targets, (2, 1))
    assert len(with_all) == 3 * len(predictions)
    kept = [term for term in with_all if term.source == "encoder" or term.layer == 2]
    assert [(t.source, t.layer, t.name, t.value.item()) for t in alone] == [
        (t.source, t.layer, t.name, t.value.item()) for t in kept
    ]


def test_iou_target_gets_no_gradient():
    """The IoU that the class aims at is a number: the class term does not move the boxes."""
    prediction = prediction_of(2)
    term = _criterion(IoUAware())((prediction,), targets_of(2, 2), (2, 2))[0]
    term.value.backward()
    assert prediction.boxes.grad is None
    assert prediction.logits.grad.abs().sum() > 0


def _part(prediction, pictures):
    """Return some pictures of a prediction."""
    return replace(
        prediction,
        logits=prediction.logits[pictures],
        boxes=prediction.boxes[pictures],
        assignments=prediction.assignments and prediction.assignments[pictures],
        valid=None if prediction.valid is None else prediction.valid[pictures],
    )


@KINDS
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("counts", [(2, 0, 7, 1), (0, 0, 3, 0), (0, 0, 0, 0)])
def test_the_parts_of_a_batch_add_up_to_the_batch(classification, repeats, counts):
    """Pictures 0 and 1, then 2 and 3, with the counts of all four: the terms of both add up to those of the whole."""
    kind = _activation(classification)
    rows = (
        _mask(prediction_of(4, num_queries=12, source="encoder", layer=1, activation=kind), 0.6),
        prediction_of(4, num_queries=10, activation=kind),
        prediction_of(
            4,
            num_queries=14,
            source="denoising",
            activation=kind,
            matching="given",
            assignments=given(*([(query, query % count) for query in range(2 * count)] for count in counts)),
            valid=torch.arange(14) < 2 * torch.tensor(counts)[:, None],
            repeats=2,
        ),
        prediction_of(4, num_queries=14, source="auxiliary", activation=kind, repeats=2),
    )
    criterion, targets = _criterion(classification, repeats=repeats), targets_of(*counts)
    whole = criterion(rows, targets, counts)
    parts = [
        criterion(tuple(_part(row, pictures) for row in rows), targets[pictures], counts)
        for pictures in (slice(0, 2), slice(2, 4))
    ]
    found = [first.value.item() + second.value.item() for first, second in zip(*parts, strict=True)]
    assert found == pytest.approx([term.value.item() for term in whole], rel=1e-5, abs=1e-7)
    assert len(found) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KINDS
def test_losses_are_computed_in_single_precision(classification, dtype):
    """Of half-precision outputs and under autocast, the terms are those of the same numbers in single precision."""
    criterion = _criterion(classification)
    kind = _activation(classification)
    rows = [prediction_of(2, activation=kind), prediction_of(2, source="encoder", layer=1, activation=kind)]
    halves = tuple(replace(row, logits=row.logits.to(dtype), boxes=row.boxes.to(dtype)) for row in rows)
    rounded = tuple(replace(row, logits=row.logits.float(), boxes=row.boxes.float()) for row in halves)
    targets = targets_of(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion(halves, targets, (2, 3))
    assert {term.value.dtype for term in found} == {torch.float32}
    expected = criterion(rounded, targets, (2, 3))
    assert [term.value.item() for term in found] == [term.value.item() for term in expected]


class Halved(FocalLoss):
    """A loss of one's own."""

    def __call__(self, *inputs, **named):
        """Return half of the focal loss."""
        return super().__call__(*inputs, **named) / 2


def test_a_loss_of_ones_own_takes_the_place_of_a_built_in_one():
    """`kind: custom` names a class, which is built with its args."""
    part = Custom(target=f"{__name__}:Halved", args={"alpha": 0.25, "gamma": 2.0})
    inputs = (prediction_of(2),), targets_of(2, 1), (2, 1)
    half, whole = _criterion(part)(*inputs), _criterion(Focal())(*inputs)
    assert half[0].value.item() == pytest.approx(whole[0].value.item() / 2)


class Summed(FocalLoss):
    """A loss of one's own that forgets that there are rows."""

    def __call__(self, *inputs, **named):
        """Return one number for all rows."""
        return super().__call__(*inputs, **named).sum()


def test_a_loss_that_mixes_rows_is_refused():
    """The message says what to sum over."""
    criterion = _criterion(Custom(target=f"{__name__}:Summed", args={"alpha": 0.25, "gamma": 2.0}))
    with pytest.raises(ValueError, match=r"Summed gives a loss of shape \[\] for 1 rows: sum over the last three"):
        criterion((prediction_of(2),), targets_of(2, 1), (2, 1))


@KINDS
@pytest.mark.parametrize("counts", [(2, 1), (0, 0), (7, 2)])
def test_layers_together_have_the_terms_of_each_alone(classification, counts):
    """Rows of one kind are computed at once, in the order they came in; rows of other kinds beside them."""
    kind, criterion = _activation(classification), _criterion(classification)
    shared = _mask(prediction_of(2, num_queries=6, activation=kind), 0.7).valid
    assignments = given(*([(query, query % count) for query in range(count)] for count in counts))
    rows = [
        row
        for layer in range(3)
        for row in (
            prediction_of(2, activation=kind, layer=layer),
            prediction_of(
                2,
                num_queries=7,
                activation=kind,
                layer=layer,
                source="denoising",
                matching="given",
                assignments=assignments,
            ),
            replace(prediction_of(2, num_queries=6, activation=kind, source="auxiliary", layer=layer), valid=shared),
        )
    ]
    targets = targets_of(*counts)
    together = criterion(tuple(rows), targets, counts)
    alone = [term for row in rows for term in criterion((row,), targets, counts)]
    names = [[(term.source, term.layer, term.name) for term in found] for found in (together, alone)]
    assert names[0] == names[1]
    assert [term.value.item() for term in together] == pytest.approx([term.value.item() for term in alone], rel=1e-5)


def test_all_costs_of_a_step_come_in_one_transfer(monkeypatch):
    """Layers, encoder rows and extra rows: on a GPU each transfer would be waited for."""
    transfers = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.numel()) or cpu(self))
    rows = (prediction_of(2, num_queries=9, source="encoder", layer=1), prediction_of(2), prediction_of(2, layer=1))
    _criterion()(rows, targets_of(2, 1), (2, 1))
    assert transfers == [(9 + 5 + 5) * 2 * 2]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:Loss", "no_such_module:Loss cannot be found .*: name an importable module:Class"),
        (f"{__name__}:Missing", "Missing cannot be found"),
        (f"{__name__}:Halved", "Halved cannot be built with beta: .*'beta'"),
    ],
)
def test_a_loss_that_is_not_there_is_told(target, message):
    """A wrong module, class or argument is an error that names it."""
    with pytest.raises(ValueError, match=message):
        _criterion(Custom(target=target, args={"beta": 1}))


@pytest.mark.parametrize(
    ("loss", "supervision"),
    [({"classification": CrossEntropy()}, None), ({}, EncoderSupervision(classification=CrossEntropy()))],
)
def test_focal_cost_of_a_softmax_is_refused(loss, supervision):
    """Wherever cross-entropy stands, the focal matching cost is refused before anything runs, with the remedy."""
    with pytest.raises(ValidationError, match=r"focal matching cost .* set (loss\.)?matcher\.cost to probability"):
        ExperimentConfig(loss=LossConfig(**loss), model=ModelConfig(encoder_supervision=supervision))
