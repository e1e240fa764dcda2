"""Official checkpoints: every published tensor finds its place, and a file that does not fit is refused by name."""

import pathlib
import re
import zlib
from functools import cache

import pytest
import torch
from official_layouts import deformable, detr, filled, quick_builds, training_file

from core import official
from core.checkpoint import CheckpointProblem
from core.model.detr import DETR
from core.official import load_official, read_official
from core.official_names import official_layout
from core.recipes import RECIPES

HERE = pathlib.Path("official.pth")

# Layout, the number of its tensors as counted in the official code, and the recipes that it fits.
FILES = [
    pytest.param(detr(), 458, ("detr", "detr_dc5"), id="detr_r50"),
    pytest.param(deformable(), 561, ("deformable",), id="base"),
    pytest.param(deformable(101), 816, ("deformable",), id="base_r101"),
    pytest.param(
        deformable(levels=1), 549, ("deformable_single_scale", "deformable_single_scale_dc5"), id="single_scale"
    ),
    pytest.param(deformable(refine=True), 597, ("deformable_refine",), id="refine"),
    pytest.param(deformable(refine=True, two_stage=True), 630, ("deformable_two_stage",), id="two_stage"),
]


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_builds():
        yield


@cache
def single():
    """Values for the single-scale file."""
    return filled(deformable(levels=1))


@cache
def base():
    """Values for the file of four scales."""
    return filled(deformable())


@cache
def two_stage():
    """Values for the two-stage file."""
    return filled(deformable(refine=True, two_stage=True))


@pytest.mark.parametrize(("shapes", "count", "recipes"), FILES)
def test_every_published_tensor_is_loaded(shapes, count, recipes):
    """Content with every published name and shape loads: each value is found in the model, and each of ours is theirs.

    Where it fits two recipes, it loads as either and is refused without a name.
    """
    assert len(shapes) == count
    state = filled(shapes)
    theirs = checksums(halved({id(tensor): tensor for tensor in state.values()}.values(), state))
    if len(recipes) > 1:
        with pytest.raises(CheckpointProblem, match=f"fits {' and '.join(recipes)}, .*--recipe"):
            load_official(training_file(state), path=HERE, recipe=None)
    for recipe in recipes:
        named = recipe if len(recipes) > 1 else None
        loaded = load_official(training_file(state), path=HERE, recipe=named)
        assert (loaded.recipe, loaded.num_classes) == (recipe, 91)
        assert getattr(loaded.config.model.backbone, "dilation", None) is recipe.endswith("dc5")
        assert not loaded.detector.training
        assert checksums(loaded.detector.model.state_dict().values()) == theirs


def test_resnet_101_has_as_many_tensors_as_published():
    """Depth is read from the names: DETR's larger file is compared with a backbone of 101 layers."""
    shapes = detr(101)
    assert len(shapes) == 713
    nothing = dict.fromkeys(shapes, torch.zeros(1))
    with pytest.raises(CheckpointProblem, match="does not fit recipe detr: ") as raised:
        load_official(nothing, path=HERE, recipe="detr")
    assert "left over" not in str(raised.value)
    assert "missing" not in str(raised.value)


def checksums(tensors):
    """Return shape and checksum of each, in order: the random values make them distinct."""
    return sorted((tuple(tensor.shape), zlib.crc32(tensor.contiguous().numpy())) for tensor in tensors)


def halved(tensors, state):
    """Cut Deformable DETR's query embedding into position and content."""
    query = state.get("query_embed.weight")
    if query is None or query.shape[1] == 256:
        return tensors
    return [tensor for tensor in tensors if tensor is not query] + [query[:, :256], query[:, 256:]]


@pytest.mark.parametrize(
    ("ours", "theirs", "part"),
    [
        ("query_sources.0.position.weight", "query_embed.weight", slice(0, 256)),
        ("query_sources.0.content.weight", "query_embed.weight", slice(256, 512)),
        ("query_sources.0.reference_points.bias", "transformer.reference_points.bias", slice(None)),
        ("encoder.layers.4.norm.weight", "transformer.encoder.layers.4.norm1.weight", slice(None)),
        ("encoder.layers.4.feed_forward.norm.weight", "transformer.encoder.layers.4.norm2.weight", slice(None)),
        ("decoder.layers.2.norm_self.weight", "transformer.decoder.layers.2.norm2.weight", slice(None)),
        ("decoder.layers.2.norm_cross.weight", "transformer.decoder.layers.2.norm1.weight", slice(None)),
        ("decoder.layers.2.feed_forward.norm.weight", "transformer.decoder.layers.2.norm3.weight", slice(None)),
        ("decoder.box_head.mlps.3.hidden.layers.1.bias", "bbox_embed.3.layers.1.bias", slice(None)),
        ("decoder.box_head.mlps.3.last.bias", "bbox_embed.3.layers.2.bias", slice(None)),
        ("class_heads.5.bias", "class_embed.5.bias", slice(None)),
        ("neck.projections.3.1.weight", "input_proj.3.1.weight", slice(None)),
    ],
)
def test_tensors_of_one_shape_are_not_exchanged(ours, theirs, part, refined):
    """Where shapes cannot tell, the right tensor is at the right place: norms, head layers, halves of the queries."""
    state, model = refined
    expected = state[theirs][:, part] if state[theirs].ndim == 2 else state[theirs]
    assert torch.equal(model.state_dict()[ours], expected)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """A file of the refined model, in the format of torch before 1.6, and the model that was read from it."""
    state = filled(deformable(refine=True))
    path = tmp_path_factory.mktemp("official") / "old.pth"
    torch.save(training_file(state), path, _use_new_zipfile_serialization=False)
    model = read_official(path).detector.model
    path.unlink()
    return state, model


def test_the_encoder_heads_are_the_seventh():
    """In two stages class_embed.6 and bbox_embed.6 judge the encoder's tokens; enc_output and pos_trans have places."""
    state = two_stage()
    model = load_official({"model": state}, path=HERE, recipe=None).detector.model
    ours = model.state_dict()
    for name, theirs in {
        "encoder_heads.heads.0.class_head.weight": "class_embed.6.weight",
        "encoder_heads.heads.0.box_mlp.hidden.layers.0.weight": "bbox_embed.6.layers.0.weight",
        "encoder_heads.heads.0.box_mlp.hidden.layers.1.weight": "bbox_embed.6.layers.1.weight",
        "encoder_heads.heads.0.box_mlp.last.bias": "bbox_embed.6.layers.2.bias",
        "encoder_heads.heads.0.norm.weight": "transformer.enc_output_norm.weight",
        "query_sources.0.norm.weight": "transformer.pos_trans_norm.weight",
        "query_sources.0.projection.weight": "transformer.pos_trans.weight",
    }.items():
        assert torch.equal(ours[name], state[theirs]), name


@pytest.fixture
def nothing_loads(monkeypatch):
    """A refused file may not touch a model."""
    monkeypatch.setattr(DETR, "load_state_dict", lambda *_: pytest.fail("a file that does not fit was loaded"))


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("state", "name"),
    [
        (base, "query_embed.weight"),
        (base, "transformer.level_embed"),
        (base, "class_embed.0.weight"),
        (base, "class_embed.4.bias"),
        (base, "backbone.0.body.layer3.5.bn2.running_var"),
        (base, "transformer.decoder.layers.5.self_attn.in_proj_bias"),
        (base, "input_proj.3.1.bias"),
        (two_stage, "transformer.pos_trans.weight"),
        (two_stage, "transformer.enc_output_norm.bias"),
        (two_stage, "transformer.decoder.bbox_embed.6.layers.1.weight"),
        (two_stage, "transformer.decoder.class_embed.0.bias"),
        (two_stage, "class_embed.6.weight"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(state, name):
    """Whichever tensor is gone or of another shape, the file is refused with its name and shapes, and only with it."""
    state = state()
    expected = tuple(state[name].shape)
    lacking = {key: value for key, value in state.items() if key != name}
    with pytest.raises(CheckpointProblem) as raised:
        load_official(lacking, path=HERE, recipe=None)
    assert f"{name} is missing, expected shape {expected}" in str(raised.value)
    assert ";" not in str(raised.value).split(", but ")[1]
    wrong = {**state, name: torch.zeros(*expected, 2)}
    with pytest.raises(CheckpointProblem) as raised:
        load_official(wrong, path=HERE, recipe=None)
    assert f"{name} has shape {(*expected, 2)}, expected {expected}" in str(raised.value)
    assert ";" not in str(raised.value).split(", but ")[1]


@pytest.mark.usefixtures("nothing_loads")
def test_each_missing_tensor_is_named_without_exception(monkeypatch):
    """Take away every tensor of the two-stage file in turn: the refusal names it, and nothing else, each time."""
    monkeypatch.setattr(official, "DEFORMABLE_RECIPES", ("deformable_two_stage",))
    config = RECIPES["deformable_two_stage"]
    layout = official_layout(official.build_detector(config, num_classes=91, seed=0).model.state_dict(), config.model)
    monkeypatch.setattr(official, "official_layout", lambda *_: layout)  # computed once
    for name in two_stage():
        lacking = {key: value for key, value in two_stage().items() if key != name}
        with pytest.raises(CheckpointProblem, match=rf"but {re.escape(name)} is missing, expected shape \([^;]+$"):
            load_official(lacking, path=HERE, recipe=None)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mask_head.lay1.weight": torch.zeros(1)}, "mask_head.lay1.weight is left over"),
        ({"class_embed.3.bias": torch.ones(91)}, "class_embed.3.bias differs from class_embed.0.bias"),
        ({"class_embed.3.bias": "text"}, "class_embed.3.bias is a str, expected shape (91,)"),
    ],
)
def test_left_over_and_unequal_tensors_are_named(change, told):
    """A tensor without a place, a copy that is none, and a value that is no tensor are refused by name."""
    with pytest.raises(CheckpointProblem) as raised:
        load_official({**base(), **change}, path=HERE, recipe=None)
    assert told in str(raised.value)
    assert "nearest is deformable, " in str(raised.value)


def test_prefixes_and_counters_are_no_obstacle():
    """`module.` before every name and the counters of batch norm and profilers change nothing."""
    state = {f"module.{name}": value for name, value in single().items()}
    state |= {f"module.{name}": torch.zeros(1) for name in ("total_ops", "backbone.0.body.bn1.num_batches_tracked")}
    loaded = load_official({"model": state}, path=HERE, recipe="deformable_single_scale")
    assert torch.equal(loaded.detector.model.get_parameter("class_heads.0.weight"), single()["class_embed.0.weight"])


def test_other_numbers_of_classes_and_queries_are_read_from_the_shapes():
    """A model of 7 classes and 50 queries loads as such."""
    shapes = {name: (7, *shape[1:]) if "class_embed" in name else shape for name, shape in deformable(levels=1).items()}
    state = filled(shapes | {"query_embed.weight": (50, 512)})
    loaded = load_official(state, path=HERE, recipe="deformable_single_scale_dc5")
    assert (loaded.num_classes, loaded.config.model.queries.num_queries) == (7, 50)
    assert loaded.detector.model.get_parameter("class_heads.0.weight").shape == (7, 256)


@pytest.mark.usefixtures("nothing_loads")
def test_a_recipe_that_cannot_fit_says_why():
    """The first problems are named and the rest counted; a recipe without official files lists those that have some."""
    with pytest.raises(CheckpointProblem, match=r"does not fit recipe deformable_two_stage: .*; and [0-9]+ more"):
        load_official(base(), path=HERE, recipe="deformable_two_stage")
    with pytest.raises(CheckpointProblem, match="no official files of recipe dino are known; choose of detr, "):
        load_official(base(), path=HERE, recipe="dino")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"a": torch.zeros(1)}}, "neither one of our checkpoints nor an official .* first keys are a"),
        ({}, "first keys are none"),
        ([1, 2], "holds a list"),
        ({"model": {}, "args": pathlib.PurePosixPath("x")}, "holds a pathlib.PurePosixPath, which reading would run"),
        (b"no torch file", "cannot be read as a torch checkpoint"),
        (b"", "cannot be read as a torch checkpoint"),
        (None, "official.pth: a checkpoint file was looked for, nothing is there"),
    ],
)
def test_files_of_other_kinds_are_refused_in_words(content, told, tmp_path):
    """Other dictionaries, objects that would run code, no torch file and no file at all."""
    path = tmp_path / "official.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointProblem, match=told):
        read_official(path)
