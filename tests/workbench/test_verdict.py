"""The rule that turns seeds into words, case by case, and its error rates by simulation."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from workbench import stats
from workbench.study import Claim, Term
from workbench.verdict import decide, judge

BASE = (0.300, 0.312, 0.295, 0.308, 0.301)
NOISE = (0.001, -0.002, 0.002, 0.0, -0.001)
NEXT_BASE = (0.305, 0.299, 0.310, 0.297, 0.303)


def shifted(by, base=BASE, scale=1.0):
    """A variant whose pairs differ by `by` plus a little noise."""
    return [ap + by + scale * noise for ap, noise in zip(base, NOISE * 2, strict=False)]


def claim(kind="superiority", *, missing=(), family=None, plus="kept", metric="ap", identity="c"):
    """A claim about a variant and the baseline `detached`."""
    return Claim(
        id=identity,
        text="a claim",
        kind=kind,
        terms=(
            Term(variant=plus, metric=metric, weight=1.0, parameters="averaged"),
            Term(variant="detached", metric=metric, weight=-1.0, parameters="averaged"),
        ),
        margin=0.02,
        missing=missing,
        family=family,
    )


@pytest.fixture(name="judged")
def _judged(fake_results):
    """Judge one variant against the baseline, with every option of `fake_results`."""

    def judged(kept, *, base=BASE, seeds=None, **options):
        (verdict,) = judge(fake_results({"detached": list(base), "kept": kept}, **options), seeds=seeds)
        return verdict

    return judged


class TestWords:
    """Where the interval lies decides the word."""

    @pytest.mark.parametrize(
        ("by", "scale", "word"),
        [
            (0.05, 1, "supported"),
            (-0.05, 1, "refuted"),
            (0.0, 1, "equivalent"),
            (0.01, 1, "equivalent"),
            (0.01, 20, "undecided"),
        ],
    )
    def test_superiority(self, judged, by, scale, word):
        """A difference beyond 0 is a direction, one within the margin is equivalence even if it is surely positive."""
        assert judged(shifted(by, scale=scale)).verdict == word

    @pytest.mark.parametrize(
        ("by", "scale", "word"),
        [(0.0, 1, "supported"), (0.05, 1, "refuted"), (-0.05, 1, "refuted"), (0.015, 5, "undecided")],
    )
    def test_equivalence(self, judged, by, scale, word):
        """An equivalence claim is supported within the margin and refuted wholly beyond it."""
        assert judged(shifted(by, scale=scale), claims=(claim("equivalence"),)).verdict == word

    def test_bounds_on_the_margin_and_on_zero_decide_nothing(self):
        """The inequalities are strict, so a bound that touches 0 or the margin is not beyond it."""
        interval = stats.Interval(
            estimate=0.01, low=0.0, high=0.03, inner_low=0.001, inner_high=0.02, sd=0.01, n=5, p_value=0.05
        )
        assert decide("superiority", interval, 0.02) == "undecided"
        assert decide("superiority", replace(interval, low=1e-9), 0.02) == "supported"
        assert decide("superiority", replace(interval, inner_high=0.0199), 0.02) == "equivalent"
        assert decide("equivalence", replace(interval, low=0.02, high=0.03), 0.02) == "undecided"

    def test_strong_needs_the_interval_beyond_the_margin(self, judged):
        """A supported claim is strong only when even the lower bound exceeds the margin."""
        assert judged(shifted(0.05)).strong
        weak = judged(shifted(0.022, scale=3))
        assert weak.verdict == "supported"
        assert not weak.strong

    def test_a_sure_but_small_gain_says_practically_nil(self, judged):
        """Equivalence with an interval above 0 tells that the gain is real and too small to matter."""
        assert judged(shifted(0.01)).reason == (
            "any difference is smaller than 2 points: statistically positive, practically nil"
        )

    def test_numbers_are_those_of_the_pairs(self, judged):
        """Effect, dots, pairs and correlation are computed seed by seed."""
        verdict = judged(shifted(0.05))
        assert verdict.differences == pytest.approx({s: 0.05 + n for s, n in enumerate(NOISE)})
        expected = stats.paired_interval(list(verdict.differences.values()), alpha=0.03)
        assert (verdict.effect, verdict.low, verdict.high) == (expected.estimate, expected.low, expected.high)
        assert (verdict.n_pairs, verdict.look_seeds, verdict.alpha) == (5, 5, 0.03)
        assert verdict.correlation == pytest.approx(0.97, abs=0.02)

    def test_contrasts_sum_weighted_terms(self, fake_results):
        """A difference in differences is the weighted sum of its terms for each seed, without a correlation."""
        terms = tuple(
            Term(variant=v, metric="ap", weight=w, parameters="averaged")
            for v, w in (("a", 1.0), ("b", -0.5), ("c", -0.5))
        )
        asked = replace(claim(), terms=terms)
        aps = {"a": shifted(0.04), "b": list(BASE), "c": shifted(0.02, scale=2)}
        (verdict,) = judge(fake_results(aps, claims=(asked,)))
        expected = {s: aps["a"][s] - 0.5 * aps["b"][s] - 0.5 * aps["c"][s] for s in range(5)}
        assert verdict.differences == pytest.approx(expected)
        assert verdict.correlation is None


class TestUndecidedByRule:
    """Some evidence may not decide anything, however clear its numbers are."""

    def test_missing_variant_says_how_to_run_it(self, fake_results):
        """A claim on a variant outside the selection names it and the option that runs it."""
        results = fake_results({"detached": list(BASE)}, claims=(claim(missing=("kept",)),))
        (verdict,) = judge(results)
        assert (verdict.verdict, verdict.n_pairs, verdict.effect) == ("undecided", 0, None)
        assert verdict.reason == "this selection does not run kept: add --variants all"

    def test_profile_without_verdicts(self, judged):
        """The plumbing profile gives numbers and no verdict."""
        verdict = judged(shifted(0.05), gives_verdicts=False)
        assert verdict.verdict == "undecided"
        assert "never gives a verdict" in verdict.reason
        assert verdict.effect == pytest.approx(0.05)

    @pytest.mark.parametrize("options", [{"looks": ((2, 0.05),)}, {"seeds": 2}])
    def test_two_seeds_give_numbers_only(self, judged, options):
        """With fewer than five seeds, by the plan or by --seeds, there is an interval and no verdict."""
        verdict = judged(shifted(0.05), **options)
        assert verdict.verdict == "undecided"
        assert verdict.reason.startswith("2 seeds give numbers but no verdict, which takes at least 5")
        assert (verdict.n_pairs, verdict.low is not None) == (2, True)

    def test_fewer_seeds_than_the_first_look(self, judged):
        """Six of eight planned seeds are an unplanned look, which decides nothing."""
        verdict = judged(shifted(0.05, base=BASE * 2), base=BASE * 2, looks=((8, 0.05),), seeds=6)
        assert verdict.verdict == "undecided"
        assert verdict.reason.startswith("6 seeds are fewer than the first look of 8")

    def test_running_and_pending_trials_show_progress(self, judged):
        """An incomplete look tells how far it is, with the numbers so far."""
        verdict = judged(shifted(0.05), states={("kept", 4): "running", ("detached", 3): "pending"})
        assert verdict.verdict == "undecided"
        assert verdict.reason == "8 of 10 trials finished: the same command goes on"
        assert verdict.n_pairs == 3

    def test_one_pair_has_no_numbers(self, judged):
        """A single finished pair is shown as a dot, without an interval."""
        verdict = judged(shifted(0.05)[:1])
        assert (verdict.n_pairs, verdict.effect, verdict.low, verdict.sd) == (1, None, None, None)
        assert verdict.differences == pytest.approx({0: 0.051})

    def test_failed_trial_is_named(self, judged):
        """A failure blocks the verdict, is named, and its pair is left out openly."""
        verdict = judged(shifted(0.05), states={("kept", 3): "failed"})
        assert verdict.verdict == "undecided"
        assert verdict.reason.startswith("kept seed 3 failed")
        assert verdict.notes == ("pairs left out: kept seed 3 gave no result",)

    def test_diverged_trial_is_named(self, judged):
        """A diverged trial is an outcome that no mean may hide."""
        verdict = judged(shifted(0.05), states={("kept", 1): "diverged"})
        assert verdict.verdict == "undecided"
        assert verdict.reason.startswith("kept seed 1 diverged")
        assert 1 not in verdict.differences

    def test_baseline_that_learned_nothing(self, judged):
        """Below a baseline AP of 10 points differences mean nothing, whichever way they point."""
        low = [ap - 0.21 for ap in BASE]
        verdict = judged(shifted(0.05, base=low), base=low)
        assert verdict.verdict == "undecided"
        assert verdict.reason == "the baseline has not learned: AP 9.3 is below 10; train longer"

    def test_metric_without_a_value_is_named(self, judged):
        """A metric that cannot be scored leaves its pairs out, names them, and decides nothing."""
        verdict = judged(shifted(0.05), claims=(claim(metric="ar1"),))
        assert verdict.verdict == "undecided"
        assert verdict.reason.startswith("only 0 of 5 seeds have a score")
        assert "kept seed 0" in verdict.notes[0]
        assert verdict.notes[0].endswith("without ar1")

    def test_identical_variants_are_suspicious_not_equivalent(self, judged):
        """Differences of exactly 0 in every seed point to a toggle that does nothing, not to equivalence."""
        verdict = judged(list(BASE))
        assert verdict.verdict == "undecided"
        assert verdict.reason.startswith("the difference is the same in every seed")


class TestLooks:
    """Only planned looks decide, each at its own alpha."""

    def test_a_decided_claim_stays_decided(self, judged):
        """Later seeds that point the other way do not reopen a verdict, and the verdict says so."""
        kept = [*shifted(0.05), *shifted(-0.2, base=NEXT_BASE)]
        verdict = judged(kept, base=BASE + NEXT_BASE, looks_started=2)
        assert (verdict.verdict, verdict.look_seeds, verdict.n_pairs) == ("supported", 5, 5)
        assert "decided at the look of 5 seeds" in verdict.notes[-1]

    def test_an_undecided_claim_is_judged_at_the_next_look(self, judged):
        """The second look uses all ten seeds at its own alpha, and shows the sign-flip test as a check."""
        kept = [*shifted(0.03, scale=16), *shifted(0.035, base=NEXT_BASE, scale=2)]
        first = judged(kept, base=BASE + NEXT_BASE, looks_started=1)
        second = judged(kept, base=BASE + NEXT_BASE, looks_started=2)
        assert (first.verdict, first.look_seeds) == ("undecided", 5)
        assert (second.verdict, second.look_seeds, second.alpha, second.n_pairs) == ("supported", 10, 0.02, 10)
        assert second.notes[-1].startswith("exact sign-flip test: p = 0.00391")  # 4 of 1,024 patterns

    def test_an_incomplete_look_leaves_the_earlier_verdict(self, judged):
        """While the second look runs, the first one's verdict stands beside the progress."""
        kept, base = shifted(0.03, scale=16), BASE + NEXT_BASE[:2]
        verdict = judged(kept, base=base, looks_started=2)
        assert (verdict.verdict, verdict.look_seeds) == ("undecided", 5)
        assert verdict.notes == ("the look of 10 seeds is under way: 12 of 20 trials finished",)

    def test_undecided_by_width_plans_the_next_step(self, judged):
        """An interval that is too wide says what is still possible, the seeds needed, and the option that goes on."""
        verdict = judged(shifted(0.01, scale=15))
        assert verdict.seeds_needed == stats.seeds_needed(verdict.sd, 0.02, 0.02, pilot=5)
        assert f"about {verdict.seeds_needed} seeds are needed: --until-decided goes on to 10" in verdict.reason

    def test_no_promise_of_seeds_when_there_are_enough(self, judged):
        """A difference on the margin itself stays undecided with any number of seeds, and the reason says so."""
        verdict = judged(shifted(0.02), claims=(claim("equivalence"),), looks=((5, 0.05),))
        assert (verdict.verdict, verdict.seeds_needed) == ("undecided", None)
        assert "the difference probably lies close to the margin: plan a later look" in verdict.reason
        assert not verdict.more_seeds

    def test_what_the_reason_promises_is_done(self, judged):
        """Whenever the reason names --until-decided the claim goes on, also where fewer seeds should have sufficed."""
        wide, close = judged(shifted(0.01, scale=15)), judged(shifted(0.02), claims=(claim("equivalence"),))
        hopeless = judged(shifted(0.01, scale=200))
        assert [("--until-decided" in v.reason, v.more_seeds) for v in (wide, close, hopeless)] == [
            (True, True),
            (True, True),
            (False, False),
        ]


class TestCaveats:
    """What a reader must know besides the word."""

    def test_rising_curves_say_learns_faster(self, judged):
        """If a curve had not flattened, a supported claim is about speed."""
        verdict = judged(shifted(0.05), last_gain={"kept": 0.011})
        assert verdict.still_rising == ("kept",)
        assert verdict.reason.startswith("learns faster, not shown to be better")

    def test_flat_curves_do_not(self, judged):
        """A last epoch that gained less than half the margin counts as flat."""
        verdict = judged(shifted(0.05), last_gain={"kept": 0.009})
        assert verdict.still_rising == ()
        assert verdict.reason == "the whole interval lies above 0, and beyond the margin of 2 points"

    def test_mixed_provenance_is_marked(self, judged):
        """Trials from two versions of the code are compared, with a note."""
        notes = judged(shifted(0.05), code_hash={"kept": "0ther"}).notes
        assert notes == ("mixed provenance: the trials differ in code_hash",)

    @pytest.mark.parametrize(
        ("kernel", "notes"), [(None, ()), ("cpp", ("mixed provenance: the trials differ in kernel",))]
    )
    def test_a_detector_without_a_kernel_mixes_with_any(self, fake_results, kernel, notes):
        """Trials that sampled in another way carry a note; those that sample nothing, as Faster R-CNN, do not."""
        results = fake_results({"detached": list(BASE), "kept": shifted(0.05)})
        for trial in results.asked_for():
            if trial.variant == "kept":
                results.records[trial.trial_id].result["provenance"]["kernel"] = kernel
        (verdict,) = judge(results)
        assert verdict.notes == notes

    def test_a_trial_that_went_on_with_other_code_is_marked(self, fake_results):
        """A mix inside one trial shows, though its result has one hash as all others."""
        results = fake_results({"detached": list(BASE), "kept": shifted(0.05)})
        results.records["kept-3"].result["provenance"]["mixed"] = {"code_hash": ["0ld", "c0de"]}
        (verdict,) = judge(results)
        assert verdict.notes == ("mixed provenance: kept seed 3 (code_hash) did not end as it began",)

    def test_unlike_pairs_on_gpus_are_marked(self, fake_results):
        """On GPUs the trials of a seed share type, number of processes and precision; where not, the seed is named."""
        results = fake_results({"detached": list(BASE), "kept": shifted(0.05)})
        for record in results.records.values():
            if record.result:
                record.result["provenance"] |= {"device": "cuda", "gpu": "A100", "world_size": 1, "precision": "bf16"}
        assert judge(results)[0].notes == ()
        results.records["kept-1"].result["provenance"]["gpu"] = "H100"
        results.records["detached-4"].result["provenance"]["world_size"] = 2
        assert judge(results)[0].notes == (
            "mixed provenance: the trials differ in gpu and world_size",
            "unlike pairs: on GPUs the trials of seed 1 (gpu) and seed 4 (world_size) differ in more than the variants "
            "do",
        )

    def test_post_hoc_claims_are_marked(self, judged):
        """A claim registered after its trials finished carries the mark."""
        assert judged(shifted(0.05), post_hoc=("kept_better",)).post_hoc
        assert not judged(shifted(0.05)).post_hoc

    def test_family_shares_alpha_by_holm(self, fake_results):
        """In a family the clearest claim is tested at alpha over all, the next at alpha over those left."""
        aps = {
            "detached": list(BASE),
            "kept": shifted(0.05),
            "off": shifted(0.03, scale=9),
            "c": shifted(0.0, scale=30),
        }
        claims = tuple(claim(plus=name, family="f", identity=name) for name in ("off", "c", "kept"))
        verdicts = {verdict.claim: verdict for verdict in judge(fake_results(aps, claims=claims))}
        assert verdicts["kept"].alpha == pytest.approx(0.01)
        assert verdicts["off"].alpha == pytest.approx(0.015)
        assert "one of 3 claims of the family f" in verdicts["kept"].notes[0]
        alone = {v.claim: v for v in judge(fake_results(aps, claims=tuple(replace(c, family=None) for c in claims)))}
        assert {verdict.alpha for verdict in alone.values()} == {0.03}


calibration = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "calibration.py"))
REPETITIONS = 2000


def false_share(rule, *, delta, sd):
    """The share of false verdicts of a rule, over looks of five and ten seeds."""
    shares = calibration["simulate"](delta=delta, sd=sd, repetitions=REPETITIONS, seed=5, rule=calibration[rule])
    return calibration["false_share"](shares, delta=delta)


LIMIT = calibration["ALPHA"] + 3 * (0.05 * 0.95 / REPETITIONS) ** 0.5  # three Monte Carlo errors above .05


@pytest.mark.parametrize(("delta", "sd"), [(0.0, 2.0), (1.0, 0.6)])
def test_false_verdicts_stay_below_alpha(delta, sd):
    """At no difference, and at one of exactly the margin, both looks together are wrong in at most 5 %."""
    assert 0.005 < false_share("t_interval", delta=delta, sd=sd) < LIMIT


@pytest.mark.parametrize("rule", ["z_interval", "percentile_bootstrap"])
def test_wrong_rules_fail_the_same_test(rule):
    """The calibration test is able to fail: normal quantiles and resampled seeds break the limit clearly."""
    assert false_share(rule, delta=0.0, sd=2.0) > 1.5 * LIMIT


def test_importing_the_judge_loads_nothing_heavy():
    """Verdicts can be read without torch, ray, mlflow, scipy or statsmodels."""
    code = "import workbench.verdict, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "ray", "mlflow", "scipy", "statsmodels", "matplotlib"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
