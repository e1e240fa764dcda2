"""How often the verdict rule is wrong: simulated studies with a known true difference.

    python benchmarks/calibration.py [--repetitions 5000]

Paired differences are drawn in units of the margin, the looks are those of the laptop profile, and the rule is the one
that judges real studies. A verdict is false when it contradicts the truth: a direction at difference 0, the opposite
direction or "equivalent" at a difference of the margin or more. Ways in common use go through the same simulation.
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy import stats as scipy_stats

from workbench import stats
from workbench.verdict import decide

LOOKS = ((5, 0.03), (10, 0.02))
Looks = tuple[tuple[int, float], ...]  # seeds and alpha of each
ALPHA = sum(alpha for _, alpha in LOOKS)
PEEKING = tuple((seeds, 0.05) for seeds in range(5, 11))
WORDS = ("supported", "refuted", "equivalent", "undecided")
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {  # mean 0, standard deviation 1
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy": lambda rng, shape: rng.standard_t(4, shape) / np.sqrt(2),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
}
IntervalRule = Callable[[np.ndarray, float], stats.Interval]


def t_interval(differences: np.ndarray, alpha: float) -> stats.Interval:
    """The workbench's own."""
    return stats.paired_interval(differences, alpha=alpha)


def z_interval(differences: np.ndarray, alpha: float) -> stats.Interval:
    """Mean plus or minus normal quantiles: treats the noise as known."""
    outer, inner = scipy_stats.norm.ppf([1 - alpha / 2, 1 - alpha])
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
    return _interval(differences, mean + error * np.array([-outer, outer, -inner, inner]))


def percentile_bootstrap(differences: np.ndarray, alpha: float) -> stats.Interval:
    """Quantiles of the means of resampled seeds: what most plotting libraries draw."""
    rng = np.random.default_rng(len(differences))
    means = differences[rng.integers(len(differences), size=(400, len(differences)))].mean(axis=1)
    return _interval(differences, np.quantile(means, [alpha / 2, 1 - alpha / 2, alpha, 1 - alpha]))


def _interval(differences: np.ndarray, bounds: np.ndarray) -> stats.Interval:
    low, high, inner_low, inner_high = bounds
    return stats.Interval(
        estimate=differences.mean(), low=low, high=high, inner_low=inner_low, inner_high=inner_high,
        sd=differences.std(ddof=1), n=len(differences), p_value=np.nan,
    )  # fmt: skip


def simulate(
    *,
    delta: float,
    sd: float,
    repetitions: int,
    seed: int,
    rule: IntervalRule = t_interval,
    noise: str = "normal",
    looks: Looks = LOOKS,
) -> dict[str, float]:
    """Return the share of each word for a superiority claim; `delta` and `sd` in margins, `noise` a name of NOISE."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(WORDS, 0)
    for differences in delta + sd * NOISE[noise](rng, (repetitions, LOOKS[-1][0])):
        word = "undecided"
        for seeds, alpha in looks:
            word = decide("superiority", rule(differences[:seeds], alpha), 1.0)
            if word != "undecided":
                break
        counts[word] += 1
    return {word: count / repetitions for word, count in counts.items()}


def false_share(shares: dict[str, float], *, delta: float) -> float:
    """Return the share of verdicts that contradict a true difference of `delta` margins, 0 or at least 1."""
    return shares["refuted"] + (shares["supported"] if delta == 0 else shares["equivalent"])


def main() -> None:
    """Print the table of `docs/statistics.md`, in percent."""
    parser = argparse.ArgumentParser(description="False verdicts of the rule, by simulation.")
    parser.add_argument("--repetitions", type=int, default=5000)
    repetitions = parser.parse_args().repetitions
    print("| rule | sd / margin | truth 0: false | equivalent | truth = margin: false | supported |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, rule, noise, looks in (
        ("the rule: t intervals, two looks", t_interval, "normal", LOOKS),
        ("the rule, heavy-tailed noise", t_interval, "heavy", LOOKS),
        ("the rule, one-sided skewed noise", t_interval, "skewed", LOOKS),
        ("t intervals, a look at .05 after every seed", t_interval, "normal", PEEKING),
        ("normal intervals", z_interval, "normal", LOOKS),
        ("percentile bootstrap", percentile_bootstrap, "normal", LOOKS),
    ):
        for sd in (0.5, 1.0, 2.0):
            none, margin = (
                simulate(delta=delta, sd=sd, repetitions=repetitions, seed=17, rule=rule, noise=noise, looks=looks)
                for delta in (0.0, 1.0)
            )
            shown = (
                false_share(none, delta=0.0), none["equivalent"],
                false_share(margin, delta=1.0), margin["supported"],
            )  # fmt: skip
            print(f"| {name} | {sd:g} | " + " | ".join(f"{100 * share:.1f}" for share in shown) + " |", flush=True)


if __name__ == "__main__":
    main()
