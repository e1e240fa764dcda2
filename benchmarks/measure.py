"""Measuring side by side: every round runs each candidate once, so that a busy machine disturbs all alike.

What counts is the CPU time of the process; wall time beside it shows whether others were at work.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each round: CPU time of the process, and wall time."""

    cpu: tuple[float, ...]
    wall: tuple[float, ...]


def interleaved(candidates: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1) -> dict[str, Times]:
    """Run every candidate once a round, in turn; the first `warm_up` rounds do not count."""
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, run in candidates.items():
            began = time.process_time(), time.perf_counter()
            run()
            ended = time.process_time(), time.perf_counter()
            if number >= warm_up:
                cpu[name].append(ended[0] - began[0])
                wall[name].append(ended[1] - began[1])
    return {name: Times(tuple(cpu[name]), tuple(wall[name])) for name in candidates}


def spread(values: Sequence[float], *, unit: float = 1e-3, digits: int = 1) -> str:
    """Return `median (min-max)` in units of `unit` seconds."""
    middle, low, high = (f"{value / unit:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def ratio(slower: Times, faster: Times) -> str:
    """Return how many times faster: the median over rounds of the ratio within a round, with the least and greatest."""
    ratios = [one / other for one, other in zip(slower.cpu, faster.cpu, strict=True)]
    return f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
