"""What single toggles of encoder, queries and decoder mean, each against its definition."""

import pytest
import torch
from toggles import BASES, put

from core.boxes import inverse_sigmoid
from core.config import (
    Decoder,
    Deformable,
    DeformableSelf,
    Encoder,
    EncoderSupervision,
    LearnedQueries,
    ModelConfig,
    Refinement,
    SelectedQueries,
    SmallResNet,
    TokenQueries,
)
from core.detector import build_detector
from core.model.build import build_model
from core.seeding import torch_stream
from core.types import Batch, Target

DETACHED = Refinement(residual_base="detached", sampling_reference="detached")
BOXES = {"queries": LearnedQueries(num_queries=6, reference="box"), "query_position": "sine_of_reference"}
SUPERVISED = EncoderSupervision(labels="class_aware", anchor_scale=0.1)


def _model(*, seed=0, layers=3, **changes):
    values = {
        "hidden_dim": 32,
        "num_heads": 4,
        "ffn_dim": 48,
        "dropout": 0.0,
        "backbone": SmallResNet(width=4),
        "extra_levels": 0,
        "encoder": Encoder(num_layers=2, attention=DeformableSelf(num_points=2)),
        "decoder": Decoder(num_layers=layers, attention=Deformable(num_points=2)),
        "queries": LearnedQueries(num_queries=6),
        **changes,
    }
    model = build_model(ModelConfig(**values), num_classes=3, seed=seed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # zero starts would hide what depends on what
        if name.endswith("last.weight") or "sampling_offsets.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def _batch(*, ids=(0, 1)):
    generator = torch.Generator().manual_seed(2)
    targets = tuple(
        Target(
            labels=torch.tensor([0, 2]),
            boxes=torch.rand(2, 4, generator=generator) * 0.3 + 0.3,
            annotation_ids=torch.arange(2),
            picture_id=number,
            original_size=(64, 64),
        )
        for number in ids
    )
    images = torch.randint(0, 256, (len(ids), 3, 64, 64), dtype=torch.uint8, generator=generator)
    return Batch(images=images, padding_mask=torch.zeros(len(ids), 64, 64, dtype=torch.bool), targets=targets)


def _encoded(model, batch):
    features = model.neck(model.backbone(batch.images, batch.padding_mask), batch.padding_mask)
    question = None if model.question is None else model.question(model.query_sources[0])
    return model.encoder(features, question)


# Refinement


@pytest.mark.parametrize("norm", ["none", "both"])
@pytest.mark.parametrize("base", ["detached", "look_forward_twice", "kept"])
def test_recomputed_boxes_equal_the_refined_ones(norm, base):
    """Where output and refinement read the same features, the second evaluation of the head changes nothing at all."""
    results = []
    for boxes in ("direct", "recomputed"):
        refinement = Refinement(residual_base=base, sampling_reference="detached", boxes=boxes)
        model = _model(
            **BOXES, refinement=refinement, decoder=Decoder(num_layers=3, attention=Deformable(num_points=2), norm=norm)
        )
        predictions = model(_batch())
        sum(prediction.boxes.square().sum() for prediction in predictions).backward()
        results.append((predictions, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (direct, gradients), (recomputed, others) = results
    for ours, theirs in zip(direct, recomputed, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6)


def test_norm_of_the_output_alone_parts_output_and_refinement():
    """DINO: the output's box comes from normalised features, what the next layer starts from does not."""
    refinement = Refinement(residual_base="detached", sampling_reference="detached", boxes="recomputed")
    decoder = Decoder(num_layers=2, attention=Deformable(num_points=2), norm="output_only")
    model = _model(**BOXES, refinement=refinement, decoder=decoder)
    torch.nn.init.uniform_(model.decoder.norm.weight, 0.5, 2.0)  # at 1 it repeats the norm that ends each layer
    hidden, looked_at = [], []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
        layer.register_forward_pre_hook(lambda _module, inputs: looked_at.append(inputs[2]))
    first, second = model(_batch())
    head = model.decoder.box_head.mlps[0]
    start = inverse_sigmoid(looked_at[0])
    carried = (head(hidden[0]) + start).sigmoid()
    torch.testing.assert_close(looked_at[1], carried)
    torch.testing.assert_close(first.boxes, (head(model.decoder.norm(hidden[0])) + start).sigmoid())
    expected = (head(model.decoder.norm(hidden[1])) + inverse_sigmoid(carried)).sigmoid()
    torch.testing.assert_close(second.boxes, expected)
    assert (first.boxes - carried).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["none", "output_only", "both"])
def test_class_heads_read_the_norm_where_there_is_one(norm):
    """DETR normalises every layer's output before the heads; Deformable DETR does not."""
    model = _model(decoder=Decoder(num_layers=2, attention=Deformable(num_points=2), norm=norm))
    hidden = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    for features, prediction in zip(hidden, model(_batch()), strict=False):
        read = features if norm == "none" else model.decoder.norm(features)
        torch.testing.assert_close(prediction.logits, model.class_heads(0, read))


def test_a_repeated_layer_may_run_longer_than_in_training():
    """With one layer for all steps, more steps at scoring go on from where training ends."""
    decoder = Decoder(num_layers=2, attention=Deformable(num_points=2), weights="shared")
    model = _model(**BOXES, refinement=DETACHED, decoder=decoder).eval()
    assert len(model.decoder.layers) == 1
    usual, longer = model(_batch()), model(_batch(), decoder_steps=5)
    assert (len(usual), len(longer)) == (2, 5)
    for ours, theirs in zip(usual, longer, strict=False):
        assert torch.equal(ours.boxes, theirs.boxes)
    assert not torch.equal(longer[-1].boxes, usual[-1].boxes)


def test_without_self_attention_queries_do_not_depend_on_each_other():
    """The control of the NMS question: a query's prediction is the same whatever the others are."""
    seen = {}
    for self_attention in (True, False):
        decoder = Decoder(num_layers=2, attention=Deformable(num_points=2), self_attention=self_attention)
        model = _model(**BOXES, refinement=DETACHED, decoder=decoder)
        before = model(_batch())[-1]
        with torch.no_grad():
            model.query_sources[0].content.weight[1:] += 1.0
        after = model(_batch())[-1]
        seen[self_attention] = torch.equal(before.boxes[:, 0], after.boxes[:, 0])
    assert seen == {True: False, False: True}


# Encoder


def test_every_layer_is_supervised_with_shared_or_own_heads():
    """One prediction a layer, numbered from 1; shared heads are one module, separate ones as many as layers."""
    for layers, heads in (("last", 1), ("all_shared", 1), ("all_separate", 2)):
        supervision = EncoderSupervision(labels="class_aware", layers=layers, anchor_scale=0.1)
        model = _model(encoder_supervision=supervision)
        rows = [prediction.layer for prediction in model(_batch()) if prediction.source == "encoder"]
        assert rows == ([2] if layers == "last" else [1, 2])
        assert len(model.encoder_heads.heads) == heads


def test_a_local_encoder_learns_layer_by_layer():
    """The loss of the last layer reaches that layer alone; without the cut it reaches all, and the backbone."""
    reached = {}
    for local in (False, True):
        supervision = EncoderSupervision(labels="class_aware", layers="all_separate", local=local, anchor_scale=0.1)
        model = _model(encoder_supervision=supervision)
        memory = _encoded(model, _batch())
        memory.tokens.square().sum().backward()
        reached[local] = [
            any(p.grad is not None and p.grad.any() for p in part.parameters())
            for part in (model.backbone, *model.encoder.layers)
        ]
    assert reached == {False: [True, True, True], True: [False, False, True]}


def test_the_first_layers_own_loss_still_trains_the_backbone():
    """Locality cuts between encoder layers, not between the first one and the backbone."""
    supervision = EncoderSupervision(labels="class_aware", layers="all_separate", local=True, anchor_scale=0.1)
    model = _model(encoder_supervision=supervision)
    _encoded(model, _batch()).layers[0].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def test_an_encoder_that_reads_the_queries_changes_with_them():
    """Memory depends on the queries where the encoder reads them; reading noise takes as many parameters."""
    changed, sizes = {}, {}
    for question in ("queries", "constant"):
        encoder = Encoder(num_layers=2, attention=DeformableSelf(num_points=2), question=question)
        model = _model(encoder=encoder)
        before = _encoded(model, _batch()).tokens
        with torch.no_grad():
            model.query_sources[0].content.weight.add_(1.0)
        changed[question] = not torch.equal(before, _encoded(model, _batch()).tokens)
        sizes[question] = sum(p.numel() for p in model.parameters())
    assert changed == {"queries": True, "constant": False}
    assert sizes["queries"] == sizes["constant"]


def test_learned_anchor_scale_starts_at_the_fixed_one():
    """Its proposals start equal, and a gradient reaches width and height."""
    fixed = _model(encoder_supervision=SUPERVISED)
    learned = _model(encoder_supervision=SUPERVISED.model_copy(update={"learned_anchor_scale": True}))
    ours, theirs = learned(_batch())[0], fixed(_batch())[0]
    torch.testing.assert_close(ours.boxes, theirs.boxes)
    ours.boxes.sum().backward()
    assert learned.encoder_heads.anchor_logits.grad.abs().min() > 0


def test_without_a_decoder_the_tokens_are_the_queries():
    """The encoder's prediction is the only one, and the parts of a decoder do not exist."""
    model = _model(layers=0, queries=TokenQueries(), encoder_supervision=SUPERVISED)
    (prediction,) = model(_batch())
    assert prediction.source == "encoder"
    assert not any("decoder" in name or "query" in name for name, _ in model.named_parameters())


# Queries


def test_fixed_centres_keep_their_centres():
    """Only the sides of such anchors are parameters; the centres are in the checkpoint, and drawn from the seed."""
    queries = LearnedQueries(num_queries=6, reference="box", anchors="fixed_centres", anchor_size=0.3)
    model = _model(queries=queries, query_position="sine_of_reference")
    anchors = model.query_sources[0].anchors
    assert [name for name, _ in anchors.named_parameters()] == ["side_logits"]
    assert "query_sources.0.anchors.centres" in model.state_dict()
    other = _model(seed=1, queries=queries, query_position="sine_of_reference").query_sources[0].anchors
    assert not torch.equal(anchors.centres, other.centres)
    torch.testing.assert_close(anchors.side_logits.sigmoid(), torch.full((6, 2), 0.3))


def test_random_boxes_depend_on_step_and_picture_in_training_and_on_nothing_in_scoring():
    """A picture has the same boxes in other company, others in another step; scores do not depend on chance."""
    queries = LearnedQueries(num_queries=6, reference="box", anchors="random", anchor_size=0.3)
    source = _model(queries=queries, query_position="sine_of_reference").query_sources[0]

    def boxes(batch, step):
        memory = _encoded(_model(), batch)
        return source(memory, None, batch, torch_stream(0, "loss", step)).reference

    both, second = boxes(_batch(ids=(5, 9)), 0), boxes(_batch(ids=(9,)), 0)
    assert torch.equal(both[1:], second)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(boxes(_batch(ids=(9,)), 1), second)
    scored = [source(_encoded(_model(), _batch(ids=ids)), None, None, None).reference for ids in ((1, 2), (3, 4))]
    assert torch.equal(*scored)
    assert torch.equal(scored[0][0], scored[0][1])
    assert both[..., 2:].max() <= 0.6


@pytest.mark.parametrize("content", ["box", "memory", "learned", "zeros"])
@pytest.mark.parametrize("position", ["static", "sine_of_reference"])
def test_content_of_selected_queries(content, position):
    """Boxes are the best proposals, cut; content is what the toggle says, and never sends a gradient to the encoder."""
    model = _model(
        queries=SelectedQueries(num_queries=4, content=content),
        query_position=position,
        encoder_supervision=SUPERVISED,
    )
    memory = _encoded(model, _batch())
    proposals = model.encoder_heads(memory)[-1]
    made = model.query_sources[0](memory, proposals, None, None)
    best = proposals.best(4)
    assert torch.equal(made.reference, best.boxes)
    assert not made.reference.requires_grad
    assert (made.position is None) == (position == "sine_of_reference")
    if content == "memory":
        assert torch.equal(made.content, best.features)
    if content == "learned":
        assert torch.equal(made.content[0], model.query_sources[0].learned.weight)
    assert (not made.content.any()) == (content == "zeros")
    if made.content.requires_grad:
        made.content.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())


def test_zero_content_is_the_same_for_all_queries():
    """DETR's queries start from nothing but their positions."""
    source = _model(queries=LearnedQueries(num_queries=6, content="zeros")).query_sources[0]
    made = source(_encoded(_model(), _batch()), None, None, None)
    assert not made.content.any()
    assert made.position.std() > 0.5


# Precision


@pytest.mark.parametrize("base", ["deformable_two_stage", "dino", "detr", "anchors"])
def test_references_and_losses_keep_their_precision_under_autocast(base):
    """In bf16 the features are halved in precision; boxes, references, positions and losses are not."""
    config = BASES[base]
    detector = build_detector(config, num_classes=3, seed=0)
    looked_at = []
    for layer in detector.model.decoder.layers:
        layer.register_forward_pre_hook(lambda _module, inputs: looked_at.append(inputs[2]))
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector.model(_batch(), torch_stream(0, "loss", 0))
        terms = detector.loss(_batch(), torch_stream(0, "loss", 0))
    assert {prediction.boxes.dtype for prediction in predictions} == {torch.float32}
    assert {reference.dtype for reference in looked_at if reference is not None} <= {torch.float32}
    assert {prediction.logits.dtype for prediction in predictions} == {torch.bfloat16}
    assert {term.value.dtype for term in terms} == {torch.float32}
    exact = detector.loss(_batch(), torch_stream(0, "loss", 0))
    totals = [sum(float(term.weight * term.value.detach()) for term in found) for found in (terms, exact)]
    assert totals[0] == pytest.approx(totals[1], rel=0.03)


def test_dilation_doubles_the_resolution_of_the_last_level():
    """DC5: four times the tokens on the last level, nothing else changes its shape."""
    plain = BASES["detr"]
    dilated = put(plain, (("model", "backbone", "dilation"), True))
    shapes = []
    for config in (plain, dilated):
        model = build_detector(config, num_classes=3, seed=0).model
        shapes.append(_encoded(model, _batch()).spatial_shapes)
    assert shapes == [((2, 2),), ((4, 4),)]
