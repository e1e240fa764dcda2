"""What a plan tells before it runs."""

import pytest

from workbench import forecast, stats
from workbench.costs import Machine

HERE = Machine(device="cpu", at_once=2)


def test_before_anything_ran_effects_are_in_sd(fake_results):
    """Without finished pairs the reachable effects are multiples of the unknown sd, and the time is not known."""
    described = forecast.describe(fake_results({"base": [], "other": []}))
    assert [(look["seeds"], look["trials"], look["finished"]) for look in described["looks"]] == [
        (5, 10, 0),
        (10, 20, 0),
    ]
    reach = described["looks"][0]["reachable"]
    assert reach["effect_in_sd"] == pytest.approx(stats.reachable(5, 1.0, 0.03).effect)
    assert reach["claims"][0]["sd"] is None
    assert described["cost"]["costs"] is None
    assert {look["seconds"] for look in described["cost"]["looks"]} == {None}
    text = forecast.as_text(described)
    assert "look 1: 5 seeds, alpha 0.03: 10 trials, 0 of them finished" in text
    assert "time, memory and disk on the CPU: not known; add --probe to measure a few steps" in text
    assert "look 1 can show a difference of 1.95 sd" in text


def test_finished_pairs_give_effects_in_points_and_time(fake_results):
    """The sd of the finished pairs turns the reachable effects into AP, and their time gives the time to go."""
    results = fake_results({"base": [0.30, 0.32, 0.31], "other": [0.33, 0.34, 0.36]})
    described = forecast.describe(results, machine=HERE)
    first = described["looks"][0]
    (claim,) = first["reachable"]["claims"]
    assert (claim["pairs"], first["finished"]) == (3, 6)
    assert claim["sd"] == pytest.approx(0.01527525)
    assert claim["effect"] == pytest.approx(0.01527525 * first["reachable"]["effect_in_sd"])
    assert [look["seconds"] for look in described["cost"]["looks"]] == [10 + 2 * 88, 10 + 2 * 88 + 10 + 5 * 88]
    text = forecast.as_text(described)
    assert "look 1: 5 seeds, alpha 0.03: 10 trials, 6 of them finished; 4 to run in 3 min 06 s, 0 GPU-hours" in text
    assert "a trial on the CPU, 2 at once:\n  base   1 min 28 s; from 3 trials of the variant\n" in text
    assert "margin 2 points; a difference of 2.98, equivalence within 2.82 points (sd 1.53 from 3 pairs)" in text


def test_complete_look_has_no_time_to_go(fake_results):
    """When every trial of the first look has ended, its line says so."""
    described = forecast.describe(fake_results({"base": [0.3] * 5, "other": [0.31] * 5}))
    assert "look 1: 5 seeds, alpha 0.03: 10 trials, 10 of them finished; complete" in forecast.as_text(described)


def test_too_few_seeds_promise_nothing(fake_results):
    """A look below five seeds, or a profile for plumbing, has nothing that it can show."""
    few = forecast.describe(fake_results({"base": [], "other": []}, looks=((2, 0.05),)))
    plumbing = forecast.describe(fake_results({"base": [], "other": []}, gives_verdicts=False))
    assert few["looks"][0]["reachable"] is None
    assert plumbing["looks"][0]["reachable"] is None
    assert "can show" not in forecast.as_text(few)


def test_variants_show_what_they_differ_in(fake_results):
    """Each variant lists its keys with both values; `explain` adds every key with the layer that set it."""
    described = forecast.describe(fake_results({"base": [], "other": []}), explain=True)
    assert described["variants"][1]["differences"] == {"training.lr": (2e-4, 4e-4)}
    assert described["settings"]["other"] == {"training.lr": {"value": 4e-4, "set_by": "variant"}}
    text = forecast.as_text(described)
    assert "other  training.lr: 0.0002 -> 0.0004" in text
    assert "other, where it is not as base:\n  training.lr  0.0004          variant" in text
