"""Every shipped study is valid and can be planned at every scale, and the page about them is true."""

import re
from pathlib import Path

import pytest

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
