"""Tables of what differs between variants: the same numbers as the verdicts and the report."""

import pytest

from workbench import comparison, report
from workbench.verdict import judge

SCORES = {"base": [0.30, 0.32, 0.31], "better": [0.35, 0.36, 0.37], "unfinished": [0.30]}
LOOKS = ((3, 0.05),)


def test_differences_equal_the_verdicts(fake_results):
    """The forest plot and the verdict must never disagree: same pairs, same interval, a hundred times larger."""
    results = fake_results({"base": SCORES["base"], "better": SCORES["better"]}, looks=LOOKS)
    (verdict,) = judge(results)
    differences, dots = comparison.differences(results, "ap", "averaged")
    (row,) = differences.to_dict("records")
    assert (row["variant"], row["n"]) == ("better", 3)
    expected = (100 * verdict.effect, 100 * verdict.low, 100 * verdict.high)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx(expected)
    assert dict(zip(dots["seed"], dots["difference"], strict=True)) == pytest.approx({0: 5.0, 1: 4.0, 2: 6.0})
    assert comparison.level(results) == pytest.approx(100 * (1 - verdict.alpha))


def test_one_pair_has_a_dot_and_no_interval(fake_results):
    """A single pair says nothing about its noise; the dot is shown, an interval would be made up."""
    differences, dots = comparison.differences(fake_results(SCORES, looks=LOOKS), "ap", "averaged")
    row = differences.set_index("variant").loc["unfinished"]
    assert row["n"] == 1
    assert row[["effect", "low", "high"]].isna().all()
    assert list(dots[dots["variant"] == "unfinished"]["difference"]) == pytest.approx([0.0])


def test_weights_that_nobody_scored_give_no_numbers(fake_results):
    """Raw weights were not evaluated here: empty tables, not averaged ones under another name."""
    results = fake_results(SCORES, looks=LOOKS)
    differences, dots = comparison.differences(results, "ap", "raw")
    assert dots.empty
    assert list(differences["n"]) == [0, 0]
    assert comparison.per_class(results, "raw", "ap").empty
    assert set(comparison.final_scores(results, "raw")["AP"]) == {"n/a"}


def test_margin_is_that_of_the_metric(fake_results):
    """A margin declared for AP says nothing about AP50."""
    results = fake_results(SCORES, looks=LOOKS, margin=0.015)
    assert comparison.margin(results, "ap") == pytest.approx(1.5)
    assert comparison.margin(results, "ap50") is None


def test_final_scores_are_the_report_s(fake_results):
    """Mean ± standard deviation and n are written as the report writes them."""
    results = fake_results(SCORES, looks=LOOKS)
    table = comparison.final_scores(results, "averaged").set_index("Variant")
    assert table.loc["better", "AP"] == "36.0 ± 1.0"
    assert table.loc["unfinished", "AP"] == "30.0"
    assert list(table["n"]) == [3, 3, 1]
    written = {row[0]: row for row in next(iter(report.contents(results).scores)).rows}
    assert written["better"][:4] == ("better", "3", table.loc["better", "AP"], table.loc["better", "AP50"])


def test_curves_have_a_mean_an_interval_and_every_seed(fake_results):
    """Each epoch has the mean of the seeds that reached it; with one seed there is a line and no band."""
    results = fake_results(SCORES, looks=LOOKS, states={("base", 2): "running"})
    bands, lines = comparison.curves(results, metric="ap", parameters="averaged", axis="epoch")
    base = bands[bands["variant"] == "base"].set_index("x")
    assert list(base["n"]) == [3, 3, 2, 2]
    assert base.loc[4, "mean"] == pytest.approx(31.0)
    assert base.loc[4, "low"] < 31.0 < base.loc[4, "high"]
    assert bands[bands["variant"] == "unfinished"][["low", "high"]].isna().all(axis=None)
    last = lines[lines["x"] == 4].set_index(["variant", "seed"])["value"]
    assert last["better", 2] == pytest.approx(37.0)
    assert list(dict.fromkeys(bands["variant"])) == ["base", "better", "unfinished"]


def test_curves_against_training_time(fake_results):
    """On the time axis an epoch stands where its training ended."""
    results = fake_results(SCORES, looks=LOOKS)
    bands, _ = comparison.curves(results, metric="ap", parameters="averaged", axis="training seconds")
    assert list(bands[bands["variant"] == "base"]["x"]) == pytest.approx([20, 40, 60, 80])


def test_classes_stand_hardest_first(fake_results):
    """The class where every variant is weak is the one to look at first."""
    classes = comparison.per_class(fake_results(SCORES, looks=LOOKS), "averaged", "ap")
    better = classes[classes["variant"] == "better"]
    assert list(better["class"]) == ["ring", "disc"]
    assert list(better["mean"]) == pytest.approx([0.9 * 36, 1.1 * 36])
    assert list(better["n"]) == [3, 3]


def test_configuration_shows_only_what_differs(fake_results):
    """A key that is equal everywhere is no row; a variant that keeps the baseline's value repeats it."""
    table = comparison.config_differences(fake_results(SCORES, looks=LOOKS)).set_index("Key")
    assert list(table.index) == ["training.lr"]
    assert list(table.loc["training.lr"]) == ["0.0002", "0.0004", "0.0008"]
