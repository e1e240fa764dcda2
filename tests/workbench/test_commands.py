"""The lines that reports, status and pages give to be copied."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from workbench import cli, commands, report, status
from workbench.plan import make_plan
from workbench.study_file import Selection, load_study
from workbench.verdict import judge

CHOSEN = Selection(
    profile="smoke", variants=("plain", "sharp"), seeds=1, sets=("loss.weight_class=2.5", "data.side=32"), budget="10m"
)
SPREAD = {"detached": [0.30, 0.34, 0.28, 0.33, 0.30], "kept": [0.31, 0.33, 0.30, 0.36, 0.29]}


@pytest.fixture
def chosen(toy_study, store):
    """Return the results of a registered plan with every kind of choice, read back from the records."""
    return store.results(store.register(make_plan(load_study(toy_study, CHOSEN)), source=""))


def test_a_copied_line_plans_the_same_study_again(chosen, store, capsys):
    """The line that repeats a study, given to a shell, selects the same plan in the same records."""
    words = shlex.split(commands.command(chosen, verb="status"))
    assert words[:3] == ["python", "-m", "workbench"]
    assert cli.main([*words[3:], "--json"]) == 0
    assert str(store.root) in words
    options = cli.build_parser().parse_args(words[3:])
    selection = Selection(
        profile=options.profile,
        variants=options.variants,
        seeds=options.seeds,
        sets=tuple(options.set),
        budget=options.budget,
    )
    assert selection == CHOSEN
    assert make_plan(load_study(options.study, selection)) == chosen.plan


def test_report_and_status_give_the_same_line(chosen):
    """Whoever reads either is sent to the same command, with all that was chosen."""
    line = commands.command(chosen)
    assert "--variants plain,sharp --seeds 1 --set loss.weight_class=2.5 --set data.side=32 --budget 10m" in line
    assert line in report.render(chosen, format="text").split("To repeat:")[1]
    assert status.describe(chosen)["next"].endswith(line)


def test_an_option_replaces_the_chosen_one(chosen):
    """The advice to run all variants does not stand beside the choice of two."""
    line = commands.command(chosen, "--variants", "all")
    assert line.count("--variants") == 1
    assert line.endswith("--variants all")


def test_words_are_quoted_for_a_shell(fake_results):
    """A path with a blank, or a list in --set, comes out of the shell as it went in."""
    results = fake_results(SPREAD)
    words = ("--data", "my pictures", "--set", "training.augment={kind: none}")
    study = replace(results.plan.study, selection=words, path=Path("my studies/one.yaml"))
    results = replace(results, plan=replace(results.plan, study=study), runs=Path("other runs"))
    split = shlex.split(commands.command(results))
    assert split[4:] == ["my studies/one.yaml", *words, "--runs", "other runs"]


def test_the_usual_runs_folder_is_not_named(fake_results, tmp_path, monkeypatch):
    """`runs` here is the default; any other folder is named, from here where that is shorter."""
    results = fake_results(SPREAD)
    monkeypatch.chdir(tmp_path)
    assert "--runs" not in commands.command(replace(results, runs=tmp_path / "runs"))
    assert commands.command(replace(results, runs=tmp_path / "mine")).endswith("--runs mine")
    assert commands.dashboard_command(tmp_path / "mine").endswith(" -- --runs mine")
    away = "app.py --server.address=127.0.0.1 --browser.gatherUsageStats=false"
    assert commands.dashboard_command(tmp_path / "runs").endswith(away)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert commands.dashboard_command(Path("runs")).endswith("run dashboard/app.py")


@pytest.mark.parametrize("uri", ["http://me:secret@host", "postgresql://host/db?password=secret"])
def test_an_address_that_may_hold_a_password_is_left_out(uri):
    """What anybody may read in a report gives no password away; a plain address stays."""
    assert Selection(tracking_uri=uri).words() == ()
    assert Selection(tracking_uri="http://host:5000").words() == ("--tracking-uri", "http://host:5000")


def test_next_run_goes_on_until_nothing_is_left(fake_results):
    """Undecided claims ask for the next look while one is planned; a smoke study for the default profile."""
    undecided = fake_results(SPREAD)
    undecided = replace(undecided, verdicts=judge(undecided))
    assert commands.next_run(undecided)[1].endswith("--profile laptop --until-decided")
    last = fake_results(SPREAD, looks=((5, 0.05),))
    assert commands.next_run(replace(last, verdicts=judge(last))) is None
    smoke = fake_results({"a": [0.3], "b": [0.3]}, looks=((1, 0.05),), gives_verdicts=False)
    assert commands.next_run(smoke)[1] == "python -m workbench run studies/refinement_detach.yaml"
    assert commands.next_run(fake_results(SPREAD, states={("kept", 1): "running"})) is None
