"""Recipes as the lowest layer of a study, and profiles that scale whatever kinds they meet."""

import pytest

from core.config import DN, SwinV2
from core.recipes import RECIPES
from workbench.errors import StudyFileError
from workbench.overrides import resolve
from workbench.plan import make_plan
from workbench.problems import DEFAULT, Problems
from workbench.recipes import recipe_layer
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.trial import execute

TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")
STUDY = """\
version: 1
study: trying
question: Does it help?
recipe: {recipe}
set: {{{base}}}
baseline: base
variants:
  base: {{}}
  other: {{set: {{{other}}}}}
scope: seeds
"""
SCALE = """\
looks: {seeds: [5], alpha: [0.05]}
set:
  data: {kind: shapes, side: 64, num_train: 16, num_val: 8}
  model.backbone.kind: small_resnet
  model.backbone.width: 8
  model.ffn_dim: 96
  model.decoder: {num_layers: 2, attention: {num_points: 2}}
  model.queries.num_queries: 7
  model.denoising.groups: 3
  model.encoder_supervision.anchor_scale: 0.1
  model.fpn_dim: 32
"""


@pytest.fixture
def read(tmp_path):
    """Return a reader of a study with a profile `laptop`: gives the configurations of base and other, and the study."""

    def read(recipe="deformable", base="", other="loss.auxiliary: false", profile=SCALE, sets=()):
        (tmp_path / "profiles").mkdir(exist_ok=True)
        (tmp_path / "profiles" / "laptop.yaml").write_text(profile)
        path = tmp_path / "trying.yaml"
        path.write_text(STUDY.format(recipe=recipe, base=base, other=other))
        study = load_study(path, Selection(sets=sets))
        return study.variants[0].config, study.variants[1].config, study

    return read


def refused(read, **change):
    """Return the one problem of a study, without its folder."""
    with pytest.raises(StudyFileError) as error:
        read(**change)
    (line,) = str(error.value).splitlines()
    return line.rpartition("/")[2]


@pytest.mark.parametrize("name", RECIPES)
def test_layer_of_a_recipe_leads_to_the_recipe(name):
    """What the layer sets over the defaults is the published configuration, whole."""
    problems = Problems()
    config, _ = resolve([recipe_layer(name, DEFAULT)], problems)
    assert (config, problems.lines()) == (RECIPES[name], [])


def test_recipe_is_the_lowest_layer(read):
    """Study, profile and variant win over the recipe, and each key says who set it; the default recipe sets nothing."""
    base, other, study = read(
        recipe="detr", base="loss.weight_l1: 1", other="model.query_position: static, training.lr: 1"
    )
    assert base.training.epochs == RECIPES["detr"].training.epochs == 500
    assert (base.loss.weight_l1, base.model.ffn_dim, other.training.lr) == (1.0, 96, 1.0)
    where = {key: place for key, (_, place) in study.layers["base"].items()}
    assert where["training.epochs"] == f"recipe detr ({study.path}:4:9)"
    assert where["model.decoder.attention.kind"] == f"recipe detr ({study.path}:4:9)"
    assert where["loss.weight_l1"].startswith("study (")
    assert where["model.ffn_dim"].startswith("profile laptop (")
    assert where["loss.weight_giou"] == "default"
    assert not recipe_layer("deformable", DEFAULT).assignments


def test_unknown_recipe_is_one_problem(read):
    """A misspelt recipe is told with a near spelling and all names, and nothing that follows from it is."""
    line = refused(read, recipe="dter", other="model.proposals: 5")
    start = "trying.yaml:4:9: recipe: no such recipe: 'dter'; did you mean detr? allowed: deformable, "
    assert line.startswith(start)
    assert line.endswith(", ".join(RECIPES)[-20:])


def test_switch_keeps_what_the_recipe_sets(read):
    """A dotted kind keeps the recipe's values of the keys that both kinds have, as those of any layer."""
    profile = SCALE.replace("  model.queries.num_queries: 7\n", "")
    selected = "model.queries.kind: selected, model.encoder_supervision.labels: binary"
    _, other, _ = read("detr", other=f"{selected}, model.query_position: sine_of_reference", profile=profile)
    assert (other.model.queries.kind, other.model.queries.num_queries) == ("selected", 100)


def test_key_of_a_part_that_only_the_recipe_has(read):
    """A variant may set one key of a part whose kind the recipe chooses."""
    _, other, _ = read("dino", other="model.denoising.num_queries: 50")
    assert (other.model.denoising.kind, other.model.denoising.num_queries) == ("cdn", 50)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "detr"},
        {"base": "model.encoder: {num_layers: 0}, model.decoder.attention.kind: dense"},
        {"base": "model.decoder: {attention: {kind: dense}}"},
    ],
)
def test_profile_skips_what_a_kind_does_not_have(read, change):
    """Where recipe or study choose dense attention, the number of points is skipped and all else is scaled."""
    base, other, _ = read(**change)
    for config in (base, other):
        assert config.model.decoder.attention.model_dump() == {"kind": "dense"}
        assert (config.model.decoder.num_layers, config.model.queries.num_queries) == (2, 7)
        assert (config.model.denoising, config.model.encoder_supervision) == (None, None)


def test_profile_scales_the_kind_that_a_variant_chooses(read):
    """A variant that switches to a kind finds the profile's values for it, and loses those of the other kind."""
    _, dense, _ = read(other="model.decoder.attention.kind: dense")
    assert dense.model.decoder.attention.kind == "dense"
    _, deformable, study = read(
        "detr", other="model.decoder.attention.kind: deformable, model.queries.reference: point"
    )
    assert deformable.model.decoder.attention.num_points == 2
    assert study.layers["other"]["model.decoder.attention.num_points"][1].startswith("profile laptop (")
    _, denoised, _ = read(
        base="model.queries: {kind: learned, reference: box}, model.query_position: sine_of_reference",
        other="model.denoising.kind: dn",
    )
    assert denoised.model.denoising.groups == 3
    _, supervised, _ = read(other="model.encoder_supervision.labels: binary")
    assert supervised.model.encoder_supervision.anchor_scale == 0.1


def test_profile_does_not_switch_a_kind_that_recipe_or_study_names(read):
    """Plain DETR keeps its cross-entropy, a study its backbone; where nobody named a kind, the profile's holds."""
    profile = SCALE + "  loss.classification.kind: iou_aware\n"
    plain, _, _ = read("detr", profile=profile)
    assert (plain.loss.classification.kind, plain.model.backbone.kind) == ("cross_entropy", "small_resnet")
    swin, _, _ = read(base="model.backbone: {kind: swin_v2}", profile=profile)
    assert (swin.loss.classification.kind, swin.model.backbone.kind) == ("iou_aware", "swin_v2")


@pytest.mark.parametrize(
    "change", [{"recipe": "faster_rcnn", "other": "model.anchor_scale: 0.1"}, {"base": "model.kind: faster_rcnn"}]
)
def test_profile_scales_another_detector(read, change):
    """Where recipe or study choose Faster R-CNN, the profile sets the keys that it has."""
    base, _, _ = read(**change)
    assert (base.model.kind, base.model.fpn_dim, base.model.backbone.width) == ("faster_rcnn", 32, 8)


def test_profile_scales_another_detector_of_a_variant(read):
    """A variant may be another detector: what the profile sets for both kinds stays, and what waited for it is set."""
    base, other, _ = read(other="model.kind: faster_rcnn, model.strides: [4, 8, 16, 32], evaluation.nms_iou: 0.5")
    assert (base.model.kind, base.model.decoder.num_layers) == ("detr", 2)
    assert (other.model.kind, other.model.fpn_dim, other.model.backbone.width) == ("faster_rcnn", 32, 8)


def test_whole_part_starts_anew(read):
    """A mapping with a kind takes the kind's defaults: nothing that the profile set for that part is left."""
    profile = "looks: {seeds: [5], alpha: [0.05]}\nset: {data: {kind: shapes}, model.denoising.groups: 3}\n"
    base = "model.queries: {kind: learned, reference: box}, model.query_position: sine_of_reference"
    whole, _, _ = read(base=base, profile=profile, sets=("model.denoising={kind: dn}",))
    assert whole.model.denoising == DN(groups=5)
    key, _, _ = read(base=base, profile=profile, sets=("model.denoising.kind=dn",))
    assert key.model.denoising == DN(groups=3)
    with pytest.raises(
        StudyFileError, match=r"variant other sets model\.denoising .*, or set model\.denoising\.kind alone"
    ):
        read(base=base, profile=profile, other="model.denoising: {kind: dn}")


def test_option_goes_before_what_waited_for_it(read):
    """What a later layer sets itself is not replaced by the profile's value for the kind that it chooses."""
    config, _, _ = read(
        base="model.queries: {kind: learned, reference: box}, model.query_position: sine_of_reference",
        sets=("model.denoising.groups=9", "model.denoising.kind=dn"),
    )
    assert config.model.denoising == DN(groups=9)


def test_inner_part_keeps_its_kind_when_the_outer_one_is_switched(read):
    """The keys of an inner part belong to the kind that a layer chose for it, whatever part it is moved into."""
    _, other, study = read(
        base="model.backbone: {kind: swin_v2, size: small}",
        other="model.kind: faster_rcnn, model.strides: [4, 8, 16, 32]",
        profile="looks: {seeds: [5], alpha: [0.05]}\nset: {data: {kind: shapes}}\n",
    )
    assert other.model.backbone == SwinV2(size="small")
    assert study.layers["other"]["model.backbone.frozen_stages"] == (0, "default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base": "model.decoder.attention.num_points: 3"},
            "trying.yaml:5:7: model.decoder.attention.num_points: unknown",
        ),
        (
            {"other": "model.encoder.attention.num_points: 3"},
            "trying.yaml:9:17: model.encoder.attention.num_points: unknown key",
        ),
        (
            {"sets": ("model.encoder.attention.num_points=3",)},
            "--set model.encoder.attention.num_points=3: model.encoder.attention.num_points: unknown key",
        ),
        (
            {"profile": SCALE + "  model.numpoints: 2\n"},
            "laptop.yaml:12:3: model.numpoints: unknown key; did you mean",
        ),
        (
            {"profile": SCALE.replace("side: 64", "size: 64")},
            "laptop.yaml:3:24: data.size: unknown key; did you mean",
        ),
        (
            {"profile": SCALE.replace("side: 64", "side: 64, resize: {kind: fixed}")},
            "data.resize: unknown key",
        ),
    ],
)
def test_all_else_stays_strict(read, change, message):
    """A study, a variant, an option, and a profile inside a part whose kind it chooses must know the keys."""
    with pytest.raises(StudyFileError) as error:
        read("detr", **change)
    assert message in str(error.value)


def test_plain_detr_trains_at_smoke_scale(tmp_path):
    """A study of another recipe runs: both variants of DETR's auxiliary losses end with scores."""
    path = tmp_path / "trying.yaml"
    path.write_text(STUDY.format(recipe="detr", base="", other="loss.auxiliary: false"))
    plan = make_plan(load_study(path, Selection(profile="smoke", seeds=1, sets=TINY)))
    store = Store(tmp_path / "runs")
    for spec in plan.specs.values():
        outcome = execute(spec, store.root, should_stop=lambda: False)
        assert outcome == "finished", store.record(spec.trial_id).error
        assert store.record(spec.trial_id).metrics
