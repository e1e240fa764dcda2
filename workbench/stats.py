"""The statistics behind verdicts: arrays in, named results out. Formulas and reasons are in `docs/statistics.md`.

Everything is about paired differences: one number for each seed, in the metric's unit. Quantiles come from
`scipy.special`; `scipy.stats`, `scipy.optimize` and statsmodels take longer to load than `plan` may take to answer, so
only a judgement imports what it needs of them, on first use.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POWER = 0.8  # the chance of a verdict that a plan asks for
MOST_SEEDS = 200  # beyond this, "more seeds" is no advice
NO_SPREAD = 1e-12  # differences closer than this are equal up to rounding
_FEWEST_SIGN_FLIPS = 6  # below, the smallest two-sided p, 2 / 2**n, exceeds .05
_EXACT_SIGN_FLIPS = 2**14  # all of them up to fourteen seeds, a random sample beyond
_FLIPS_AT_ONCE = 2**20  # signs, of all flips of a batch: with a thousand seeds all at once would take a gigabyte


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean of paired differences with its t intervals.

    `low`, `high`: two-sided at level 1 - alpha. `inner_low`, `inner_high`: the pair of one-sided bounds, each at level
    1 - alpha, that decides equivalence. `p_value` is two-sided against 0, None when the differences are all equal.
    """

    estimate: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    sd: float
    n: int
    p_value: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reachable:
    """What a number of seeds can show with 80 % probability, in the unit of the sd it was computed from."""

    effect: float  # smallest true difference whose interval excludes 0
    equivalence_margin: float  # smallest margin that the interval stays within when the true difference is 0


def paired_interval(differences: Sequence[float], *, alpha: float) -> Interval:
    """Return the t intervals of the mean of paired differences.

    Raises:
        ValueError: with fewer than two differences, or alpha outside (0, .5).
    """
    from scipy import special

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two paired differences, got {len(values)}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha {alpha} is not between 0 and .5")
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    if float(np.ptp(values)) <= NO_SPREAD:
        return Interval(
            estimate=mean, low=mean, high=mean, inner_low=mean, inner_high=mean, sd=0.0, n=len(values), p_value=None
        )
    error, freedom = sd / math.sqrt(len(values)), len(values) - 1
    outer, inner = _t_quantile(1 - alpha / 2, freedom) * error, _t_quantile(1 - alpha, freedom) * error
    return Interval(
        estimate=mean,
        low=mean - outer,
        high=mean + outer,
        inner_low=mean - inner,
        inner_high=mean + inner,
        sd=sd,
        n=len(values),
        p_value=2 * float(special.stdtr(freedom, -abs(mean) / error)),
    )


def reachable(n: int, sd: float, alpha: float) -> Reachable:
    """Return what `n` seeds can show with 80 % probability when paired differences have standard deviation `sd`.

    The answer is rounded up to a ten-thousandth of `sd`.
    """

    def smallest(chance: Callable[[int, float, float], float]) -> float:
        steps = bisect.bisect_left(range(10**9), POWER, key=lambda step: chance(n, step / 10_000, alpha))
        return sd * steps / 10_000

    return Reachable(effect=smallest(direction_power), equivalence_margin=smallest(equivalence_power))


def seeds_needed(
    sd: float, margin: float, alpha: float, *, pilot: int | None = None, equivalence: bool = False
) -> int | None:
    """Return the fewest seeds that give 80 % power at the margin, or None when that takes more than 200.

    Power is the chance that a true difference of `margin` is found; with `equivalence`, that a true difference of 0 is
    shown to be smaller than `margin`. `pilot` is the number of seeds that `sd` was estimated from: the plan then uses
    the one-sided 80 % upper limit of the true sd, since half of all pilots underestimate it.
    """
    if pilot is not None:
        sd *= math.sqrt((pilot - 1) / _chi2_quantile(np.asarray(1 - POWER), pilot - 1))
    chance = equivalence_power if equivalence else direction_power
    size = margin / max(sd, NO_SPREAD)
    seeds = range(2, MOST_SEEDS + 1)
    index = bisect.bisect_left(seeds, POWER, key=lambda n: chance(n, size, alpha))
    return seeds[index] if index < len(seeds) else None


def direction_power(n: int, effect: float, alpha: float) -> float:
    """Return the chance that the interval lies above 0 when the true difference is `effect` standard deviations."""
    from scipy import special

    return float(np.mean(special.ndtr(effect * math.sqrt(n) - _t_quantile(1 - alpha / 2, n - 1) * _spreads(n))))


def equivalence_power(n: int, margin: float, alpha: float) -> float:
    """Return the chance that the inner interval lies within `margin` standard deviations when the truth is 0."""
    from scipy import special

    room = margin * math.sqrt(n) - _t_quantile(1 - alpha, n - 1) * _spreads(n)
    return float(np.mean(2 * special.ndtr(np.maximum(room, 0)) - 1))


def _spreads(n: int) -> NDArray[np.float64]:
    """Return (2000,) equally likely values of a sample's sd over the true one.

    The sample's mean and sd are independent, so a chance given the sd, averaged over these, is the chance itself. That
    stays exact at two to five seeds, where the noncentral t of scipy, which statsmodels' power uses, turns into NaN.
    """
    return np.sqrt(_chi2_quantile((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1))


def _t_quantile(probability: float, freedom: int) -> float:
    from scipy import special

    return float(special.stdtrit(freedom, probability))


def _chi2_quantile(probability: NDArray[np.float64], freedom: int) -> NDArray[np.float64]:
    from scipy import special

    return 2 * special.gammaincinv(freedom / 2, probability)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of the exact sign-flip test, or None below six pairs, where it cannot fall to .05."""
    from scipy import stats

    if len(differences) < _FEWEST_SIGN_FLIPS:
        return None
    test = stats.permutation_test(
        (np.asarray(differences, dtype=float),),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=_EXACT_SIGN_FLIPS,
        vectorized=True,
        batch=max(1, _FLIPS_AT_ONCE // len(differences)),
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return Holm's adjusted p values of one family, in the order given."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return ()
    _, adjusted, _, _ = multipletests(list(p_values), method="holm")
    return tuple(float(p) for p in np.asarray(adjusted))
