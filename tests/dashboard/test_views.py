"""Each page with the records of a study that is finished, one that runs, and with none."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboard import load
from workbench import durable, report
from workbench.store import Store
from workbench.study import SEARCH_SEED, Dimension, Search

APP = Path(__file__).parents[2] / "dashboard" / "app.py"
PAGES = [None, "views/compare.py", "views/runs.py"]


@pytest.fixture
def page(monkeypatch):
    """Return an opener of a page (None: the first) on a runs folder, with values as in the URL."""

    def open_page(runs: Path, view: str | None = None, *options: str, **query: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(runs), *options])
        app = AppTest.from_file(str(APP), default_timeout=60)
        if view:
            app.switch_page(view)
        for name, value in query.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception
        return app

    return open_page


def texts(app: AppTest) -> str:
    """Return all that is written on the page, one piece a line."""
    kinds = (app.title, app.subheader, app.markdown, app.caption, app.code, app.info, app.warning, app.error)
    return "\n".join(str(element.value) for elements in kinds for element in elements)


@pytest.mark.parametrize("view", PAGES)
def test_missing_records_are_an_explained_empty_page(page, tmp_path, view):
    """Before the first run every page says so, with the line that starts one."""
    app = page(tmp_path / "none", view)
    assert "No study has been run" in app.info[0].value
    assert app.code[0].value == f"python -m workbench run studies/refinement_detach.yaml --runs {tmp_path / 'none'}"


@pytest.mark.parametrize("view", PAGES)
def test_file_for_a_folder_is_told(page, tmp_path, view):
    """A path that cannot hold records is named on the page."""
    (tmp_path / "runs").write_text("")
    assert "runs is a file" in page(tmp_path / "runs", view).info[0].value


@pytest.mark.parametrize("view", PAGES)
def test_search_is_shown(page, fake_results, write_runs, tmp_path, view):
    """A study that searches has no claims; its configurations are on the pages as its trials."""
    results = fake_results({"detached": [0.3], "kept": [0.32]}, looks=((1, 0.05),), gives_verdicts=False)
    space = {"training.lr": Dimension(low=1e-4, high=1e-2, log=True)}
    search = Search(space=space, method="random", scheduler="fifo", configurations=2, metric="ap", mode="max")
    study = replace(results.plan.study, search=search, claims=(), seeds=(SEARCH_SEED,))
    trials = tuple(replace(trial, seed=SEARCH_SEED) for trial in results.plan.trials)
    results = write_runs(tmp_path, replace(results, plan=replace(results.plan, study=study, trials=trials)))
    folder = Store(tmp_path).study_dir(results.plan)
    row = {"variant": "kept", "number": 1, "values": {"training.lr": 1e-3}, "trial_id": "kept-0001"}
    durable.write_json(folder / "search.json", {"configurations": [row]})
    app = page(tmp_path, view)
    if view == "views/runs.py":
        assert "kept#1" in list(app.dataframe[0].value["variant"])
    assert "The search is not complete" in texts(app) or view == "views/compare.py"


def test_misspelt_option_is_told(page, finished_runs):
    """An option that is not understood must not pass for one that was."""
    assert "--port" in page(finished_runs, None, "--port").warning[0].value


def test_studies_give_verdict_effect_interval_and_n(page, finished_runs):
    """The numbers on the cards are those of the report, with their n, level and margin."""
    shown = texts(page(finished_runs))
    (entry,) = load.entries(finished_runs)
    claims = report.contents(entry.results).claims
    for row in claims.rows:
        told = dict(zip(claims.header, row, strict=True))
        effect, low, high = re.findall(r"[+-][0-9.]+", told["Difference [interval]"])
        assert f"### {effect} AP points" in shown
        assert f"{told['Level']} interval {low} to {high} · n={told['n']} of 5" in shown
        assert f"paired seeds · margin ±{told['Margin']}" in shown
    assert ":green-badge[:material/check_circle: supported (strong)]" in shown
    assert ":blue-badge[:material/drag_handle: equivalent]" in shown
    assert "Why: the whole interval lies above 0, and beyond the margin of 2 points." in shown
    assert "1,000 validation pictures · scope: seeds" in shown


def test_studies_show_progress_while_they_run(page, running_runs):
    """Before the look is complete there is progress and a margin, and no number that would be a peek."""
    app = page(running_runs)
    shown = texts(app)
    assert shown.count("no verdict yet") == 2
    assert "AP points" in shown
    assert "interval" not in shown
    assert "1 running" in app.get("progress")[0].proto.text


def test_unreadable_record_stands_beside_the_others(page, tmp_path, fake_results, write_runs):
    """A damaged plan is shown as what it is, and the study beside it as ever."""
    write_runs(tmp_path, fake_results({"a": [0.3], "b": [0.3]}))
    write_runs(tmp_path, fake_results({"a": [0.3], "b": [0.3]}), profile="pictures")
    (tmp_path / "studies" / "refinement_detach" / "pictures" / "0123456789ab" / "plan.json").write_text("{")
    app = page(tmp_path)
    assert "pictures/01234567" in app.error[0].value
    assert "plan.json" in app.error[0].value
    assert len(app.subheader) == 1
    chosen = page(tmp_path, "views/compare.py", study="refinement_detach/pictures/01234567")
    assert "cannot be read" in chosen.error[0].value


def test_compare_draws_differences_curves_and_tables(page, finished_runs):
    """Evidence in the order of its weight: differences, curves, final scores, classes, configuration."""
    app = page(finished_runs, "views/compare.py")
    headings = [heading.value for heading in app.subheader]
    assert headings == [
        "Difference to detached",
        "Learning curves",
        "Final scores",
        "By class",
        "What differs in the configuration",
    ]
    assert len(app.get("plotly_chart")) == 3
    finals, config = (frame.value for frame in app.dataframe)
    assert list(finals["AP"]) == ["31.0 ± 0.8", "35.0 ± 0.2", "31.0 ± 0.6"]
    assert list(finals["n"]) == [5, 5, 5]
    assert list(config["Key"]) == ["training.lr"]
    assert "97 % t interval over paired seeds" in texts(app)
    assert "±2 points" in texts(app)


def test_compare_reads_its_selection_from_the_url(page, finished_runs):
    """A link restores metric, weights, axis and seeds, so that a view can be sent to somebody."""
    app = page(finished_runs, "views/compare.py", metric="AP50", against="training seconds", seeds="true")
    assert "no margin is declared for AP50" in texts(app)
    curves = app.get("plotly_chart")[1].proto.spec
    assert '"training seconds"' in curves
    assert "seed %{customdata[0]}" in curves


def test_compare_says_what_is_missing(page, finished_runs, running_runs):
    """Weights that were not scored, and pairs that are not finished, are told instead of an empty plot."""
    raw = page(finished_runs, "views/compare.py", weights="raw")
    assert "raw weights yet" in raw.info[0].value
    assert not raw.get("plotly_chart")
    running = page(running_runs, "views/compare.py", metric="AP small")
    assert len(running.get("plotly_chart")) == 3
    assert "no verdict rests on it" in texts(running)
    assert "no verdict rests on it" not in texts(page(finished_runs, "views/compare.py"))


def test_runs_show_every_trial_and_what_went_wrong(page, running_runs):
    """A running trial stands first; each bad ending is told with its reason and where to read more."""
    app = page(running_runs, "views/runs.py")
    (table,) = app.dataframe
    assert (table.value.iloc[0]["variant"], table.value.iloc[0]["state"]) == ("off", "running")
    assert len(table.value) == 15
    assert "detached seed 2 failed" in app.error[0].value
    assert "no space left on device" in app.error[0].value
    assert f"{running_runs}/trials/detached-2" in app.error[0].value
    assert [warning.value.split("**")[1] for warning in app.warning] == [
        "kept seed 2 diverged",
        "off seed 2 interrupted",
    ]
    assert "Not mirrored to MLflow yet." in texts(app)


def test_runs_tell_many_failures_in_short(page, tmp_path, fake_results, write_runs):
    """Twenty are told in full, the others counted; every one of them is in the table."""
    seeds = 60
    failed = {("a", seed): "failed" for seed in range(23)}
    write_runs(tmp_path, fake_results({"a": [0.3] * seeds, "b": []}, states=failed, looks=((seeds, 0.05),)))
    app = page(tmp_path, "views/runs.py")
    assert len(app.error) == 20
    assert "And 3 more, of 23; their states are in the table." in texts(app)
    (table,) = app.dataframe
    assert (len(table.value), list(table.value["state"]).count("failed")) == (2 * seeds, 23)


def test_runs_link_to_mlflow(page, finished_runs):
    """The study and each trial link to their MLflow pages, with the line that starts those."""
    app = page(finished_runs, "views/runs.py")
    assert app.link_button[0].url == "http://127.0.0.1:5000/#/experiments/7/runs/parent?workflowType=machine_learning"
    assert app.dataframe[0].value.iloc[0]["mlflow"].endswith("/runs/run-detached-0?workflowType=machine_learning")
    assert any("mlflow ui --backend-store-uri sqlite:///" in code.value for code in app.code)


@pytest.mark.parametrize("view", [None, "views/runs.py"])
def test_pages_refresh_themselves_only_while_something_runs(page, monkeypatch, finished_runs, running_runs, view):
    """The timer is there while a trial runs; on a finished study the page is still."""
    timers = []
    fragment = st.fragment

    def watched(draw, *, run_every):
        timers.append(run_every)
        return fragment(draw, run_every=run_every)

    monkeypatch.setattr(st, "fragment", watched)
    page(running_runs, view)
    page(finished_runs, view)
    assert timers == [5, None]
