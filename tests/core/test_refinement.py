"""Iterative refinement: the values of every mode, and which box heads a layer's loss trains, by which path.

The table is the one in `core/model/refinement.py`. "Chain" is the path through the boxes that later boxes start from;
"sampling" is the path through where later layers look.
"""

import pytest
import torch

from core.config import (
    Decoder,
    Deformable,
    DeformableSelf,
    Encoder,
    LearnedQueries,
    ModelConfig,
    Refinement,
    SmallResNet,
)
from core.model.build import build_model
from core.model.refinement import BoxHead, RefinementStep
from core.types import Batch

MODES = {
    "off": Refinement(),
    "detached": Refinement(residual_base="detached", sampling_reference="detached"),
    "look_forward_twice": Refinement(residual_base="look_forward_twice", sampling_reference="detached"),
    "chain_only": Refinement(residual_base="kept", sampling_reference="detached"),
    "kept": Refinement(residual_base="kept", sampling_reference="kept"),
}
LAYERS = 4
# Which heads the loss on the boxes of the last layer trains, and whether the queries' first reference is trained by it.
HEADS = {"off": [3], "detached": [3], "look_forward_twice": [2, 3], "chain_only": [0, 1, 2, 3], "kept": [0, 1, 2, 3]}


def _model(refinement, *, reference="box", query_position="sine_of_reference", heads="separate", layers=LAYERS):
    config = ModelConfig(
        hidden_dim=16,
        num_heads=2,
        ffn_dim=32,
        dropout=0.0,
        backbone=SmallResNet(width=4),
        extra_levels=0,
        encoder=Encoder(num_layers=1, attention=DeformableSelf(num_points=2)),
        decoder=Decoder(num_layers=layers, attention=Deformable(num_points=2)),
        queries=LearnedQueries(num_queries=5, reference=reference),
        query_position=query_position,
        refinement=refinement,
        heads=heads,
    )
    model = build_model(config, num_classes=3, seed=0)
    for mlp in model.decoder.box_head.mlps:  # the heads start at zero, where no gradient passes to their hidden layers
        torch.nn.init.normal_(mlp.last.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


def _batch():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Batch(images=images, padding_mask=torch.zeros(2, 64, 64, dtype=torch.bool), targets=())


def _trained_heads(model, layer):
    """Return the heads, and whether the anchors, that the boxes of `layer` send a gradient to."""
    model.zero_grad()
    model(_batch())[layer].boxes.square().sum().backward()
    mlps = model.decoder.box_head.mlps
    heads = [index for index, mlp in enumerate(mlps) if mlp.last.weight.grad is not None and mlp.last.weight.grad.any()]
    anchors = model.query_sources[0].anchors.logits.grad
    return heads, anchors is not None and bool(anchors.any())


def _fix_hidden(model):
    """Cut all that flows through the layers, so that only the chain of boxes is left."""
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: output.detach())


@pytest.mark.parametrize("reference", ["box", "point"])
def test_refining_modes_give_identical_boxes(reference):
    """With the same weights, detached, look-forward-twice, chain-only and kept differ in gradients alone."""
    position = "sine_of_reference" if reference == "box" else "static"
    outputs = {
        mode: _model(refinement, reference=reference, query_position=position)(_batch())
        for mode, refinement in MODES.items()
        if mode != "off"
    }
    for mode, predictions in outputs.items():
        for ours, base in zip(predictions, outputs["detached"], strict=True):
            assert torch.equal(ours.boxes, base.boxes), mode
            assert torch.equal(ours.logits, base.logits), mode


@pytest.mark.parametrize("mode", MODES)
def test_last_loss_trains_the_heads_of_the_table(mode):
    """The loss of the last layer reaches exactly the heads that the table names."""
    assert _trained_heads(_model(MODES[mode]), LAYERS - 1)[0] == HEADS[mode]


@pytest.mark.parametrize("mode", ["detached", "look_forward_twice", "chain_only", "kept"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_every_loss_trains_the_heads_of_the_table(mode, layer):
    """The loss of layer k reaches head k; one more under look-forward-twice; all before it where the chain is kept."""
    first = {"detached": layer, "look_forward_twice": max(0, layer - 1)}.get(mode, 0)
    assert _trained_heads(_model(MODES[mode]), layer)[0] == list(range(first, layer + 1))


@pytest.mark.parametrize(
    ("mode", "by_chain"), [("detached", [3]), ("look_forward_twice", [2, 3]), ("chain_only", [0, 1, 2, 3])]
)
def test_chain_alone(mode, by_chain):
    """With everything through the layers cut, the chain of boxes still reaches the heads that the mode says."""
    model = _model(MODES[mode])
    _fix_hidden(model)
    assert _trained_heads(model, LAYERS - 1)[0] == by_chain


def test_sampling_path_alone_reaches_every_head():
    """With the chain cut and the sampling positions kept, earlier heads are reached through where later layers look."""
    sampling_only = Refinement(residual_base="detached", sampling_reference="kept")
    model = _model(sampling_only)
    assert _trained_heads(model, LAYERS - 1)[0] == [0, 1, 2, 3]
    _fix_hidden(model)
    assert _trained_heads(model, LAYERS - 1)[0] == [3]


def test_kept_adds_the_sampling_path_to_the_chain():
    """Kept and chain-only give equal boxes but other gradients on the earlier heads, and the same on the last."""
    gradients = {}
    for mode in ("kept", "chain_only"):
        model = _model(MODES[mode])
        _trained_heads(model, LAYERS - 1)
        gradients[mode] = [mlp.last.weight.grad.clone() for mlp in model.decoder.box_head.mlps]
    assert torch.equal(gradients["kept"][3], gradients["chain_only"][3])
    assert not torch.allclose(gradients["kept"][0], gradients["chain_only"][0], rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_first_reference_is_never_cut(mode):
    """The anchors learn from the first layer's boxes in every mode, as in the official code."""
    assert _trained_heads(_model(MODES[mode]), 0)[1]


def test_only_a_kept_chain_trains_the_anchors_from_the_last_layer_by_boxes():
    """With the layers cut, the last loss reaches the anchors where the chain is whole or starts anew at them."""
    reached = {}
    for mode, refinement in MODES.items():
        model = _model(refinement)
        _fix_hidden(model)
        reached[mode] = _trained_heads(model, LAYERS - 1)[1]
    assert reached == {
        "off": True,
        "detached": False,
        "look_forward_twice": False,
        "chain_only": True,
        "kept": True,
    }


def test_look_forward_twice_reaches_the_anchors_from_the_second_layer():
    """One step back from the second layer is the first reference itself."""
    model = _model(MODES["look_forward_twice"])
    _fix_hidden(model)
    assert _trained_heads(model, 1)[1]
    assert not _trained_heads(model, 2)[1]


class _CutTooEarly(BoxHead):
    """A decoder whose detach was moved: the boxes themselves are cut before they are carried on."""

    def forward(self, layer, hidden, output, step, initial):
        """Cut what `kept` keeps, and keep what `detached` cuts."""
        result = super().forward(layer, hidden, output, step, initial)
        moved = result.boxes if self.residual_base == "detached" else result.boxes.detach()
        return RefinementStep(result.boxes, moved, moved)


@pytest.mark.parametrize("mode", ["detached", "look_forward_twice", "chain_only", "kept"])
def test_a_moved_detach_is_noticed(mode):
    """The table's test tells a box head with its detach in another place from the right one."""
    model = _model(MODES[mode])
    model.decoder.box_head.__class__ = _CutTooEarly
    assert _trained_heads(model, LAYERS - 1)[0] != HEADS[mode]


def test_off_equals_the_reference_without_refinement():
    """Without refinement each box is sigmoid(head + logit of the first reference), and attention stays there."""
    model = _model(MODES["off"])
    hidden = []
    looked_at = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
        layer.register_forward_pre_hook(lambda _module, inputs: looked_at.append(inputs[2]))
    predictions = model(_batch())
    anchors = model.query_sources[0].anchors.logits
    for layer, prediction in enumerate(predictions):
        delta = model.decoder.box_head.mlps[layer](hidden[layer])
        torch.testing.assert_close(prediction.boxes, (delta + anchors).sigmoid())
        assert torch.equal(looked_at[layer], looked_at[0])


@pytest.mark.parametrize(
    ("refinement", "heads", "sized"),
    [
        (Refinement(), "shared", [True]),
        (Refinement(), "separate", [True] * LAYERS),
        (MODES["detached"], "separate", [True, False, False, False]),
    ],
)
def test_point_references_start_with_small_boxes(refinement, heads, sized):
    """Heads that give the size from nothing start at sigmoid(-2) = 0.12 of the picture, the others at the reference."""
    model = build_model(
        ModelConfig(
            hidden_dim=16,
            num_heads=2,
            backbone=SmallResNet(width=4),
            decoder=Decoder(num_layers=LAYERS),
            refinement=refinement,
            heads=heads,
        ),
        num_classes=3,
        seed=0,
    )
    biases = [mlp.last.bias.tolist() for mlp in model.decoder.box_head.mlps]
    assert biases == [[0, 0, -2, -2] if with_size else [0, 0, 0, 0] for with_size in sized]
