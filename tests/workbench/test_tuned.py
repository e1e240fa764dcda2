"""Settings that a search chose, taken over by a study: laid over each variant, on record, and refused where unfair."""

import io
import json

import pytest
from rated import SEARCH, SETS, RatedTrainer

from workbench import cli, report
from workbench.errors import StudyFileError, WorkbenchError
from workbench.options import Options
from workbench.plan import make_plan, plan_from_json, plan_to_json
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study

STUDY = """\
version: 1
study: compare
question: Is sharp better, each with settings that suit it?
tuned: tuned/rates.yaml
baseline: plain
variants:
  plain: {}
  sharp: {set: {loss.weight_giou: 4.0}}
claims:
  - {id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}
scope: seeds
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Return the results of a complete search."""
    folder = tmp_path_factory.mktemp("searched")
    path = folder / "rates.yaml"
    path.write_text(SEARCH.format(method="random", scheduler="fifo", configurations=6))
    plan, store = make_plan(load_study(path, Selection(profile="smoke", sets=SETS))), Store(folder / "runs")
    options = Options(executor="inline", trainer=RatedTrainer(), tracking_uri="http://127.0.0.1:9")
    assert run_study(plan, store, options, out=io.StringIO(), err=io.StringIO()) == 0
    return store.results_for(plan)


@pytest.fixture
def write(searched, tmp_path):
    """Return a writer of the study beside the search's file, either with some text replaced."""

    def write(study=("", ""), tuned=("", "")):
        path = tmp_path / "compare.yaml"
        path.write_text(STUDY.replace(*study))
        text = report.render(searched, format="tuned", out=tmp_path / "tuned" / "rates.yaml")
        assert tuned[0] in text
        (tmp_path / "tuned" / "rates.yaml").write_text(text.replace(*tuned, 1))
        return path

    return write


def load(path, **selection):
    """Load at smoke scale."""
    return load_study(path, Selection(**{"profile": "smoke", "sets": SETS, **selection}))


def refusal(path, **selection):
    """Return the error."""
    with pytest.raises(StudyFileError) as caught:
        load(path, **selection)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_tuned_settings_are_laid_over_each_variant(write, searched):
    """Each variant has its own best value and keeps what it differs in; seeds and split are the comparison's."""
    study = load(write())
    best = json.loads((searched.runs / "studies/rates/smoke" / searched.plan.plan_hash / "search.json").read_text())
    for variant in study.variants:
        assert variant.config.training.lr == best["best"][variant.name]["values"]["training.lr"]
        assert variant.config.data.split == "val"
    assert [variant.config.loss.weight_giou for variant in study.variants] == [2.0, 4.0]
    assert set(study.seeds).isdisjoint({10_000})
    assert len({variant.config.training.lr for variant in study.variants}) == 2


def test_provenance_is_in_the_plan(write, searched):
    """plan.json names the search, its plan and the hash of the file; claims are ordinary."""
    plan = make_plan(load(write()))
    tuned = plan_from_json(json.loads(json.dumps(plan_to_json(plan)))).study.tuned
    assert tuned == plan.study.tuned
    assert (tuned.study, tuned.plan_hash, tuned.configurations) == ("rates", searched.plan.plan_hash, 6)
    assert len(tuned.sha256) == 64
    assert [claim.id for claim in plan.study.claims] == ["sharp_better"]
    changed = make_plan(load(write(tuned=("set: {", "set: {  "))))  # another file, the same settings
    assert changed.study.tuned.sha256 != tuned.sha256
    assert changed.plan_hash == plan.plan_hash


def test_explain_names_the_layer(write, tmp_path, capsys):
    """`plan --explain` says that the value is tuned, and where it stands."""
    path = write()
    options = [part for text in SETS for part in ("--set", text)]
    assert (
        cli.main(["plan", str(path), "--profile", "smoke", *options, "--runs", str(tmp_path / "r"), "--explain"]) == 0
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("training.lr ")]
    assert len(lines) == 2
    assert all("tuned (" in line and "rates.yaml:" in line for line in lines)


def test_another_scale_and_split_are_warned_of(write):
    """Settings tuned elsewhere, or on the pictures that are scored, may be taken, and the plan says so."""
    assert not any("tuned/rates.yaml" in line for line in make_plan(load(write())).warnings)
    warnings = make_plan(load(write(), profile="laptop", sets=("data.split=tune",))).warnings
    assert any("chosen at profile smoke, not laptop" in line for line in warnings)
    assert any("leave data.split at val" in line for line in warnings)


REFUSED = [
    (
        ("tuned/rates", "tuned/other"),
        ("", ""),
        "compare.yaml:4:8: tuned: tuned/other.yaml: cannot be read (No such file",
    ),
    (("tuned/rates.yaml", "tuned"), ("", ""), "compare.yaml:4:8: tuned: tuned: cannot be read (it is no file)"),
    (("tuned/rates.yaml", "3"), ("", ""), "compare.yaml:4:8: tuned: found 3; allowed: text"),
    (("sharp: {", "keen: {"), ("", ""), "compare.yaml:4:8: tuned: tuned/rates.yaml has no settings for variant keen"),
    (
        ("4.0}", "5.0}"),
        ("", ""),
        "variants.sharp: was searched with other settings of loss.weight_giou than compare.yaml",
    ),
    (
        ("4.0}", "4.0, training.lr: 0.1}"),
        ("", ""),
        "variant sharp sets training.lr (compare.yaml:8:40), so tuned may not",
    ),
    (
        ("", ""),
        ("configurations: 6", "configurations: 5"),
        "variants: searched with different budgets (plain 5, sharp 6",
    ),
    (("", ""), ("training.lr", "training.lrr"), "training.lrr: unknown key; did you mean training.lr?"),
    (("", ""), ("format: 1", "format: 2"), "tuned/rates.yaml:4:9: format: found 2; allowed: 1"),
    (("", ""), ("plan:", "plain:"), "tuned/rates.yaml:7:1: plain: unknown key"),
]


@pytest.mark.parametrize(("study", "tuned", "expected"), REFUSED)
def test_refused_with_its_place(study, tuned, expected, write):
    """What would make the comparison unfair, or cannot be read, is told where it stands."""
    path = write(study=study, tuned=tuned)
    assert expected in refusal(path)


def test_option_may_not_undo_it(write):
    """--set of a tuned key would set both variants to one value."""
    assert "--set sets training.lr (--set training.lr=0.1), so tuned may not" in refusal(
        write(), sets=(*SETS, "training.lr=0.1")
    )


def test_profile_of_the_study_may_not_undo_it(write):
    """Nor may a scale of the study's own; the shipped profiles, which set a rate for all, give way."""
    block = "profiles: {smoke: {set: {training.lr: 0.1}}}\nscope: seeds"
    assert "profile smoke sets training.lr" in refusal(write(study=("scope: seeds", block)))


def test_only_a_complete_search_is_written(searched, tmp_path):
    """A file of tuned settings is given by a search, once every configuration is over."""
    untouched = Store(tmp_path / "empty").results_for(searched.plan)
    with pytest.raises(WorkbenchError, match="0 of 6 configurations of plain are over: run the search to its end"):
        report.render(untouched, format="tuned")


def test_study_without_search_has_none(write, tmp_path):
    """`--format tuned` of an ordinary study is refused."""
    results = Store(tmp_path / "empty").results_for(make_plan(load(write())))
    with pytest.raises(WorkbenchError, match="has no search"):
        report.render(results, format="tuned")
