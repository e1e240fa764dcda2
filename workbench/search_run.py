"""Run a search: bring every configuration to its end, suggesting the next ones by what is known, and report the best.

Where trials run inline, configurations are tried one after another, variant by variant in turn, so the same study file
always tries the same ones. Under Ray as many run as there are slots, and Ray Tune's ASHA may end bad ones early.
"""

from collections.abc import Iterable
from typing import Any

from workbench import gate
from workbench.budget import watching
from workbench.driving import Run
from workbench.errors import LIMIT_REACHED, WorkbenchError
from workbench.labels import METRICS, POINTS
from workbench.search import Configuration, Tried
from workbench.search_report import told
from workbench.searching import Searching
from workbench.study import PlannedTrial


class SearchRun(Run):
    """One driver's work on a plan that searches."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.found = Searching(self.plan, self.store, self.ref)
        self.study = self.plan.study
        if self.options.executor == "inline" and self.found.search.scheduler == "asha":
            raise WorkbenchError(
                f"{self.study.path}: asha compares trials that run side by side, and --executor inline runs one after "
                "another: leave it out, or set search.scheduler to fifo"
            )

    def require_gate(self) -> None:
        """Refuse a dear search that has no passed gate; a complete one needs none."""
        if not self.found.complete():
            gate.require(self.budget, self.options, say=self.say)

    def looks(self) -> int:
        """Try every configuration; return the exit code."""
        self.store.start_look(self.ref, 1)
        if not self.found.complete():
            self.found.save()  # also the variants' own settings are on record before they are tried
            self._say_search()
            with self.budget.look(1, budget_seconds=self.budget_seconds):
                if self.options.executor == "inline":
                    self._one_after_another()
                else:
                    self._side_by_side()
        self.plan = self.found.plan()
        self.found.save()
        if self.stop.signal is not None:
            return 128 + self.stop.signal
        if self.stop.reason is not None:
            return LIMIT_REACHED
        return 0 if self.found.complete() else 1

    def _one_after_another(self) -> None:
        position = 0
        while not self.stop.requested():
            if position == len(self.found.configurations) and self.found.next() is None:
                return
            configuration = self.found.configurations[position]
            position += 1
            trial = self.found.planned(configuration)
            self.plan = self.found.plan()
            if not self._over(trial):
                self._complete(1, (trial,))
                self.found.save()
                self._say_tried(trial.trial_id)
                if self._hopeless():
                    return

    def _side_by_side(self) -> None:
        """Let the executor ask for configurations until there are no more."""
        from workbench import ray_executor  # noqa: F401 - before MLflow, whose import would hold Ray's up

        self.searching = self.found
        self.found.on_end, self.found.may_begin = self._say_tried, self._may_begin
        trials = self._left()
        self.house.prepare(self.plan, trials, at_once=self._slots())
        self.mirror.start()
        checks = (self.budget.passed, gate.watch(self.budget, without_gate=self.options.without_gate, say=self.say))
        room = self.house.watching(self._stop_for_disk)
        with watching(checks, self.stop), room, self.stop.gently():
            while trials and not self.stop.requested():
                if self.stop.paused():
                    self._wait_out_pause()
                elif not self._execute(trials) or self._hopeless():
                    break
                trials = self._left()
        self.tried.update(item.trial_id for item in self.found.configurations)

    def _left(self) -> tuple[PlannedTrial, ...]:
        """Return the configurations to go on with or to wait for; where there is none, a new one."""
        trials = self._all()
        running = tuple(trial for trial in trials if self.store.state(trial.trial_id) == "running")
        left = (*self._candidates(trials), *running)
        return left or (self._candidates(self._all()) if self.found.next() else ())

    def _hopeless(self) -> bool:
        """Tell whether no configuration could take a step, and say so: the next ones would fail as well."""
        begun = any(self.store.record(item.trial_id).step for item in self.found.configurations)
        if begun or self.stop.requested() or self.stop.paused():
            return False
        printed = f"; what was printed: {self.ref.path / 'ray'}" if self.searching else ""
        self.say(f"No configuration could take a step, so no other one is begun{printed}")
        return True

    def _all(self) -> tuple[PlannedTrial, ...]:
        """Return every configuration suggested so far; the plan grows with them."""
        self.plan = self.found.plan()
        return self.plan.trials

    def _over(self, trial: PlannedTrial) -> bool:
        return super()._over(trial) or self.found.was_stopped(trial.trial_id)

    def _may_begin(self, configuration: Configuration, at_work: Iterable[Configuration]) -> bool:
        """Tell whether a configuration is expected to end below the cap of GPU-hours, as others do that are at work."""
        self.plan = self.found.plan()
        trial, *others = map(self.found.planned, (configuration, *at_work))
        return self._over(trial) or bool(self.budget.affordable((trial,), at_work=tuple(others)))

    def _record_lost(self, trials: tuple[PlannedTrial, ...]) -> None:  # noqa: ARG002 - more were suggested meanwhile
        super()._record_lost(tuple(trial for trial in self._all() if not self._over(trial)))

    def _say_start(self, number: int, trials: tuple[PlannedTrial, ...]) -> None:
        """Say nothing of a single configuration: `_say_search` has said what is going on."""

    def _say_search(self) -> None:
        search, over = self.found.search, sum(item.over for item in self.found.tried())
        self.say(
            f"{self.study.name} ({self.study.profile}): a search ({search.method}, {search.scheduler}) of "
            f"{search.configurations} configurations for each of {len(self.found.variants)} variants, {over} already "
            f"over; {self._slots()} at once on {self.resources.device}"
        )
        self._say_pages()

    def _say_tried(self, trial_id: str) -> None:
        """Say what has become of a configuration."""
        tried = self.found.tried()
        item = next(item for item in tried if item.trial_id == trial_id)
        over = sum(other.over or other.trial_id in self.found.ending for other in tried)
        fate = _fate(item, self.found.search.metric, ending=trial_id in self.found.ending)
        line = f"{item.variant} {item.number}: {fate}; {told(item.values)} "
        self.say(f"{line}({over} of {self.found.total} over)")


def _fate(item: Tried, metric: str, *, ending: bool) -> str:
    label = METRICS.get(metric, metric)
    if item.score is not None:
        return f"{label} {POINTS * item.score:.1f}"
    if (item.stopped or ending) and item.last_score is not None:
        return f"stopped at epoch {item.epochs}, {label} {POINTS * item.last_score:.1f}"
    return item.state
