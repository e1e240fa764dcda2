"""Where a study stands, for people and for scripts."""

import json
from dataclasses import replace

import pytest

from workbench import status
from workbench.verdict import judge

APS = {"detached": [0.30, 0.31, 0.29, 0.30, 0.32], "kept": [0.36, 0.38, 0.35, 0.37, 0.36]}


def test_the_document_holds_what_scripts_rely_on(fake_results):
    """Trials of the looks started with states and metrics as fractions, and verdicts; JSON throughout."""
    results = fake_results(APS)
    results = replace(results, verdicts=judge(results))
    described = json.loads(json.dumps(status.describe(results)))
    assert (described["study"], described["profile"], described["baseline"]) == (
        "refinement_detach",
        "laptop",
        "detached",
    )
    assert len(described["trials"]) == 10  # five seeds of the first look, not the ten of the last
    first = described["trials"][0]
    assert {"trial_id", "variant", "seed", "context", "state", "attempts", "seconds", "metrics"} <= first.keys()
    assert (first["variant"], first["seed"], first["state"]) == ("detached", 0, "finished")
    assert first["metrics"]["ap"] == 0.30
    (verdict,) = described["verdicts"]
    assert (verdict["claim"], verdict["verdict"], verdict["n_pairs"]) == ("kept_better", "supported", 5)
    assert verdict["effect"] == pytest.approx(0.06)


def test_the_text_shows_points(fake_results):
    """A terminal shows AP in points and every trial once."""
    results = fake_results(APS)
    text = status.as_text(status.describe(replace(results, verdicts=judge(results))))
    rows = [line.split() for line in text.splitlines()]
    assert ["kept", "1", "finished", "1", "88", "38.0", "kept-1"] in rows
    assert "SUPPORTED  kept_better: +6.0 [" in text


@pytest.mark.parametrize(
    ("states", "step"),
    [
        ({("kept", 1): "running", ("kept", 2): "failed"}, "wait"),
        ({("kept", 2): "failed"}, "this line then tries them once more: python -m workbench run studies/"),
        ({("kept", 3): "interrupted"}, "goes on from the checkpoints"),
        (
            {("kept", 4): "pending"},
            "runs what is missing: python -m workbench run studies/refinement_detach.yaml --profile laptop",
        ),
        ({("kept", 0): "diverged"}, "read the report"),
        ({}, "read the report: python -m workbench report studies/refinement_detach.yaml --profile laptop"),
    ],
)
def test_the_next_step_fits_the_states(fake_results, states, step):
    """Whatever happened, one line says what to do."""
    assert step in status.describe(fake_results(APS, states=states))["next"]


def test_an_undecided_study_is_told_of_its_next_look(fake_results):
    """When more seeds can decide, the next step names the option."""
    results = fake_results({"detached": [0.30, 0.34, 0.28, 0.33, 0.30], "kept": [0.31, 0.33, 0.30, 0.36, 0.29]})
    described = status.describe(replace(results, verdicts=judge(results)))
    assert described["verdicts"][0]["verdict"] == "undecided"
    assert "--until-decided" in described["next"]


def test_a_failure_is_shown_with_its_reason(fake_results):
    """The error of a failed trial is in both forms."""
    described = status.describe(fake_results(APS, states={("kept", 2): "failed"}))
    assert "kept seed 2 failed: a picture cannot be read" in status.as_text(described)
    assert [trial["error"] for trial in described["trials"] if trial["error"]] == ["a picture cannot be read"]
