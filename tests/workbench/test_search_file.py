"""The `search` of a study file: what it may search, and what is refused, each with its place."""

import pytest

from workbench import cli
from workbench.errors import StudyFileError
from workbench.plan import make_plan, plan_from_json, plan_to_json
from workbench.study import Dimension
from workbench.study_file import Selection, load_study

STUDY = """\
version: 1
study: rates
question: Which settings suit each variant?
baseline: plain
variants:
  plain: {}
  sharp: {set: {loss.weight_giou: 4.0}}
scope: seeds
search:
  space:
    training.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    model.queries.num_queries: {low: 8, high: 24}
    training.ema_decay: {values: [null, 0.9, 0.99]}
  configurations: 6
"""


@pytest.fixture
def write(tmp_path):
    """Return a writer of the study with some text replaced."""

    def write(*replacements, text=STUDY):
        for before, after in replacements:
            assert before in text
            text = text.replace(before, after)
        path = tmp_path / "rates.yaml"
        path.write_text(text)
        return path

    return write


def load(path, **selection):
    """Load at smoke scale."""
    return load_study(path, Selection(**{"profile": "smoke", **selection}))


def refusal(path, **selection):
    """Return the lines of the error."""
    with pytest.raises(StudyFileError) as caught:
        load(path, **selection)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_space_is_read_with_the_kind_of_each_key(write):
    """A range is of whole numbers where the key is; the rest of the section has defaults."""
    search = load(write()).search
    assert search.space == {
        "training.lr": Dimension(low=1e-4, high=1e-2, log=True),
        "model.queries.num_queries": Dimension(low=8, high=24, whole=True),
        "training.ema_decay": Dimension(values=(None, 0.9, 0.99)),
    }
    assert (search.method, search.scheduler, search.metric, search.mode) == ("optuna", "fifo", "ap", "max")


def test_search_is_apart_from_the_comparison(write):
    """Every variant is scored on tune, with the seed 10,000, which no comparison has, and gives no verdict."""
    plan = make_plan(load(write()))
    assert {variant.config.data.split for variant in plan.study.variants} == {"tune"}
    assert [trial.seed for trial in plan.trials] == [10_000, 10_000]
    assert (plan.study.gives_verdicts, plan.study.claims) == (False, ())
    assert any("claims nothing" in warning for warning in plan.warnings)


def test_plan_with_a_search_survives_json(write):
    """plan.json brings the search back, and another space is another plan."""
    plan = make_plan(load(write()))
    assert plan_from_json(plan_to_json(plan)).study.search == plan.study.search
    assert make_plan(load(write(("high: 24", "high: 20")))).plan_hash != plan.plan_hash


RATE = "training.lr: {low: 1.0e-4, high: 1.0e-2, log: true}"
COUNT = "configurations: 6"
CLAIM = "{id: a, text: A., plus: sharp, minus: plain, metric: ap, kind: superiority}"
REFUSED = [
    ("scope: seeds", f"claims: [{CLAIM}]\nscope: seeds", "rates.yaml:8:1: claims: a search makes no claims"),
    ("scope: seeds", "tuned: nothing.yaml\nscope: seeds", "rates.yaml:8:1: tuned: has no place beside search"),
    ("scope: seeds", "set: {data.split: val}\nscope: seeds", "rates.yaml:8:7: data.split: a search scores on tune"),
    (
        "scope: seeds",
        f"profiles: {{smoke: {{set: {{{RATE[:11]}: 0.1}}}}}}\nscope: seeds",
        "profile smoke sets training.lr",
    ),
    ("training.lr:", "training.lrr:", "rates.yaml:11:5: training.lrr: unknown key; did you mean training.lr?"),
    ("training.lr:", "training:", "rates.yaml:11:16: training.low: unknown key"),
    ("low: 8", "low: 0", "rates.yaml:12:38: model.queries.num_queries: found 0; allowed: at least 1"),
    ("high: 24", "high: 24.5", "rates.yaml:12:47: model.queries.num_queries: found 24.5; allowed: a whole number"),
    ("0.99]", "1.5]", "rates.yaml:13:46: training.ema_decay: found 1.5; allowed: below 1"),
    ("low: 8", "low: 80", "rates.yaml:12:32: search.space.model.queries.num_queries: low 80 must be below high 24"),
    ("low: 8, ", "", "needs low and high, or values instead of them"),
    ("low: 1.0e-4", "low: 0", "log needs a range above 0"),
    ("0.9, 0.99]", "0.9, 0.9]", "names a value twice"),
    (RATE, "loss.auxiliary: {low: 0, high: 1}", "loss.auxiliary: found 0; allowed: true or false"),
    (RATE, "model.heads: {low: 0, high: 1}", "model.heads: found 0; allowed: "),
    (RATE, "loss.weight_giou: {low: 1, high: 8}", "rates.yaml:11:5: loss.weight_giou: variant sharp sets loss.weight"),
    (RATE, "training.schedule.kind: {values: [linear, step]}", "rates.yaml:11:5: training.schedule.kind: chooses a"),
    (RATE, "training.epochs: {low: 2, high: 8}", "rates.yaml:11:5: training.epochs: every configuration has the same"),
    (RATE, "data.side: {values: [32, 64]}", "data.side: every configuration has the same pictures"),
    (RATE, "training.threads: {values: [1, 2]}", "training.threads: changes no score"),
    (RATE, "model.denoising.label_noise: {low: 0.1, high: 0.3}", "label_noise: is no plain value in variant plain"),
    (COUNT, f"{COUNT}\n  metric: app", "rates.yaml:15:11: search.metric: no such metric: 'app'; did you mean ap?"),
    (COUNT, f"{COUNT}\n  method: tpe", "rates.yaml:15:11: search.method: found the text 'tpe'; allowed: random or"),
    (COUNT, f"{COUNT}\n  budget: 3", "rates.yaml:15:3: search.budget: unknown key"),
    (COUNT, "configurations: 1", "rates.yaml:14:19: search.configurations: found 1; allowed: at least 2"),
    (COUNT, "configurations: many", "rates.yaml:14:19: search.configurations: found the text 'many'; allowed: a whole"),
]


@pytest.mark.parametrize(("before", "after", "expected"), REFUSED)
def test_refused_with_its_place(before, after, expected, write):
    """What a search cannot be is told where it stands."""
    lines = refusal(write((before, after)))
    assert any(expected in line for line in lines), lines


def test_budget_must_fit_the_space(write):
    """More configurations than a finite space has are refused before any is tried."""
    text = STUDY[: STUDY.index("    training.lr")] + "    training.batch_size: {values: [2, 4]}\n  configurations: 3\n"
    assert "the space has 2 configurations" in refusal(write(text=text))[0]


def test_asha_needs_epochs_to_compare(write):
    """With one epoch there is nothing to stop early."""
    path = write(("configurations: 6", "configurations: 6\n  scheduler: asha"))
    assert "trains for one" in refusal(path, sets=("training.epochs=1",))[0]
    assert load(path).search.scheduler == "asha"


def test_options_that_contradict_the_search_are_refused(write):
    """Neither --seeds nor --set of a searched key or of another split is silently ignored."""
    path = write()
    assert "has one seed of its own" in refusal(path, seeds=5)[0]
    assert "--set sets training.lr" in refusal(path, sets=("training.lr=0.1",))[0]
    assert "a search scores on tune" in refusal(path, sets=("data.split=val",))[0]


def test_check_accepts_it_at_every_profile(write, capsys):
    """`check` validates a search as any other study."""
    assert cli.main(["check", str(write())]) == 0
    assert "valid" in capsys.readouterr().out
