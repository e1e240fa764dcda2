"""What a plan will cost, look by look: wall time, GPU-hours and disk. Loads without torch.

`workbench.costs` says what one trial costs and where that is known from. The estimate that a run began with is kept
beside the plan with the time that it then took, so that a report can say how good it was.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench import durable
from workbench.costs import Cost, Machine, trial_costs
from workbench.labels import duration
from workbench.progress import share
from workbench.records import StudyResults
from workbench.search import own_name, own_variants, was_stopped
from workbench.store import Store
from workbench.study import PlannedTrial

START_SECONDS = 10.0  # until the first trial trains, where no run is on record: docs/benchmarks.md
DONE = ("finished", "diverged")


@dataclass(frozen=True, kw_only=True, slots=True)
class LookCost:
    """To the end of a look or search, from what is on record now; None where nothing is known of a trial's cost."""

    seeds: int
    trials: int
    reused: int
    to_run: int
    seconds: float | None
    low: float | None
    high: float | None
    gpu_hours: float | None
    disk_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Of a plan. `costs` by variant, None where no source is there."""

    machine: Machine
    start_seconds: float
    costs: dict[str, Cost] | None
    looks: tuple[LookCost, ...]

    def sources(self) -> tuple[str, ...]:
        """Return where the numbers come from, each source once."""
        return tuple(dict.fromkeys(cost.source for cost in (self.costs or {}).values()))


def estimate(results: StudyResults, machine: Machine) -> Estimate:
    """Estimate every look of a plan from what is on record.

    A search is one look of all configurations that it will try, each as if none were ended early.
    """
    costs = trial_costs(results, machine)
    start = _start_seconds(results)
    looks: list[LookCost] = []
    before: set[str] = set()
    wall = Wall(0.0, 0.0, 0.0)
    gpu_seconds, disk = 0.0, 0
    to_suggest = _to_suggest(results)
    for look in results.plan.study.looks[: None if results.plan.study.search is None else 1]:
        trials = results.plan.at_look(look)
        ids = {trial.trial_id for trial in trials}
        outstanding = _outstanding(results, trials)
        new = {trial_id: variant for trial_id, variant in outstanding.items() if trial_id not in before}
        before |= new.keys()
        if costs is not None and (new or to_suggest):
            left = [(costs[variant], 1 - share(results.records[trial_id])) for trial_id, variant in new.items()]
            left += [(costs[variant], 1.0) for variant in to_suggest]
            wall += _wall(left, machine.at_once, start)
            gpu_seconds += sum(cost.seconds * part for cost, part in left) * machine.gpus
            disk += sum(int((cost.disk_bytes or 0) * part) for cost, part in left)
        looks.append(
            LookCost(
                seeds=look.seeds,
                trials=len(ids) + len(to_suggest),
                reused=len(ids) - len(outstanding),
                to_run=len(outstanding) + len(to_suggest),
                seconds=None if costs is None else wall.seconds,
                low=None if costs is None else wall.low,
                high=None if costs is None else wall.high,
                gpu_hours=None if costs is None else gpu_seconds / 3600,
                disk_bytes=None if costs is None or any(c.disk_bytes is None for c in costs.values()) else disk,
            )
        )
    return Estimate(machine=machine, start_seconds=start, costs=costs, looks=tuple(looks))


@dataclass(frozen=True, slots=True)
class Wall:
    """Wall seconds with their range."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: "Wall") -> "Wall":
        return Wall(self.seconds + other.seconds, self.low + other.low, self.high + other.high)


def _wall(left: Sequence[tuple[Cost, float]], slots: int, start: float) -> Wall:
    return Wall(
        start + makespan([cost.seconds * part for cost, part in left], slots),
        start + makespan([cost.low * part for cost, part in left], slots),
        start + makespan([cost.high * part for cost, part in left], slots),
    )


def makespan(lengths: Iterable[float], slots: int) -> float:
    """Return when the last trial ends, if each begins in the order given as soon as a slot is free."""
    free = [0.0] * max(1, slots)
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def _outstanding(results: StudyResults, trials: Sequence[PlannedTrial]) -> dict[str, str]:
    """Return the trials that are still to be run, in order, each with the first variant that asks for it."""
    found: dict[str, str] = {}
    for trial in trials:
        record = results.records[trial.trial_id]
        if record.state not in DONE and not was_stopped(record, results.plan.plan_hash):
            found.setdefault(trial.trial_id, own_name(trial.variant))
    return found


def _to_suggest(results: StudyResults) -> list[str]:
    """Return the variant of each configuration that a search has still to suggest; nothing for another study."""
    search = results.plan.study.search
    if search is None:
        return []
    known = Counter(own_name(trial.variant) for trial in results.plan.trials)
    return [
        variant.name
        for variant in own_variants(results.plan)
        for _ in range(search.configurations - known[variant.name])
    ]


def _start_seconds(results: StudyResults) -> float:
    """Return how long the last run of this study and profile took until its first trial trained."""
    folder = Store(results.runs, create=False).study_dir(results.plan).parent
    for path in sorted(folder.glob("*/last_run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return float((durable.read_json(path) or {})["start"])
        except durable.UNUSABLE:
            continue
    return START_SECONDS


# What became of it


KEPT_CALLS = 50  # in estimate.json, the newest


@contextmanager
def kept(folder: Path, found: Estimate, number: int, *, complete: Callable[[], bool]) -> Iterator[None]:
    """Keep the estimate of look `number`, 1 being the first, beside the plan, and at the block's end what it took.

    Nothing is kept where nothing was known. A driver that is stopped before the look is `complete`, or is killed,
    leaves an estimate without an end: it was of more than was done.
    """
    look = found.looks[number - 1]
    if look.seconds is None or not look.to_run:
        yield
        return
    path = folder / "estimate.json"
    entry: dict[str, Any] = {
        "look": number,
        "made_at": durable.now(),
        **asdict(look),
        "at_once": found.machine.at_once,
        "sources": list(found.sources()),
        "took_seconds": None,
    }
    earlier = calls(folder)[-KEPT_CALLS + 1 :]
    durable.write_json(path, {"calls": [*earlier, entry]})
    began = time.monotonic()
    yield
    if complete():
        durable.write_json(path, {"calls": [*earlier, entry | {"took_seconds": time.monotonic() - began}]})


def calls(folder: Path) -> list[dict[str, Any]]:
    """Return the estimates kept in a plan's folder, oldest first."""
    found = (durable.read_json(folder / "estimate.json") or {}).get("calls")
    return [call for call in found if isinstance(call, dict)] if isinstance(found, list) else []


def errors(results: StudyResults) -> list[str]:
    """Return one line for each look of which both the estimate and the time that it took are kept, its last run's."""
    folder = Store(results.runs, create=False).study_dir(results.plan)
    lines: dict[int, str] = {}
    for call in calls(folder):
        with suppress(*durable.UNUSABLE, ZeroDivisionError):
            if call["took_seconds"] is not None:
                what = f"look {call['look']}" if results.plan.study.search is None else "the search"
                lines[int(call["look"])] = f"{what}: {_line(call)}"
    return [line for _, line in sorted(lines.items())]


def _line(call: dict[str, Any]) -> str:
    return (
        f"estimated {duration(call['seconds'])} for {call['to_run']} trials from "
        f"{' and '.join(call['sources'])}, took {duration(call['took_seconds'])}: "
        f"{_error(call['seconds'], call['took_seconds'])}"
    )


def _error(estimated: float, took: float) -> str:
    share_off = round(100 * (took - estimated) / estimated)
    return f"{abs(share_off)} % {'more' if share_off > 0 else 'less'}" if share_off else "as estimated"
