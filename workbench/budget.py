"""What a run may spend: wall time for further looks, GPU-hours in all. Nothing here loads torch.

GPU-hours are counted over every attempt at a trial of the study at its profile, whatever plan asked for it and however
it ended, from the study's first registration on: what other studies had spent before is theirs. An attempt that has no
end counts up to now while it runs, else up to the last sign of it.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime

from workbench import attempts, siblings
from workbench.attempts import Attempt
from workbench.costs import Cost, Machine
from workbench.durable import stamp
from workbench.estimate import Estimate, estimate, kept
from workbench.labels import duration
from workbench.progress import share
from workbench.repeating import repeating
from workbench.search import own_name
from workbench.stopping import StopRequest
from workbench.store import Store
from workbench.study import Plan, PlannedTrial

WATCH_SECONDS = 5.0  # between looks at what was spent


def gpus_of(attempt: Attempt) -> float:
    """Return how many GPUs an attempt held, on all its nodes; 0 on a CPU."""
    return float(getattr(attempt, "gpus", 0.0))


def gpu_seconds(tried: Iterable[Attempt], *, until: float, since: float = 0.0) -> float:
    """Return GPUs times seconds of all attempts that began after `since`; one without an end counts up to `until`.

    Both are seconds since the epoch.
    """
    total = 0.0
    for attempt in tried:
        began = _moment(attempt.began_at)
        if began >= since:
            seconds = attempt.seconds if attempt.outcome is not None else max(0.0, until - began)
            total += gpus_of(attempt) * seconds
    return total


def _moment(time_: str) -> float:
    """Return a time of a record in seconds since the epoch; of one that cannot be read, that it has not come yet.

    So an attempt whose beginning is damaged counts by its seconds, and one without an end not at all.
    """
    try:
        return datetime.fromisoformat(time_).timestamp()
    except (ValueError, TypeError):
        return float("inf")


class Meter:
    """Sums the GPU time of a study at its profile; what has not changed since the last reading is not read again."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._folder, self._own = store, store.study_dir(plan).parent, set(plan.specs)
        self._settled: dict[str, tuple[object, float]] = {}  # of trials whose attempts have all ended

    def gpu_hours(self) -> float:
        """Return what was spent until now."""
        registered, _ = siblings.read_all(self._folder)  # again each time, since a search grows
        trials = {trial_id for item in registered for _, trial_id in item.trials} | self._own
        first = min((item.registered_at for item in registered), default=None)
        since = _moment(first) if first else 0.0
        since = since if math.isfinite(since) else 0.0  # of a damaged file: rather too much counts
        return sum(self._gpu_seconds(trial_id, since) for trial_id in trials) / 3600

    def _gpu_seconds(self, trial_id: str, since: float) -> float:
        folder = self._store.trial_dir(trial_id)
        changed = stamp(folder / "attempts")
        if changed is None:
            return 0.0
        known = self._settled.get(trial_id)
        if known is not None and known[0] == changed:
            return known[1]
        tried = attempts.read(folder)
        if not tried:
            return 0.0
        last = tried[-1]
        until = time.time() if last.running(folder) else attempts.last_sign(folder, last.number)
        found = gpu_seconds(tried, until=until, since=since)
        if last.outcome is not None:
            self._settled[trial_id] = (changed, found)
        return found


class Budget:
    """What one driver may spend on a plan, from what its trials are expected to cost."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        machine: Machine,
        gpu_hours: float | None,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.store, self._stop, self._say = plan, store, stop, say
        self.machine = machine
        cap = gpu_hours if gpu_hours is not None else plan.study.execution.gpu_hours
        self._limit = cap if machine.gpus else None  # GPU-hours in all
        self._meter = Meter(store, plan)
        self._told: set[int] = set()  # looks

    def expected(self) -> Estimate:
        """Return what is left to spend, as far as is known now."""
        return estimate(self.store.results_for(self.plan), self.machine)

    def look(self, number: int, *, budget_seconds: float | None) -> AbstractContextManager[None]:
        """Say, once, what a look will cost; the context keeps the estimate, and how long the look then took."""
        found = self.expected()
        cost = found.looks[number - 1]
        if number in self._told or cost.seconds is None or cost.low is None or cost.high is None or not cost.to_run:
            return nullcontext()
        self._told.add(number)
        hours = f", {cost.gpu_hours:.3g} GPU-hours" if cost.gpu_hours else ""
        self._say(
            f"Expected: {duration(cost.seconds)} ({duration(cost.low)} to {duration(cost.high)}){hours} for "
            f"{cost.to_run} trials, from {' and '.join(found.sources())}"
        )
        if budget_seconds is not None and cost.seconds > budget_seconds:
            self._say(
                f"Warning: that is more than the budget of {duration(budget_seconds)}; a look that was begun is "
                "finished, and no further one is started"
            )
        folder = self.store.study_dir(self.plan)
        return kept(folder, found, number, complete=lambda: not self.expected().looks[number - 1].to_run)

    def gpu_hours(self) -> float:
        """Return what was spent on the study at its profile until now, all attempts counted."""
        return self._meter.gpu_hours()

    def refuses_look(self, number: int, *, spent: float, budget_seconds: float | None) -> str | None:
        """Return why look `number` does not fit, into the wall time or below the cap of GPU-hours; None if it does.

        `spent` seconds of the wall time are gone. A look that has nothing left to run always fits.
        """
        cost = self.expected().looks[number - 1]
        if not cost.to_run:
            return None
        needs = cost.seconds or 0.0
        if budget_seconds is not None and spent + needs > budget_seconds:
            left = duration(max(0.0, budget_seconds - spent))
            text = f"The next look needs about {duration(needs)}, and {left} of the budget are left"
            return f"{text}: raise --budget to go on"
        hours, gone = cost.gpu_hours or 0.0, self._meter.gpu_hours()
        if self._limit is not None and gone + hours > self._limit:
            return f"The next look needs about {hours:.3g} GPU-hours, and {self._spent(gone)}. {_REMEDY}"
        return None

    def affordable(
        self, trials: tuple[PlannedTrial, ...], *, at_work: tuple[PlannedTrial, ...] = ()
    ) -> tuple[PlannedTrial, ...]:
        """Return the trials to start now, in order: those expected to end before the cap of GPU-hours.

        What those `at_work` still need is set aside first. While nothing is known of the cost, as many start as run at
        once. Where nothing is at work and not even the first fits, a stop is asked for and nothing is returned.
        """
        if self._limit is None or not trials:
            return trials
        spent, costs = self._meter.gpu_hours(), self.expected().costs
        if costs is None:
            first, free = 0.0, self.machine.at_once - len(at_work)
            chosen = trials[: max(0, free)] if spent < self._limit else ()
        else:
            taken = sum(self._gpu_hours_left(trial, costs) for trial in at_work)
            hours = [self._gpu_hours_left(trial, costs) for trial in trials]
            chosen, first = _fitting(trials, hours, self._limit - spent - taken), hours[0]
        if not chosen and not at_work:
            needs = f", and the next trial needs about {first:.3g}" if first else ""
            self._stop.limit(f"{self._spent(spent)}{needs}: no further trial is started. {_REMEDY}")
        return chosen

    def _gpu_hours_left(self, trial: PlannedTrial, costs: dict[str, Cost]) -> float:
        left = 1 - share(self.store.record(trial.trial_id))
        return costs[own_name(trial.variant)].seconds * left / 3600 * self.machine.gpus

    def passed(self) -> str | None:
        """Return why running trials are to stop: the cap is reached."""
        if self._limit is None:
            return None
        spent = self._meter.gpu_hours()
        return f"{self._spent(spent)}: the limit is reached. {_REMEDY}" if spent >= self._limit else None

    def _spent(self, spent: float) -> str:
        return f"{spent:.3g} of {self._limit:g} GPU-hours are spent, all attempts counted"


_REMEDY = "Raise it with --gpu-hours or execution.gpu_hours to go on"


def _fitting(trials: tuple[PlannedTrial, ...], hours: Sequence[float], left: float) -> tuple[PlannedTrial, ...]:
    count, total = 0, 0.0
    for needed in hours:
        total += needed
        if total > left:
            break
        count += 1
    return trials[:count]


def watching(checks: Sequence[Callable[[], str | None]], stop: StopRequest) -> AbstractContextManager[None]:
    """Ask for a stop in good order as soon as one of the checks gives a reason, or cannot tell, within the block."""

    def look() -> None:
        for check in checks:
            if (reason := check()) is not None:
                stop.limit(reason)

    def cannot_tell(error: Exception) -> None:  # a limit that nobody watches any more would be none
        stop.limit(f"the limits of this run cannot be watched ({type(error).__name__}: {error})")

    return repeating(look, every=WATCH_SECONDS, name="limits", on_error=cannot_tell)
