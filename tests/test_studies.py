"""Every shipped study is valid and can be planned at every scale, and the page about them is true."""

import json
import re
import shutil
from pathlib import Path

import pytest

from core.parts import scientific
from core.recipes import RECIPES
from workbench import cli
from workbench.plan import make_plan
from workbench.study_file import Selection, load_study, profile_names
from workbench.study_schema import schema_text

FOLDER = Path(__file__).parent.parent / "studies"
STUDIES = sorted(FOLDER.glob("*.yaml"))
PROFILES = sorted(path.stem for path in (FOLDER / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_plans_at_every_scale(path, profile, coco_folder):
    """Each study has a trial for every variant and seed of every profile, with a folder where the profile reads one."""
    drawn = profile in ("laptop", "smoke")
    selection = Selection(profile=profile, data=None if drawn else coco_folder, variants=("all",))
    if profile.startswith("coco"):  # their weights are torchvision's, which are named and not read here
        assert load_study(path, selection).variants[0].config.model.backbone.weights == "torchvision"
    plan = make_plan(load_study(path, selection))
    assert len(plan.specs) == len(plan.trials) == len(plan.study.variants) * len(plan.study.seeds)
    assert plan.study.gives_verdicts is (profile != "smoke")
    assert all(not claim.missing for claim in plan.study.claims)


GENERATED = """\
version: 1
study: generated
question: Does it help?
recipe: {recipe}
baseline: base
variants:
  base: {{}}
  other: {{set: {{{toggle}}}}}
claims:
  - {{id: better, text: Other is better., plus: other, minus: base, metric: ap, kind: superiority}}
scope: seeds
"""


@pytest.fixture
def generated(tmp_path):
    """Return a writer of a study of one recipe and one toggle that is legal for it."""

    def write(recipe):
        path = tmp_path / "generated.yaml"
        toggle = "model.anchor_scale: 0.08" if recipe == "faster_rcnn" else "loss.auxiliary: false"
        path.write_text(GENERATED.format(recipe=recipe, toggle=toggle))
        return path

    return write


@pytest.fixture
def annotations_only(coco_folder):
    """Return a folder with COCO's annotation files and no picture, nor a folder for any."""
    for split in ("train", "val"):
        shutil.rmtree(coco_folder / split)
    return coco_folder


# Epochs, batch, learning rates, the epoch after which they fall to a tenth, weight decay, largest gradient norm.
# DETR: github.com/facebookresearch/detr, README (500 epochs, batch 64) and main.py; the rates fall after 400.
# Deformable DETR: arXiv:2010.04159, A.1, and github.com/fundamentalvision/Deformable-DETR, main.py.
# DINO: github.com/IDEA-Research/DINO, config/DINO/DINO_4scale.py.
DETR_SCHEDULE = (500, 64, 1e-4, 1e-5, 400, 1e-4, 0.1)
DEFORMABLE_SCHEDULE = (50, 32, 2e-4, 2e-5, 40, 1e-4, 0.1)
PUBLISHED = {
    "detr": DETR_SCHEDULE,
    "detr_dc5": DETR_SCHEDULE,
    "deformable": DEFORMABLE_SCHEDULE,
    "deformable_single_scale": DEFORMABLE_SCHEDULE,
    "deformable_single_scale_dc5": DEFORMABLE_SCHEDULE,
    "deformable_refine": DEFORMABLE_SCHEDULE,
    "deformable_two_stage": DEFORMABLE_SCHEDULE,
    "dino": (12, 16, 1e-4, 1e-5, 11, 1e-4, 0.1),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_coco_profile_plans_every_recipe_without_pictures(recipe, generated, annotations_only, tmp_path, capsys):
    """COCO's annotations are enough to plan a recipe at full scale: two variants, five seeds, a warning a split."""
    path = generated(recipe)
    study = load_study(path, Selection(profile="coco", data=annotations_only))
    plan = make_plan(study)
    assert len(plan.specs) == len(plan.trials) == 10
    assert sum("no such folder" in warning for warning in plan.warnings) == 2
    config = study.variants[0].config
    assert config.model == _with_pretrained(RECIPES[recipe].model)
    for part in ("loss", "training", "evaluation"):
        assert scientific(config)[part] == scientific(RECIPES[recipe])[part]
    assert config.training.data_workers > 0  # a GPU would wait for its pictures
    arguments = ["plan", str(path), "--profile", "coco", "--data", str(annotations_only), "--json"]
    assert cli.main([*arguments, "--runs", str(tmp_path / "runs")]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 10


def _with_pretrained(model):
    return model.model_copy(update={"backbone": model.backbone.model_copy(update={"weights": "torchvision"})})


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_coco_profile_has_the_published_schedule(recipe, generated, annotations_only):
    """At profile `coco` each DETR trains as its authors did."""
    training = (
        load_study(generated(recipe), Selection(profile="coco", data=annotations_only)).variants[0].config.training
    )
    schedule = training.schedule
    assert (schedule.kind, schedule.factor, training.warmup_steps, training.precision) == ("step", 0.1, 0, "fp32")
    drop = schedule.at * training.epochs
    rates = (training.lr, training.lr_backbone)
    found = (training.epochs, training.batch_size, *rates, drop, training.weight_decay, training.clip_norm)
    assert found == pytest.approx(PUBLISHED[recipe], rel=1e-12)


def test_every_transformer_recipe_has_a_published_schedule():
    """A recipe without a row above is forgotten; torchvision's Faster R-CNN is trained by SGD there, and AdamW here."""
    assert RECIPES.keys() - PUBLISHED.keys() == {"faster_rcnn"}


@pytest.mark.parametrize(("profile", "epochs", "drop"), [("coco12", 12, 11), ("coco_mini", 24, 20)])
def test_shorter_coco_profiles_have_a_schedule_of_their_own(profile, epochs, drop, generated, annotations_only):
    """They set length, batch and drop for every recipe, and leave it its learning rates."""
    for recipe in RECIPES:
        training = (
            load_study(generated(recipe), Selection(profile=profile, data=annotations_only)).variants[0].config.training
        )
        assert (training.epochs, training.batch_size, training.schedule.at * epochs) == (
            epochs,
            16,
            pytest.approx(drop),
        )
        assert (training.lr, training.lr_backbone) == (
            RECIPES[recipe].training.lr,
            RECIPES[recipe].training.lr_backbone,
        )


@pytest.mark.parametrize("profile", ["smoke", "laptop", "pictures"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_small_profiles_scale_every_recipe(recipe, profile, generated):
    """Each keeps what makes the recipe (kinds, strides, dilation, refinement) and gets the profile's sizes."""
    model, published = (
        load_study(generated(recipe), Selection(profile=profile)).variants[0].config.model,
        RECIPES[recipe].model,
    )
    assert (model.kind, model.strides) == (published.kind, published.strides)
    assert model.backbone.kind == ("timm" if profile == "pictures" else "small_resnet")
    assert model.backbone.dilation == published.backbone.dilation
    if published.kind == "faster_rcnn":
        assert model.fpn_dim < published.fpn_dim
        return
    assert _kinds(model) == _kinds(published)
    assert (model.refinement, model.heads, model.denoising) == (
        published.refinement,
        published.heads,
        published.denoising,
    )
    assert (model.hidden_dim, model.queries.num_queries) < (published.hidden_dim, published.queries.num_queries)


def _kinds(model):
    return model.queries.kind, model.encoder.attention.kind, model.decoder.attention.kind


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("path", sorted(FOLDER.glob("searches/*.yaml")), ids=lambda path: path.stem)
def test_search_is_valid_at_every_scale(path, profile):
    """Each shipped search loads at every profile, scores on tune, and claims nothing."""
    study = load_study(path, Selection(profile=profile))
    assert study.search is not None
    assert {variant.config.data.split for variant in study.variants} == {"tune"}
    assert (study.claims, study.gives_verdicts) == ((), False)


def test_refinement_study_varies_the_gradient_and_nothing_else():
    """Its variants differ from the baseline in the two refinement keys only, at every scale."""
    for profile in PROFILES:
        study = load_study(FOLDER / "refinement_detach.yaml", Selection(profile=profile, variants=("all",)))
        base = study.variants[0].config
        for variant in study.variants:
            refinement = {"refinement": base.model.refinement}
            model = variant.config.model.model_copy(update=refinement)
            assert variant.config.model_copy(update={"model": model}) == base


def test_laptop_runs_three_variants_at_five_seeds_first():
    """The first look of the default profile is what `make study` runs: 15 trials."""
    plan = make_plan(load_study(FOLDER / "refinement_detach.yaml"))
    assert [variant.name for variant in plan.study.variants] == ["detached", "kept", "off"]
    assert len(plan.at_look(plan.study.looks[0])) == 15


def test_checked_in_schema_is_current():
    """Editors complete the keys that the configuration has now: write it anew with `python -m workbench schema`."""
    assert (FOLDER / "study.schema.json").read_text() == schema_text()


def test_study_on_the_page_is_valid(tmp_path):
    """The study file that studies/README.md shows loads and plans as it stands."""
    text = re.findall(r"^```yaml\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    path = tmp_path / "my_question.yaml"
    path.write_text(text)
    plan = make_plan(load_study(path))
    assert (plan.study.claims[0].margin, len(plan.trials), plan.warnings) == (0.02, 20, ())


def test_page_lists_every_study_claim_and_profile():
    """studies/README.md names each study with its claims, and each profile."""
    text = (FOLDER / "README.md").read_text()
    for path in STUDIES:
        assert f"({path.name})" in text
        for claim in load_study(path).claims:
            assert f"| {claim.text} |" in text
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(PROFILES) == set(profile_names(STUDIES[0]))
