"""What of a study MLflow has not got, sent: an experiment, a parent run for the plan, a child run for each trial."""

from contextlib import suppress
from typing import Any

from core.parts import flatten, scientific
from workbench import record_files
from workbench.mirror_content import (
    LAST_RUN,
    PASSING_TAGS,
    STATUS,
    Feed,
    ended_at,
    keys,
    milliseconds,
    reached,
    report_files,
    study_params,
    study_reached,
    study_stamps,
    study_tags,
    trial_tags,
)
from workbench.mlflow_mirror.api import Api, answered
from workbench.mlflow_mirror.state import State
from workbench.records import StudyRef, StudyResults, TrialRecord
from workbench.store import Store
from workbench.study import Plan, PlannedTrial

_OVER = ("finished", "diverged", "failed", "interrupted")
_IDENTITY = ("trial_id", "variant", "began_at", "mlflow.parentRunId")  # of a trial's run, by its tags
_PARENT, _LAST_RUN = "parent", "last_run"  # beside the trials' keys in `State.reached`


class Sender:
    """Brings MLflow up to the records of one study, as often as it is asked to."""

    def __init__(self, store: Store, ref: StudyRef, plan: Plan, state: State) -> None:
        self._store, self._ref, self._plan, self._state = store, ref, plan, state
        self._keys = keys(plan)
        self._feeds: dict[str, Feed] = {}
        self._running: dict[str, int] = {}  # key -> the attempt that MLflow knows to be running
        self._without_files: Exception | None = None  # why none can be kept in this round
        self._runs: dict[str, dict[str, str]] | None = None  # of trials in MLflow, id -> tags; None: not asked yet

    def up_to_date(self) -> bool:
        """Tell whether all but the cost of the last run has been sent; whether MLflow still has it is not asked."""
        results = self._results()
        expected = {self._key(trial): reached(record) for trial, record in self._begun(results)}
        expected[_PARENT] = study_reached(results, self._ref, over=True)
        known = {key: value for key, value in self._state.reached.items() if key != _LAST_RUN}
        return known == expected

    def send(self, api: Api, *, last: bool, everything: bool = False) -> None:
        """Send what MLflow has not got; `last` says that the driver does no more.

        What MLflow refuses of one trial does not keep it from having the others, and while there is no place for files
        it has all else. What went wrong first is raised last.
        """
        results = self._results()
        self._without_files = None
        refused: Exception | None = None
        try:
            parent = self._parent_run(api)
            for trial, record in self._begun(results):
                if self._state.reached.get(self._key(trial)) == reached(record):
                    continue
                try:
                    self._send_trial(api, trial, record)
                except Exception as error:
                    if not answered(error):
                        raise
                    refused = refused or error
                self._state.save(now=False)
            self._send_parent(api, parent, results, last=last, everything=everything)
        finally:
            self._state.save(now=True)
        if problem := refused or self._without_files:
            raise problem

    def _key(self, trial: PlannedTrial) -> str:
        return self._keys[trial.variant, trial.seed]

    def _results(self) -> StudyResults:
        """Return what is known of the study, whose plan grows where it is a search."""
        results = self._store.results_for(self._plan)
        if len(results.plan.trials) != len(self._plan.trials):
            self._plan, self._keys = results.plan, keys(results.plan)
        return results

    def _begun(self, results: StudyResults) -> list[tuple[PlannedTrial, TrialRecord]]:
        """Return the trials that have a record, also those of later looks that another study has computed."""
        pairs = [(trial, results.records[trial.trial_id]) for trial in self._plan.trials]
        return [(trial, record) for trial, record in pairs if record.state != "pending"]

    # Trials

    def _send_trial(self, api: Api, trial: PlannedTrial, record: TrialRecord) -> None:
        key = self._key(trial)
        try:
            self._log_trial(api, trial, record)
        except Exception as error:
            if not answered(error) or key not in self._state.runs:
                raise
            if not api.revive(self._state.runs[key]):
                self._forget(key)
            self._running.pop(key, None)
            self._log_trial(api, trial, record)
        if record.state in _OVER:
            run = self._state.runs[key]
            api.set_over(run, STATUS[record.state], end_time=ended_at(record) or self._last_time(trial))
            self._running.pop(key, None)
            if self._keep_files(api, run, trial.trial_id):
                self._state.reached[key] = reached(record)
                del self._feeds[key]

    def _log_trial(self, api: Api, trial: PlannedTrial, record: TrialRecord) -> None:
        """Send the points that are new, and where its state is, what is to be told of the trial."""
        key, began_at = self._key(trial), self._first_time(trial)
        over, known = record.state in _OVER, self._running.get(key) == record.attempts
        parent = self._parent_run(api)
        self._forget_another(key, began_at)
        feed = self._feeds.setdefault(key, Feed(self._store, trial.trial_id))
        points, marks = feed.points(self._state.watermarks.get(key, [0, 0]))
        if not points and known and not over:
            return
        run = self._trial_run(api, parent, trial, began_at)
        tags = {} if known and not over else trial_tags(trial, record, began_at=began_at)
        api.log(
            run,
            points=[*points, *(feed.final_points(trial, record) if over else [])],
            params={} if key in self._state.watermarks else self._params(trial),
            tags=tags,
        )
        self._state.watermarks[key], self._state.changed = marks, True
        feed.sent()
        if tags:
            api.drop_tags(run, [name for name in PASSING_TAGS if name not in tags])
        if not over and not known:
            api.set_running(run)
            self._state.reached.pop(key, None)
            self._running[key] = record.attempts

    def _keep_files(self, api: Api, run: str, trial_id: str) -> bool:
        """Keep the files of the record, and last the manifest, by which a copy is known to be whole; return success.

        They may lie in a store of their own, which may be away alone: it is asked once a round.
        """
        folder = self._store.trial_dir(trial_id)
        manifest = record_files.manifest("trial", folder)
        if self._without_files is not None:
            return False
        try:
            for name in manifest["files"]:
                within = name.rpartition("/")[0]
                with suppress(FileNotFoundError):  # renamed by an attempt that has just begun, which is sent later
                    api.log_file(run, folder / name, within or None)
            api.log_dict(run, manifest, record_files.MANIFEST)
        except Exception as error:
            if answered(error):
                raise
            self._without_files = error
        return self._without_files is None

    def _params(self, trial: PlannedTrial) -> dict[str, Any]:
        spec = self._plan.specs[trial.trial_id]
        return {**flatten(scientific(spec.config)), "seed": spec.seed}

    def _first_time(self, trial: PlannedTrial) -> str:
        """Return when a trial began, "" where no event says so: with its id, what tells its record from others."""
        events = self._store.events(trial.trial_id)
        return events[0].time if events else ""

    def _last_time(self, trial: PlannedTrial) -> int | None:
        events = self._store.events(trial.trial_id)
        return milliseconds(events[-1].time) if events else None

    # The plan

    def _send_parent(self, api: Api, run: str, results: StudyResults, *, last: bool, everything: bool) -> None:
        now = study_reached(results, self._ref, over=last)
        if self._state.reached.get(_PARENT) == now and not (everything and self._last_run_is_new()):
            return
        stamps, status = study_stamps(self._ref), now[0]
        tags = {f"verdict.{verdict.claim}": verdict.verdict for verdict in results.verdicts}
        api.log(run, tags={**tags, "state": status.lower()})
        before = self._state.reached.get(_PARENT)
        sent = before[2] if isinstance(before, list) and len(before) == len(now) else {}  # an earlier version kept less
        manifest = record_files.manifest("study", self._ref.path)
        for name in manifest["files"]:
            if name == LAST_RUN or sent.get(name) != stamps.get(name):
                api.log_file(run, self._ref.path / name)
        for path in report_files(self._ref):
            api.log_file(run, path)
        api.log_dict(run, manifest, record_files.MANIFEST)
        if status == "RUNNING":
            api.set_running(run)
        else:
            api.set_over(run, status, end_time=None)
        self._state.reached |= {_PARENT: now, _LAST_RUN: stamps.get(LAST_RUN)}
        self._state.changed = True

    def _last_run_is_new(self) -> bool:
        return study_stamps(self._ref).get(LAST_RUN) != self._state.reached.get(_LAST_RUN)

    # Runs

    def _parent_run(self, api: Api) -> str:
        state = self._state
        if self._runs is None:
            self._look(api)
        assert state.parent_run_id is not None  # it has been found or made
        return state.parent_run_id

    def _look(self, api: Api) -> None:
        """See what MLflow has of the study. What was deleted there is brought back, or made anew where it is gone."""
        state, tags = self._state, study_tags(self._plan)
        experiment = api.experiment(f"{self._ref.study}/{self._ref.profile}")
        if state.parent_run_id is None or experiment != state.experiment_id or not api.revive(state.parent_run_id):
            state.forget_all()  # as where another database answers than did before
            self._feeds.clear()
            registered = {"registered_at": self._ref.registered_at}
            wanted = {name: tags[name] for name in ("plan_hash", "kind")}
            runs = {run.info.run_id: run.data.tags for run in api.runs(experiment, wanted)}
            run = _same(runs, registered) or api.create_run(
                experiment, f"plan {self._plan.plan_hash}", tags | registered
            )
            api.log(run, params=study_params(self._plan), tags=registered)
            state.experiment_id, state.parent_run_id, state.changed = experiment, run, True
        listed = api.runs(experiment, {"plan_hash": self._plan.plan_hash, "kind": "trial"})
        self._runs = {
            run.info.run_id: {name: run.data.tags.get(name, "") for name in _IDENTITY}
            for run in listed
            if "trial_id" in run.data.tags
        }
        for key, run in [*state.runs.items()]:
            if run not in self._runs and not api.revive(run):
                self._forget(key)

    def _forget(self, key: str) -> None:
        """Begin anew with one trial: all of it goes to another run."""
        if self._runs is not None:
            self._runs.pop(self._state.runs.get(key, ""), None)
        self._state.forget(key)
        self._feeds.pop(key, None)

    def _forget_another(self, key: str, began_at: str) -> None:
        """Begin anew with a trial that is not the one sent: its folder was removed, and it began again."""
        sent = (self._runs or {}).get(self._state.runs.get(key, ""), {}).get("began_at")
        if began_at and sent and sent != began_at:
            self._forget(key)

    def _trial_run(self, api: Api, parent: str, trial: PlannedTrial, began_at: str) -> str:
        """Return a trial's run: the one known, or one that is there and not known any more, or a new one."""
        key, state = self._key(trial), self._state
        if key not in state.runs:
            assert state.experiment_id is not None  # it is known since the parent's run is
            assert self._runs is not None
            values = (trial.trial_id, trial.variant, began_at, parent)
            identity: dict[str, str] = dict(zip(_IDENTITY, values, strict=True))
            found = _same(self._runs, identity)
            if found is None:
                runs, self._runs = self._runs, None  # looked at again, should the answer be lost
                found = api.create_run(
                    state.experiment_id,
                    f"{trial.variant} seed {trial.seed}",
                    {**study_tags(self._plan), "kind": "trial", **identity},
                    start_time=milliseconds(began_at) if began_at else None,
                )
                self._runs = runs
            state.runs[key], state.changed = found, True
            self._runs[found] = identity
        return state.runs[key]


def _same(runs: dict[str, dict[str, str]], tags: dict[str, str]) -> str | None:
    """Return the first run that has these tags; one that a run has not, or has empty, does not count."""
    for run, known in runs.items():
        if all(known.get(name) in (None, "", value) for name, value in tags.items()):
            return run
    return None
