"""What the README says is true: its study, commands, table of profiles, links, and the links of the pages in docs/."""

import re
import shlex
from pathlib import Path

import pytest

from core.metrics import COCO_NAMES
from core.parts import flatten, scientific
from workbench.cli import build_parser
from workbench.plan import make_plan
from workbench.study_file import load_study, profile_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "studies" / "README.md"]


@pytest.fixture
def path(tmp_path):
    """The README's study as a file."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    file = tmp_path / "auxiliary_losses.yaml"
    file.write_text(text, "utf-8")
    return file


def test_variants_differ_as_the_comments_say(path):
    """The baseline changes nothing, and the other variant differs from it in one key."""
    study = load_study(path)
    baseline, other = study.variants
    assert (study.profile, study.baseline) == ("laptop", "every_layer")
    assert (baseline.name, baseline.overrides) == ("every_layer", {})
    with_all, without = (flatten(scientific(variant.config)) for variant in (baseline, other))
    assert {key for key in with_all if with_all[key] != without[key]} == {"loss.auxiliary"}
    assert other.overrides == {"loss.auxiliary": False}


def test_claim_is_what_the_comments_say(path):
    """The claim compares COCO's AP as a fraction, with a margin of two points, and stops at five seeds first."""
    study = load_study(path)
    (claim,) = study.claims
    assert [(term.variant, term.metric, term.weight) for term in claim.terms] == [
        ("every_layer", "ap", 1.0),
        ("last_layer", "ap", -1.0),
    ]
    assert len(COCO_NAMES) == 12
    assert (claim.kind, claim.margin, study.looks[0].seeds) == ("superiority", 0.02, 5)
    assert claim.missing == ()


def test_first_look_trains_both_variants_with_five_seeds(path):
    """`run` stops after ten trials, those of a pair next to each other."""
    plan = make_plan(load_study(path))
    trials = plan.at_look(plan.study.looks[0])
    assert [(trial.variant, trial.seed) for trial in trials] == [
        (variant, seed) for seed in range(5) for variant in ("every_layer", "last_layer")
    ]


@pytest.mark.parametrize("line", re.findall(r"^    python -m workbench (.*)$", README, re.MULTILINE))
def test_command_can_be_typed(line):
    """Every command of the README is one that the command line takes."""
    assert build_parser().parse_args(shlex.split(line, comments=True)).command


def test_profiles_of_the_table_are_those_that_exist(path):
    """The README's table names every profile that a study can use, and no other."""
    assert sorted(re.findall(r"^\| `(\w+)`", README, re.MULTILINE)) == profile_names(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Every link to a file of the repository leads to one."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
