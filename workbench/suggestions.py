"""What a search tries next: a function of what is known, so the same records always lead to the same suggestion."""

import math
import random
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.study import Dimension, Search, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Known = tuple[dict[str, Value], float | None]
"""Values that were or are being tried, and their score; None while there is none."""

PATIENCE = 20  # suggestions that Optuna may repeat before chance takes its place


def check_method(search: Search) -> None:
    """Refuse a method whose package is missing.

    Raises:
        WorkbenchError: with the remedy.
    """
    if search.method == "optuna" and find_spec("optuna") is None:
        raise WorkbenchError("search.method optuna needs the package optuna: pip install optuna, or set it to random")


def suggest(search: Search, number: int, attempt: int, known: Sequence[Known]) -> dict[str, Value]:
    """Return what configuration `number` of a variant is to try.

    Random values depend on the number alone, so every variant gets the same ones. Optuna's depend on what is known of
    the variant, in the order of its configurations.

    Args:
        search: space and method.
        number: of the configuration, from 1.
        attempt: 0, and one more after each suggestion for this number that could not be used.
        known: the variant's earlier configurations.
    """
    if search.method == "random" or attempt >= PATIENCE:
        chance = random.Random(f"{number}/{attempt}")
        return {key: _draw(dimension, chance) for key, dimension in search.space.items()}
    return _by_optuna(search, number, attempt, known)


def _draw(dimension: Dimension, chance: random.Random) -> Value:
    if dimension.low is None or dimension.high is None:
        return chance.choice(dimension.values)
    low, high = dimension.low, dimension.high
    if dimension.whole and not dimension.log:
        return chance.randint(int(low), int(high))
    if not dimension.log:
        return chance.uniform(low, high)
    if not dimension.whole:
        return min(high, max(low, math.exp(chance.uniform(math.log(low), math.log(high)))))
    drawn = math.exp(chance.uniform(math.log(low - 0.5), math.log(high + 0.5)))
    return int(min(high, max(low, round(drawn))))


def _by_optuna(search: Search, number: int, attempt: int, known: Sequence[Known]) -> dict[str, Value]:
    import optuna  # a third of a second, and random searches need none

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: _distribution(dimension) for key, dimension in search.space.items()}
    sampler = optuna.samplers.TPESampler(
        seed=1000 * number + attempt,
        n_startup_trials=min(10, max(2, search.configurations // 3)),  # chosen by chance, before there is a model
        constant_liar=True,  # what runs at the same time is not to be suggested again
    )
    study = optuna.create_study(sampler=sampler, direction="maximize" if search.mode == "max" else "minimize")
    for values, score in known:
        if all(_contains(search.space[key], value) for key, value in values.items()):
            state = optuna.trial.TrialState.RUNNING if score is None else optuna.trial.TrialState.COMPLETE
            study.add_trial(optuna.trial.create_trial(state=state, value=score, params=values, distributions=space))
    return study.ask(fixed_distributions=space).params


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.low is None or dimension.high is None:
        return CategoricalDistribution(dimension.values)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _contains(dimension: Dimension, value: Any) -> bool:
    """Tell whether a value, as a variant's own settings have it, lies in the space."""
    if dimension.low is None or dimension.high is None:
        return any(value == item and isinstance(value, bool) is isinstance(item, bool) for item in dimension.values)
    return isinstance(value, int | float) and dimension.low <= value <= dimension.high
