"""A search: what it tries, that nothing is tried twice, what it finds, and how it is told."""

import io
import json
import math
from dataclasses import replace
from threading import Timer

import pytest
from rated import BEST, SEARCH, SETS, RatedTrainer
from toys import Poison, executed

from dashboard import load
from workbench import attempts, durable, forecast, report, status, suggestions
from workbench.commands import next_run
from workbench.errors import StoreError, WorkbenchError
from workbench.options import Options
from workbench.plan import make_plan
from workbench.runner import run_study
from workbench.search import at_border, outcomes
from workbench.searching import Searching
from workbench.stopping import ask
from workbench.store import Store
from workbench.study import Dimension, Search
from workbench.study_file import Selection, load_study
from workbench.trial_files import STOPPED_FILE


@pytest.fixture
def plan(tmp_path):
    """Return a maker of a plan that searches."""

    def make(*, method="random", scheduler="fifo", configurations=4, text=SEARCH):
        path = tmp_path / "rates.yaml"
        path.write_text(text.format(method=method, scheduler=scheduler, configurations=configurations))
        return make_plan(load_study(path, Selection(profile="smoke", sets=SETS)))

    return make


@pytest.fixture
def run(tmp_path):
    """Return a runner of a plan, inline, that says how it ended, what it printed and how many steps it took."""

    def run(plan, trainer=None):
        out, err = io.StringIO(), io.StringIO()
        options = Options(executor="inline", trainer=trainer or RatedTrainer(), tracking_uri="http://127.0.0.1:9")
        before = _steps(tmp_path)
        code = run_study(plan, Store(tmp_path / "runs"), options, out=out, err=err)
        return code, out.getvalue() + err.getvalue(), _steps(tmp_path) - before

    return run


def _steps(folder):
    return sum(len(executed(path)) for path in (folder / "runs" / "trials").glob("*"))


def found(tmp_path, plan):
    """Return search.json."""
    return json.loads((Store(tmp_path / "runs").study_dir(plan) / "search.json").read_text())


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_search_finds_what_suits_each_variant(method, plan, run, tmp_path):
    """Both variants get as many configurations and epochs; the best of each is nearest to its own optimum."""
    searched = plan(method=method, configurations=6)
    code, _, steps = run(searched)
    assert (code, steps) == (0, 2 * 6 * 16)
    told = found(tmp_path, searched)
    assert (told["format"], told["complete"], told["split"], told["seeds"]) == (1, True, "tune", [10_000])
    assert [spent["configurations"] for spent in told["spent"].values()] == [6, 6]
    assert [spent["epochs"] for spent in told["spent"].values()] == [24, 24]
    for name, optimum in BEST.items():
        rows = [row for row in told["configurations"] if row["variant"] == name]
        assert [row["number"] for row in rows] == list(range(6))
        nearest = min(rows, key=lambda row: abs(math.log(row["values"]["training.lr"] / optimum)))
        assert told["best"][name] == {key: nearest[key] for key in ("number", "values", "score")}
    assert told["best"]["plain"]["values"] != told["best"]["sharp"]["values"]


def test_nothing_is_computed_twice(plan, run, tmp_path):
    """The same command goes on after a failure with the same configurations; once complete it trains nothing."""
    searched = plan(method="optuna")
    marker = tmp_path / "struck"
    code, said, _ = run(searched, RatedTrainer(poisons=(Poison(kind="oom", step=6, marker=marker),)))
    assert (code, "Failed trials are tried again" in said) == (1, True)
    before = found(tmp_path, searched)
    code, _, steps = run(searched)
    assert (code, steps) == (0, 12)  # from the checkpoint of the fourth step
    after = found(tmp_path, searched)
    assert [row["values"] for row in after["configurations"]] == [row["values"] for row in before["configurations"]]
    assert run(searched)[::2] == (0, 0)
    assert found(tmp_path, searched) == after


def test_lost_search_file_costs_no_training(plan, run, tmp_path):
    """Suggestions are a function of what is known: without search.json the same ones are made, and found on record."""
    searched = plan(method="optuna")
    run(searched)
    before = found(tmp_path, searched)
    (Store(tmp_path / "runs").study_dir(searched) / "search.json").unlink()
    assert run(searched)[::2] == (0, 0)
    assert found(tmp_path, searched) == before


def test_random_search_gives_every_variant_the_same_values(plan, run, tmp_path):
    """Then no variant is luckier in what it was given."""
    searched = plan()
    run(searched)
    rates = {}
    for row in found(tmp_path, searched)["configurations"]:
        rates.setdefault(row["variant"], []).append(row["values"]["training.lr"])
    assert rates["plain"] == rates["sharp"]
    assert len(set(rates["plain"])) == 4


def test_finite_space_is_tried_without_repetition(plan, run, tmp_path):
    """As many configurations as there are values: each is tried once, whatever is suggested."""
    space = "training.batch_size: {{values: [2, 4, 8, 16]}}"
    text = SEARCH.replace("training.lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}", space)
    for method in ("random", "optuna"):
        searched = plan(method=method, text=text)
        assert run(searched)[0] == 0
        rows = found(tmp_path, searched)["configurations"]
        tried = [
            sorted(row["values"]["training.batch_size"] for row in rows if row["variant"] == name) for name in BEST
        ]
        assert tried == [[2, 4, 8, 16]] * 2


def test_illegal_combinations_are_left_out(plan, run, tmp_path):
    """What breaks a rule across keys is never tried; when nothing legal is left, the search says so."""
    space = "training.batch_size: {{values: [2, 4, 6, 8]}}\n    training.accumulate: {{values: [1, 4]}}"
    text = SEARCH.replace("training.lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}", space)
    searched = plan(text=text)
    assert run(searched)[0] == 0
    for row in found(tmp_path, searched)["configurations"]:
        assert row["values"]["training.batch_size"] % row["values"]["training.accumulate"] == 0
    with pytest.raises(WorkbenchError, match="no other one of the space is legal: lower"):
        run(plan(text=text, configurations=8))


def test_diverged_is_over_and_never_the_best(plan, run, tmp_path):
    """A loss that is not finite is an outcome of a configuration, the worst."""
    searched = plan(method="optuna", configurations=3)
    code, said, _ = run(searched, RatedTrainer(poisons=(Poison(kind="nan", step=6),)))
    assert (code, found(tmp_path, searched)["best"]) == (0, {})
    assert "6 diverged" in said
    with pytest.raises(WorkbenchError, match="no configuration of plain was scored"):
        report.render(Store(tmp_path / "runs").results_for(searched), format="tuned")


def test_asha_needs_ray(plan, run):
    """Run one after another, ASHA would have nothing to compare with; it is refused and not ignored."""
    with pytest.raises(WorkbenchError, match="asha compares trials that run side by side"):
        run(plan(scheduler="asha"))


def test_optuna_that_is_missing_is_named(plan, run, monkeypatch):
    """Without the package the error says what to do."""
    monkeypatch.setattr(suggestions, "find_spec", lambda _: None)
    with pytest.raises(WorkbenchError, match="pip install optuna, or set it to random"):
        run(plan(method="optuna"))


def test_pages_and_reports_show_a_search(plan, run, tmp_path):
    """Report, status, plan and dashboard work before, in the middle and after; each names the next step."""
    searched, store = plan(), Store(tmp_path / "runs")
    before = store.results_for(searched)
    assert "0 of plain, 0 of sharp" in forecast.as_text(forecast.describe(before))
    assert "Not complete: 0 of 4" in report.render(before, format="text")
    assert next_run(before)[0] == "The search is not complete. This line goes on:"
    code, said, _ = run(searched)
    assert code == 0
    assert "sharp 3: AP" in said
    results = Store(tmp_path / "runs").results_for(searched)
    best = outcomes(results)["sharp"].best
    text = report.render(results, format="text")
    assert f"lr {best.values['training.lr']:.4g}" in text.replace("training.", "")
    assert "is biased upward" in text
    for format_ in ("md", "html", "latex"):
        assert "Best of" in report.render(results, format=format_, out=tmp_path / f"r.{format_}")
    told = status.describe(results)
    assert [trial["variant"] for trial in told["trials"]][-1] == "sharp#3"
    assert "--format tuned" in told["next"]
    assert "the search is complete" in forecast.as_text(forecast.describe(results))
    (entry,) = load.entries(tmp_path / "runs")
    assert len(load.trials(tmp_path / "runs", entry.results)) == 8
    assert load.progress(entry.results).over == 8
    assert load.claim_cards(entry.results) == ()
    assert set(load.comparison.config_differences(entry.results)["Key"]) == {"training.lr", "loss.weight_giou"}
    bands, _ = load.comparison.curves(entry.results, metric="ap", parameters="averaged", axis="epoch")
    assert not bands.empty
    effects, dots = load.comparison.differences(entry.results, "ap", "averaged")
    assert (len(effects), len(dots)) == (7, 7)


def test_stopped_trial_is_interrupted_and_says_why(plan, run, tmp_path):
    """What the search stopped has no result, no score for any verdict, and is over for this search only."""
    searched, store = plan(), Store(tmp_path / "runs")
    trial = searched.trials[0]
    folder = store.trial_dir(trial.trial_id)
    ref = store.register(searched, source="")
    attempt = attempts.begin(folder, driver=None)
    Searching(searched, store, ref).stop(trial.trial_id, epoch=1)
    assert store.record(trial.trial_id).stopped is None  # it still runs
    attempts.end(folder, attempt, outcome="interrupted", seconds=1.0, cpu_seconds=1.0)
    record = store.record(trial.trial_id)
    assert (record.state, record.result, record.metrics) == ("interrupted", None, {})
    assert record.stopped["reason"] == "stopped by the search"
    assert "interrupted, stopped by the search" in status.as_text(status.describe(store.results_for(searched)))
    (failure,) = load.failures(tmp_path / "runs", store.results_for(searched))
    assert (failure.state, failure.message) == ("interrupted", "stopped by the search")
    assert outcomes(store.results_for(searched))["plain"].stopped == 1
    other = plan(configurations=3)  # another search, to which the decision means nothing
    assert outcomes(store.results_for(other))["plain"].stopped == 0
    assert run(other)[0] == 0
    assert store.record(trial.trial_id).state == "finished"
    assert outcomes(store.results_for(searched))["plain"].stopped == 0


def test_reason_belongs_to_one_attempt(tmp_path, plan):
    """An attempt that was cut off later is not said to be stopped by the search."""
    store, trial = Store(tmp_path / "runs"), plan().trials[0]
    folder = store.trial_dir(trial.trial_id)
    for number in (1, 2):
        attempt = attempts.begin(folder, driver=None)
        attempts.end(folder, attempt, outcome="interrupted", seconds=1.0, cpu_seconds=1.0)
        if number == 1:
            durable.write_json(folder / STOPPED_FILE, {"attempt": 1, "reason": "stopped by the search", "plan": "x"})
            assert store.record(trial.trial_id).stopped is not None
    assert store.record(trial.trial_id).stopped is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"configurations": 3},
        {"configurations": [3]},
        {"configurations": [{"variant": "plain"}]},
        {"configurations": [{"variant": [], "number": 1, "values": {}, "trial_id": "x"}]},
        {"configurations": [{"variant": "plain", "number": 1, "values": {"training.lr": "x"}, "trial_id": "x"}]},
        {"configurations": [{"variant": "plain", "number": 1, "values": {"training.lrr.x": 1}, "trial_id": "x"}]},
    ],
)
def test_damaged_search_file_is_named(content, plan, tmp_path):
    """A search.json that nobody here wrote is an error that says what to do, and the dashboard shows it."""
    searched, store = plan(), Store(tmp_path / "runs")
    ref = store.register(searched, source="")
    durable.write_json(ref.path / "search.json", content)
    with pytest.raises(StoreError, match="is damaged: remove it"):
        store.results(ref)
    (entry,) = load.entries(tmp_path / "runs")
    assert (entry.results, "is damaged" in entry.problem) == (None, True)


def _search(**dimension):
    space = {"training.lr": Dimension(**dimension)}
    return Search(space=space, method="optuna", scheduler="fifo", configurations=20, metric="ap", mode="max")


@pytest.mark.parametrize(
    ("dimension", "value", "near"),
    [
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1.1e-4, True),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 5e-4, False),
        ({"low": 0.0, "high": 1.0}, 0.97, True),
        ({"low": 1, "high": 9, "whole": True}, 9, True),
        ({"low": 1, "high": 9, "whole": True}, 8, False),
        ({"values": (1, 2, 4)}, 4, True),
        ({"values": (1, 2, 4)}, 2, False),
        ({"values": (1, 2)}, 1, False),
        ({"values": (None, 0.9, 0.99)}, 0.99, False),
    ],
)
def test_border_is_noticed(dimension, value, near, plan, tmp_path):
    """A best value at an end of a range, or of three or more numbers, asks for a wider space."""
    tried = outcomes(Store(tmp_path / "runs").results_for(plan()))["plain"].tried[0]
    tried = replace(tried, number=1, values={"training.lr": value})
    assert at_border(_search(**dimension), tried) == (["training.lr"] if near else [])
    assert at_border(_search(**dimension), replace(tried, number=0)) == []  # the variant's own settings


@pytest.mark.parametrize("method", ["random", "optuna"])
@pytest.mark.parametrize(
    "dimension",
    [
        {"low": 1e-4, "high": 1e-2, "log": True},
        {"low": 1, "high": 9, "whole": True},
        {"low": 1, "high": 9, "whole": True, "log": True},
        {"low": 0.25, "high": 0.75},
        {"values": (None, 0.9, "x")},
    ],
)
def test_suggestions_stay_in_the_space(method, dimension):
    """Every kind of dimension gives values of its own, both ends or all values in time, and the same ones again."""
    search = replace(_search(**dimension), method=method)
    known = [({"training.lr": value}, 0.1) for value in dimension.get("values", (dimension.get("low"),))]
    tried = [suggestions.suggest(search, number, 0, known)["training.lr"] for number in range(1, 40)]
    assert tried == [suggestions.suggest(search, number, 0, known)["training.lr"] for number in range(1, 40)]
    if "values" in dimension:
        assert set(tried) <= set(dimension["values"])
    else:
        assert all(dimension["low"] <= value <= dimension["high"] for value in tried)
        assert {type(value) for value in tried} == {int if dimension.get("whole") else float}
    assert len(set(tried)) > 1


def test_optuna_learns_from_scores():
    """With enough scores its suggestions lie nearer to the best known value than chance's."""
    search = _search(low=0.0, high=1.0)
    known = [({"training.lr": place / 20}, 1 - abs(place / 20 - 0.2)) for place in range(20)]
    near = [abs(suggestions.suggest(search, number, 0, known)["training.lr"] - 0.2) for number in range(20, 40)]
    chance = replace(search, method="random")
    far = [abs(suggestions.suggest(chance, number, 0, known)["training.lr"] - 0.2) for number in range(20, 40)]
    assert sum(near) < sum(far) / 2


def test_a_search_that_is_stopped_in_a_pause_starts_nothing_more(plan, tmp_path, monkeypatch):
    """`stop` ends the wait at once: Ray would take ten seconds to start, and as many to find nothing to do."""
    begun = []

    def paused_at_once(job):
        begun.append(len(job.specs))
        ask(job.stop.path, "pause")
        Timer(0.2, ask, (job.stop.path, "stop")).start()

    monkeypatch.setattr("workbench.ray_executor.run_on_ray", paused_at_once)
    err = io.StringIO()
    options = Options(trainer=RatedTrainer(), tracking_uri="http://127.0.0.1:9")
    assert run_study(plan(), Store(tmp_path / "runs"), options, out=io.StringIO(), err=err) == 143
    assert "Paused, with no trial at work" in err.getvalue()
    assert begun == [2]


def test_a_search_whose_first_configuration_takes_no_step_begins_no_other(plan, run, tmp_path):
    """What fails before the first step, as an import does, would fail in every configuration."""
    searched = plan()
    code, said, steps = run(searched, RatedTrainer(poisons=(Poison(kind="import", step=1),)))
    assert (code, steps) == (1, 0)
    assert "No configuration could take a step, so no other one is begun" in said
    states = [row["state"] for row in found(tmp_path, searched)["configurations"]]
    assert states == ["failed", "pending"]
    assert run(searched)[::2] == (0, 2 * 4 * 16)
