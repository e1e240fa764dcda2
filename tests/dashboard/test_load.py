"""What the pages are given to show."""

from dataclasses import replace
from pathlib import Path

import pytest

from dashboard import load
from workbench import durable
from workbench.errors import StoreError
from workbench.store import Store


def only(folder):
    """Return the results of the one study in a runs folder."""
    (entry,) = load.entries(folder)
    assert entry.results is not None
    return entry.results


@pytest.mark.parametrize(
    ("arguments", "environment", "folder", "unknown"),
    [
        ([], {}, "runs", []),
        ([], {"WORKBENCH_RUNS": "/data/runs"}, "/data/runs", []),
        ([], {"WORKBENCH_RUNS": ""}, "runs", []),
        (["--runs", "here"], {"WORKBENCH_RUNS": "/data/runs"}, "here", []),
        (["--run", "here"], {}, "runs", ["--run", "here"]),
    ],
)
def test_runs_folder_is_the_argument_then_the_environment(arguments, environment, folder, unknown):
    """The nearest word wins, and a misspelt option is handed back to be shown, not swallowed."""
    assert load.runs_folder(arguments, environment) == (Path(folder), unknown)


def test_missing_folder_is_an_empty_one(tmp_path):
    """Before the first run there is no folder; the dashboard must not make one."""
    assert load.entries(tmp_path / "runs") == ()
    assert not (tmp_path / "runs").exists()


def test_file_in_place_of_the_folder_is_told(tmp_path):
    """A path that is a file is a mistake to tell, with the path."""
    (tmp_path / "runs").write_text("")
    with pytest.raises(StoreError, match=r"runs is a file"):
        load.entries(tmp_path / "runs")


def test_unreadable_plan_is_an_entry_with_its_problem(tmp_path, fake_results, write_runs):
    """One damaged record must not hide the studies beside it."""
    write_runs(tmp_path, fake_results({"a": [0.3], "b": [0.3]}))
    write_runs(tmp_path, fake_results({"a": [0.3], "b": [0.3]}), profile="pictures")
    damaged = next(entry.ref for entry in load.entries(tmp_path) if entry.ref.profile == "pictures")
    (damaged.path / "plan.json").write_text('{"format": 1')
    by_profile = {entry.ref.profile: entry for entry in load.entries(tmp_path)}
    assert by_profile["laptop"].results is not None
    assert by_profile["pictures"].results is None
    assert "plan.json" in by_profile["pictures"].problem


def test_plan_of_a_later_version_is_an_entry_with_its_problem(tmp_path, fake_results, write_runs):
    """Also a sibling of the same study and profile, which the healthy plan asks about late claims."""
    write_runs(tmp_path, fake_results({"a": [0.3], "b": [0.3]}))
    (healthy,) = load.entries(tmp_path)
    later = healthy.ref.path.with_name("later")
    for name in ("plan.json", "registered.json"):
        durable.write_text(later / name, '{"format": 9}')
    first, last = load.entries(tmp_path)
    assert (first.key, first.problem) == (healthy.key, None)
    assert first.results.unreadable == (last.problem,)
    assert "was written by a later version" in last.problem


def test_cards_show_the_stored_verdicts_in_points(finished_runs):
    """A card repeats the record's verdict, a hundred times larger, and judges nothing itself."""
    results = only(finished_runs)
    cards = load.claim_cards(results)
    assert [card.verdict.verdict for card in cards] == ["supported", "equivalent"]
    for card, verdict in zip(cards, results.verdicts, strict=True):
        assert card.effect == pytest.approx(100 * verdict.effect)
        assert (card.low, card.high) == pytest.approx((100 * verdict.low, 100 * verdict.high))
        assert card.dots == pytest.approx([100 * value for value in verdict.differences.values()])
        assert (card.margin, card.level) == pytest.approx((2.0, 97.0))


def test_card_without_a_verdict_waits(running_runs):
    """While the look is under way a card has its statement and margin, and no numbers that would be a peek."""
    for card in load.claim_cards(only(running_runs)):
        assert card.verdict is None
        assert card.effect is None
        assert card.dots == ()


def test_progress_counts_every_state(running_runs, finished_runs):
    """Progress is of the look that was started, not of seeds that a later look may need."""
    progress = load.progress(only(running_runs))
    states = {"pending": 6, "running": 1, "finished": 5, "failed": 1, "diverged": 1, "interrupted": 1}
    assert (progress.states, progress.planned, progress.over) == (states, 15, 6)
    assert progress.fraction == pytest.approx((5 + 1 + 0.5 + 0.25 + 0.5) / 15)
    assert progress.running
    assert load.progress(only(finished_runs)).fraction == 1.0


def test_next_step_is_the_line_that_goes_on(fake_results, running_runs, finished_runs):
    """The page says what to do next exactly when there is something to do."""
    assert load.next_run(only(running_runs)) is None
    assert load.next_run(only(finished_runs)) is None
    waiting = fake_results({"a": [0.3, 0.3], "b": [0.3]})
    assert load.next_run(waiting)[1] == "python -m workbench run studies/refinement_detach.yaml --profile laptop"
    smoke = fake_results({"a": [0.3], "b": [0.3]}, looks=((1, 0.05),), gives_verdicts=False)
    assert load.next_run(smoke)[1] == "python -m workbench run studies/refinement_detach.yaml"


def test_undecided_claims_ask_for_the_next_look(tmp_path, fake_results, write_runs):
    """After an undecided look with another planned, the next step is that look; after the last there is none."""
    spread = {"a": [0.30, 0.31, 0.30, 0.31, 0.30], "b": [0.36, 0.29, 0.37, 0.28, 0.36]}
    results = write_runs(tmp_path, fake_results(spread))
    assert load.next_run(results)[1].endswith("--profile laptop --until-decided")
    assert load.next_run(replace(results, looks_started=2))[1].endswith("--profile laptop")


def test_trials_have_what_is_known_of_each(running_runs):
    """A running trial stands first with its speed and time left; a pending one has no number that nobody measured."""
    rows = load.trials(running_runs, only(running_runs)).set_index(["variant", "seed"])
    running, pending = rows.loc["off", 1], rows.loc["off", 4]
    assert rows.iloc[0]["state"] == "running"
    assert (running["progress"], running["seconds"], running["seconds_left"]) == pytest.approx((0.5, 40, 40))
    assert (running["attempts"], running["pictures_per_s"], running["peak_memory_mib"]) == pytest.approx((1, 90, 512))
    assert rows.loc["kept", 1]["best_ap"] == pytest.approx(34.0)
    assert pending[["best_ap", "pictures_per_s", "seconds_left", "peak_memory_mib", "mlflow"]].isna().all()


def test_failures_say_why_and_where_to_read_more(running_runs):
    """Each bad ending has its own words and the folder of its record."""
    failures = {failure.trial: failure for failure in load.failures(running_runs, only(running_runs))}
    assert {trial: failure.state for trial, failure in failures.items()} == {
        "detached seed 2": "failed",
        "kept seed 2": "diverged",
        "off seed 2": "interrupted",
    }
    assert failures["detached seed 2"].message == "no space left on device"
    assert failures["kept seed 2"].message == "the loss is not finite at step 190"
    assert failures["off seed 2"].message
    assert all(failure.folder.is_dir() for failure in failures.values())


def test_mlflow_links(finished_runs, running_runs):
    """Links point into MLflow's own pages once something was mirrored; a server of one's own keeps its address."""
    results = only(finished_runs)
    assert load.mlflow_url(results) == "http://127.0.0.1:5000/#/experiments/7/runs/parent?workflowType=machine_learning"
    assert (
        load.mlflow_url(results, "kept-1")
        == "http://127.0.0.1:5000/#/experiments/7/runs/run-kept-1?workflowType=machine_learning"
    )
    database = Store(finished_runs, create=False).mlflow_database
    assert load.mlflow_command(results).endswith(f"mlflow ui --backend-store-uri sqlite:///{database} --port 5000")
    served = replace(results, mlflow={**results.mlflow, "tracking_uri": "https://mlflow.example/"})
    assert load.mlflow_url(served) == "https://mlflow.example/#/experiments/7/runs/parent?workflowType=machine_learning"
    assert load.mlflow_command(served) is None
    assert load.mlflow_url(only(running_runs)) is None
    assert load.mlflow_command(only(running_runs)) is None


def test_running_trial_is_seen_to_go_on(tmp_path, fake_results, write_runs):
    """A second reading sees what was written since the first, so that a page can refresh itself."""
    results = fake_results({"a": [0.3], "b": []}, states={("b", 0): "running"}, looks=((1, 0.05),))
    write_runs(tmp_path, results)
    assert load.progress(only(tmp_path)).fraction == pytest.approx((1 + 0.5) / 2)
    events = durable.EventWriter(Store(tmp_path).trial_dir("b-0") / "events.jsonl", attempt=1)
    events.append(results.records["a-0"].epochs[2])
    events.close()
    assert load.progress(only(tmp_path)).fraction == pytest.approx((1 + 0.75) / 2)
