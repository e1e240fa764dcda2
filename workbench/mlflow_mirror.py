"""Copies the records to MLflow while they grow. The only importer of mlflow.

One thread of the driver tails the events files, so there is one writer, trials never wait for MLflow, and when MLflow
is away the copy is late, not lost. Everything sent carries the time of its event, by which MLflow drops what it
already has: sending again is safe, and `sync` replays exactly once.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from core.parts import flatten, scientific
from workbench import durable
from workbench.errors import BusyError, StoreError
from workbench.mirror_content import (
    STATUS,
    Feed,
    Point,
    final_points,
    reached,
    started,
    study_files,
    study_params,
    study_reached,
    study_tags,
    trial_files,
    trial_tags,
)
from workbench.records import StudyRef, StudyResults, TrialRecord
from workbench.store import Store
from workbench.study import Plan, PlannedTrial

if TYPE_CHECKING:
    from mlflow import MlflowClient

SEND_SECONDS = 5.0  # between rounds, as often as a trial tells of its steps
FLUSH_SECONDS = 90.0  # to finish at the end of a run; making the embedded database takes ten on a small machine

_MOST_METRICS, _MOST_PARAMS = 800, 100  # in one call, where MLflow's limit is 1000 of all kinds and 100 params
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the next round is the retry
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

_Item = TypeVar("_Item")


def default_uri(store: Store) -> str:
    """Return the URI of the embedded database; absolute, because MLflow takes others from the working directory."""
    return f"sqlite:///{store.mlflow_database}"


def sync(store: Store, *, tracking_uri: str | None = None, err: TextIO) -> int:
    """Bring MLflow up to date with all records; return 0, or 1 when it could not be reached."""
    code = 0

    def warn(line: str) -> None:
        err.write(line + "\n")

    for ref in store.studies():
        try:
            plan = store.results(ref).plan
            with store.lock(ref):
                mirror = Mirror(store, ref, plan, tracking_uri=tracking_uri or plan.study.tracking_uri, warn=warn)
                code |= 0 if mirror.finish() else 1
        except BusyError as error:
            warn(f"{error}. Its driver keeps MLflow up to date.")
        except StoreError as error:
            warn(f"Left out: {error}")
            code = 1
    return code


class Mirror:
    """The copy of one study in MLflow: an experiment, a parent run for the plan, a child run for each trial."""

    def __init__(
        self, store: Store, ref: StudyRef, plan: Plan, *, tracking_uri: str | None, warn: Callable[[str], None]
    ) -> None:
        self.tracking_uri = tracking_uri or default_uri(store)
        self._store, self._ref, self._plan, self._warn = store, ref, plan, warn
        self._path = ref.path / "mlflow.json"
        self._state = self._read_state()
        self._feeds: dict[str, Feed] = {}
        self._running: dict[str, int] = {}  # trial id -> the attempt that MLflow knows to be running
        # Trials that MLflow may have a run of without our knowing: a kill came before its id was written.
        self._perhaps_known = {trial_id for trial_id in plan.specs if store.trial_dir(trial_id).exists()}
        self._without_params: set[str] = set()
        self._changed = False  # what mlflow.json says, since it was written
        self._finish = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False
        self._complete = False
        self.cpu_seconds = {"connect": 0.0, "send": 0.0}  # of the thread; at first, to make the embedded database

    def start(self) -> None:
        """Begin to copy, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
            self._thread.start()

    def finish(self) -> bool:
        """Copy what is left and end the thread; return whether MLflow now has everything. Starts nothing in vain."""
        if self._thread is None and self._up_to_date():
            return True
        self.start()
        self._finish.set()
        if self._thread is not None:
            self._thread.join(FLUSH_SECONDS)
        if not self._complete:
            self._warn("MLflow has not everything yet: `python -m workbench sync` brings it up to date.")
        return self._complete

    def _loop(self) -> None:
        client = None
        while True:
            last = self._finish.is_set()
            try:
                if client is None:
                    client = _connect(self._store, self.tracking_uri)
                    self.cpu_seconds["connect"] = time.thread_time()
                self.send(client, last=last)
                self._complete = last
            except _trouble() as error:
                if not self._warned:
                    self._warned = True
                    reason = str(error).strip().splitlines()[0][:200]
                    self._warn(f"MLflow cannot be reached, training goes on without it ({reason})")
            self.cpu_seconds["send"] = time.thread_time() - self.cpu_seconds["connect"]
            if last:
                return
            self._finish.wait(SEND_SECONDS)

    # What is sent

    def send(self, client: "MlflowClient", *, last: bool) -> None:
        """Send what MLflow has not got; `last` says that the driver does no more."""
        results = self._store.results_for(self._plan)
        self._plan = results.plan  # of a search, it grows
        try:
            parent = self._parent_run(client)
            for trial in started(results):
                record = results.records[trial.trial_id]
                if record.attempts and self._state["reached"].get(trial.trial_id) != reached(record):
                    self._send_trial(client, parent, trial, record)
            self._send_parent(client, parent, results, last=last)
        finally:
            self._save()

    def _send_trial(self, client: "MlflowClient", parent: str, trial: PlannedTrial, record: TrialRecord) -> None:
        known = self._running.get(trial.trial_id) == record.attempts
        feed = self._feeds.setdefault(trial.trial_id, Feed(self._store, trial.trial_id))
        points, marks = feed.points(self._state["watermarks"].get(trial.trial_id, [0, 0]))
        if not points and record.state == "running" and known:
            return
        run = self._trial_run(client, parent, trial)
        over = record.state in ("finished", "diverged", "failed", "interrupted")
        params = self._params(trial) if trial.trial_id in self._without_params else {}
        tags = trial_tags(trial, record) if over or not known else {}
        _log(client, run, points=[*points, *(final_points(trial, record) if over else [])], params=params, tags=tags)
        self._changed = True
        self._without_params.discard(trial.trial_id)
        self._state["watermarks"][trial.trial_id] = marks
        feed.sent()
        if over:
            for path, folder in trial_files(self._store, trial):
                client.log_artifact(run, str(path), folder)
            client.set_terminated(run, STATUS[record.state])
            self._state["reached"][trial.trial_id] = reached(record)
            del self._feeds[trial.trial_id]
        else:
            if not known:
                client.update_run(run, STATUS[record.state])
            self._state["reached"].pop(trial.trial_id, None)
            self._running[trial.trial_id] = record.attempts

    def _params(self, trial: PlannedTrial) -> dict[str, Any]:
        spec = self._plan.specs[trial.trial_id]
        return {**flatten(scientific(spec.config)), "seed": spec.seed}

    def _send_parent(self, client: "MlflowClient", run: str, results: StudyResults, *, last: bool) -> None:
        reached_now = study_reached(results, over=last)
        if self._state["reached"].get("parent") == reached_now:
            return
        status, tags = reached_now[0], {f"verdict.{verdict.claim}": verdict.verdict for verdict in results.verdicts}
        _log(client, run, tags={**tags, "state": status.lower()})
        for path in study_files(self._ref):
            client.log_artifact(run, str(path))
        if status == "RUNNING":
            client.update_run(run, status)
        else:
            client.set_terminated(run, status)
        self._state["reached"]["parent"] = reached_now
        self._changed = True

    # Runs

    def _parent_run(self, client: "MlflowClient") -> str:
        if self._state["parent_run_id"] is None:
            self._state["experiment_id"] = self._experiment(client)
            tags = study_tags(self._plan)
            run = self._find_run(client, tags) or self._create_run(client, f"plan {self._plan.plan_hash}", tags)
            _log(client, run, params=study_params(self._plan))
            self._state["parent_run_id"] = run
            self._changed = True
        return self._state["parent_run_id"]

    def _trial_run(self, client: "MlflowClient", parent: str, trial: PlannedTrial) -> str:
        runs, trial_id = self._state["runs"], trial.trial_id
        if trial_id not in runs:
            identity = {"plan_hash": self._plan.plan_hash, "trial_id": trial_id, "kind": "trial"}
            tags = {**study_tags(self._plan), **identity, "mlflow.parentRunId": parent}
            found = self._find_run(client, identity) if trial_id in self._perhaps_known else None
            self._perhaps_known.add(trial_id)  # should the answer to the next call be lost
            runs[trial_id] = found or self._create_run(client, f"{trial.variant} seed {trial.seed}", tags)
            self._without_params.add(trial_id)
            self._changed = True
        return runs[trial_id]

    def _experiment(self, client: "MlflowClient") -> str:
        name = f"{self._plan.study.name}/{self._plan.study.profile}"
        found = client.get_experiment_by_name(name)
        if found is None:
            remote = self.tracking_uri.startswith("http")  # a server knows where its artifacts go
            return client.create_experiment(name, None if remote else self._store.mlflow_artifacts.as_uri())
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find_run(self, client: "MlflowClient", tags: dict[str, str]) -> str | None:
        """Find a run whose id was lost: a kill came between its creation and the writing of mlflow.json."""
        wanted = " and ".join(f"tags.{key} = '{tags[key]}'" for key in ("plan_hash", "trial_id", "kind") if key in tags)
        found = client.search_runs([self._state["experiment_id"]], wanted, max_results=1)
        return found[0].info.run_id if found else None

    def _create_run(self, client: "MlflowClient", name: str, tags: dict[str, str]) -> str:
        return client.create_run(self._state["experiment_id"], run_name=name, tags=tags).info.run_id

    # What has been sent

    def _up_to_date(self) -> bool:
        results = self._store.results_for(self._plan)
        records = [results.records[trial.trial_id] for trial in started(results)]
        expected = {record.trial_id: reached(record) for record in records if record.attempts}
        return self._state["reached"] == {**expected, "parent": study_reached(results, over=True)}

    def _read_state(self) -> dict[str, Any]:
        """Return the ids of the runs and what they have, as left by the last driver that used the same MLflow."""
        plain = durable.read_json(self._path)
        if plain is not None and plain["tracking_uri"] == self.tracking_uri:
            return {key: value for key, value in plain.items() if key != "format"}
        empty: dict[str, Any] = {"runs": {}, "watermarks": {}, "reached": {}}
        return {"tracking_uri": self.tracking_uri, "experiment_id": None, "parent_run_id": None, **empty}

    def _save(self) -> None:
        """Write mlflow.json, once a round since it is long with many trials; what a kill loses is sent again."""
        if self._changed:
            durable.write_json(self._path, self._state, indent=None)
            self._changed = False


def _connect(store: Store, tracking_uri: str) -> "MlflowClient":
    """Open MLflow; one process at a time, since two that create a database at once break it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):  # their words go to the terminal otherwise
        logging.getLogger(name).setLevel(logging.ERROR)
    with (store.root / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)
    return client


def _trouble() -> tuple[type[Exception], ...]:
    """What MLflow raises when its server or database is away."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _log(
    client: "MlflowClient",
    run: str,
    *,
    points: Sequence[Point] = (),
    params: Mapping[str, Any] = MappingProxyType({}),
    tags: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Send all in as few calls as MLflow's limits allow: each costs milliseconds, whatever it carries."""
    from mlflow.entities import Metric, Param

    named = [Param(key, str(value)[:6000]) for key, value in params.items()]
    parts = zip_longest(_chunks(points, _MOST_METRICS), _chunks(named, _MOST_PARAMS), [_tags(tags)], fillvalue=())
    for some, given, told in parts:
        client.log_batch(run, metrics=[Metric(*point) for point in some], params=given, tags=told)


def _tags(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, str(value)[:5000]) for key, value in values.items() if value is not None]


def _chunks(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
