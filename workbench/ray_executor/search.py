"""A search under Ray Tune: configurations side by side, and ASHA, which ends the worse ones early.

Tune's searcher here only hands out what `workbench.searching` suggests, which is on record before its trial begins; the
scheduler is Tune's own ASHA, one for each variant. Neither is the record: a new driver shows ASHA the epochs of earlier
trials again, from their events, and so goes on where the last one was.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from workbench.execution import Job
from workbench.ray_executor import several
from workbench.ray_executor.orphans import end_with_raylet
from workbench.ray_executor.tuner import GRACE_SECONDS, StopWhenAsked, per_trial, run_config, trial_name
from workbench.records import TrialRecord
from workbench.search import Configuration, epoch_scores, expanded, final_score, read, was_stopped, worst_score
from workbench.searching import Searching
from workbench.slots import Slot, Task, task_for
from workbench.store import Store
from workbench.study import Plan, TrialSpec
from workbench.trial import complete, execute
from workbench.trial_files import STOPPED_FILE

REDUCTION = 3
"""Of so many configurations ASHA lets the best go on, at the epochs 1, 3, 9, ..."""

_SCORE, _EPOCH = "score", "epoch"  # what Tune is told of a trial
_POLL_SECONDS = 0.1


def search(job: Job, searching: Searching, folder: Path) -> None:
    """Try every configuration that is not over; returns when all have ended or a stop was asked."""
    asha = searching.search.scheduler == "asha"
    over = {item.trial_id for item in searching.tried() if item.over}
    known = [item for item in searching.configurations if asha or item.trial_id not in over]
    num_new = searching.total - len(searching.configurations)
    task = task_for(
        job, logs=folder, trainer=several.trainer_for(job.resources.demand, job), work=_execute, stop=job.stop.path
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_Actor, task=task, plan=searching.base), per_trial(job)),
        tune_config=tune.TuneConfig(
            search_alg=_Source(searching, known, stopping=job.stop.path.exists),
            scheduler=_Asha(searching) if asha else FIFOScheduler(),
            num_samples=len(known) + num_new,
            max_concurrent_trials=job.resources.concurrency,
            reuse_actors=True,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=run_config(job, folder, stop=_StopSearch(job, searching.folder)),
    )
    tuner.fit()


class _Unkept:
    """Tune pickles what it is given, to restore it some day, which never happens here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Source(_Unkept, Searcher):
    """Hands out the configurations that are known, then new ones, in the order of their numbers."""

    def __init__(self, searching: Searching, known: list[Configuration], *, stopping: Callable[[], bool]) -> None:
        super().__init__()  # without a metric: Tune would insist on one of a trial that failed or was interrupted
        self._searching, self._waiting, self._stopping = searching, list(known), stopping
        self._given: dict[str, Configuration] = {}  # and are at work, by Tune's own id of a trial
        self._has_begun = self._hopeless = False

    def suggest(self, trial_id: str) -> Any:
        found = None if self._over() else self._next()
        if found is None:  # told None where nothing is at work, Tune would go on asking for ten minutes
            return Searcher.FINISHED if self._over() else None
        self._given[trial_id] = found
        return asdict(found)

    def _next(self) -> Configuration | None:
        if not self._waiting and (new := self._searching.next()):
            self._waiting.append(new)
        if self._waiting and self._searching.may_begin(self._waiting[0], self._given.values()):
            return self._waiting.pop(0)
        return None

    def _over(self) -> bool:
        """Tell whether nothing more is to begin."""
        return self._hopeless or self._stopping()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn nothing from Tune: the records say it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - as Tune's
        ended = self._given.pop(trial_id, None)
        if ended is None:  # Tune tells of some ends twice
            return
        self._searching.save()
        self._searching.on_end(ended.trial_id)
        self._has_begun |= self._searching.store.record(ended.trial_id).step > 0
        self._hopeless |= not self._has_begun  # the others would fail as well

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: `search.json` and the records are what a new driver goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """There is nothing to restore."""


class _Asha(_Unkept, FIFOScheduler):
    """Tune's ASHA for each variant by itself: a variant competes with no other one for its budget."""

    def __init__(self, searching: Searching) -> None:
        super().__init__()
        self._searching = searching
        self._of = {
            name: ASHAScheduler(
                time_attr=_EPOCH,
                metric=_SCORE,
                mode=searching.search.mode,
                max_t=variant.config.training.epochs,
                grace_period=1,
                reduction_factor=REDUCTION,
            )
            for name, variant in searching.variants.items()
        }

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:  # noqa: ARG002 - Tune's signature
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of[trial.config["variant"]].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = self._of[trial.config["variant"]].on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP and not result.get("done"):
            self._searching.stop(trial.config["trial_id"], epoch=result[_EPOCH])
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of[trial.config["variant"]].on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of[trial.config["variant"]].on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return "\n".join(f"{name}: {scheduler.debug_string()}" for name, scheduler in self._of.items())


class _StopSearch(StopWhenAsked):
    """Knows the trials from search.json, which grows."""

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(job)
        self._folder = folder

    def stop_all(self) -> bool:
        if self._stop_file.exists():
            self._trial_ids = [item.trial_id for item in read(self._folder)]
        return super().stop_all()


def _execute(spec: TrialSpec, *, runs: Path, stop: Path, **arguments: Any) -> Any:
    """Run a trial until its driver, or ASHA, wants it to end."""
    files = (stop, Store(runs).trial_dir(spec.trial_id) / STOPPED_FILE)
    return execute(spec, runs, should_stop=lambda: any(path.exists() for path in files), **arguments)


class _Actor(tune.Trainable):
    """Runs a trial beside itself and tells Tune of each of its epochs, so that ASHA can end it."""

    def setup(self, config: dict[str, Any], *, task: Task | None = None, plan: Plan | None = None) -> None:
        assert task is not None  # always given, both; Tune's own signature has only the config
        assert plan is not None
        end_with_raylet()
        self._task, self._plan, self._store = task, plan, Store(task.runs)
        self._slot: Slot | None = None  # which takes seconds to make, and what is only told again needs none
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if not self._left():
            return False  # by which Tune gives the next trial to a new actor
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Return the score of the next epoch; of the last one, that of all pictures at the end."""
        if not self._begun:
            self._begin()
        while True:
            ended = self._thread is None or not self._thread.is_alive()  # asked before its epochs are read
            record = self._store.record(self._spec.trial_id)
            scores = epoch_scores(record, self._spec.config, self._search)
            last = record.epochs[-1].epoch if record.epochs and record.step == record.total_steps else None
            if new := [epoch for epoch in scores if epoch > self._told and epoch != last]:
                self._told = min(new)
                return {_SCORE: scores[self._told], _EPOCH: self._told}
            if self._raised:
                raise self._raised.pop()
            if ended and record.state != "running":  # it may run under another driver
                return self._last_word(record)
            time.sleep(_POLL_SECONDS)

    def cleanup(self) -> None:
        self._left()
        if self._slot is not None:
            self._slot.close()

    def _take(self, config: dict[str, Any]) -> None:
        """Take a configuration on."""
        configuration = Configuration(**{name: config[name] for name in Configuration.__dataclass_fields__})
        plan = expanded(self._plan, [configuration])
        assert plan.study.search is not None  # its driver has looked
        self._search = plan.study.search
        self._spec = plan.specs[configuration.trial_id]
        self._trial = next(trial for trial in plan.trials if trial.trial_id == configuration.trial_id)
        self._stopped = self._store.trial_dir(configuration.trial_id) / STOPPED_FILE
        self._thread: threading.Thread | None = None
        self._raised: list[BaseException] = []
        self._begun, self._told = False, 0

    def _begin(self) -> None:
        """Start what is left to do, which is nothing of a trial that is over or that this search has stopped before."""
        self._begun = True
        record = self._store.record(self._spec.trial_id)
        if complete(record, self._spec) or was_stopped(record, self._plan.plan_hash):
            return
        self._stopped.unlink(missing_ok=True)  # of another search
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._slot = self._slot or Slot(self._task)
            self._slot.run(self._spec)
        except BaseException as error:  # noqa: BLE001 - `step` raises it where Tune sees it
            self._raised.append(error)

    def _left(self) -> bool:
        """Wait until a trial that is told to end has written its checkpoint; return whether none is at work."""
        if self._thread is not None and (self._stopped.exists() or self._task.stop.exists()):
            self._thread.join(GRACE_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def _last_word(self, record: TrialRecord) -> dict[str, Any]:
        """Return the end of a trial; one that failed or was interrupted has no score."""
        score = final_score(record, self._trial, self._spec.config, self._search)
        if record.state == "diverged":
            score = worst_score(self._search)
        epoch = max(self._told + 1, record.epochs[-1].epoch if record.epochs else 1)
        return {"done": True, _EPOCH: epoch, **({} if score is None else {_SCORE: score})}
