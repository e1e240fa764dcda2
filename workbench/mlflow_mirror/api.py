"""The calls to MLflow that copying needs, and opening it."""

import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from workbench import tracking
from workbench.mirror_content import Point
from workbench.redaction import redact
from workbench.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_MOST_METRICS, _MOST_PARAMS = 800, 100  # in one call, where MLflow's limit is 1000 of all kinds and 100 params
_PAGE = 500
_ANSWERS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "PERMISSION_DENIED",
}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the next round is the retry
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

_Item = TypeVar("_Item")


def default_uri(store: Store) -> str:
    """Return the URI of the embedded database; absolute, because MLflow takes others from the working directory."""
    return f"sqlite:///{store.mlflow_database}"


def connect(tracking_uri: str, *, artifacts: Path) -> "Api":
    """Open MLflow; an SQLite database that is not there is made, with `artifacts` beside it for its files.

    Raises:
        Exception: MLflow's own, where its server or database is away.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # takes seconds

    for name in ("mlflow", "alembic", "urllib3"):  # their words go to the terminal otherwise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    path = tracking.sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        _create_database(path)
    client = MlflowClient(tracking_uri)
    client.search_experiments(max_results=1)
    # A server knows where its files go.
    return Api(client, artifact_location=None if tracking.is_remote(tracking_uri) else artifacts.as_uri())


def _create_database(path: Path) -> None:
    """Make an MLflow database elsewhere and link it into place whole: two that are made in one place break it."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments(max_results=1)
            with closing(sqlite3.connect(f"{folder}/mlflow.db")) as made, closing(sqlite3.connect(draft)) as copy:
                made.backup(copy)
        path.hardlink_to(draft)
    except FileExistsError:  # somebody else's was there first
        return
    finally:
        draft.unlink(missing_ok=True)


def answered(error: Exception) -> bool:
    """Tell whether an error is MLflow's answer to what was asked, and not its absence."""
    return getattr(error, "error_code", None) in _ANSWERS


def reason(error: Exception) -> str:
    """Return the first line of an error, as a server may have written it, without secrets; else the error's type."""
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


class Api:
    """MLflow as the copy sees it; `heard` is when it last answered, by the monotonic clock."""

    def __init__(self, client: "MlflowClient", *, artifact_location: str | None) -> None:
        self.client = client
        self.heard = time.monotonic()
        self._artifact_location = artifact_location

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, made or brought back if need be."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, self._artifact_location)
            except Exception as error:
                if not answered(error) or (found := self.client.get_experiment_by_name(name)) is None:
                    raise  # else another driver has just made it
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        self._hear()
        return found.experiment_id

    def experiments(self, study: str) -> "dict[str, str]":
        """Return the ids of a study's experiments by profile."""
        found: dict[str, str] = {}
        page = None
        while True:
            answer = self.client.search_experiments(filter_string=f"name LIKE '{study}/%'", page_token=page)
            for item in answer:
                name, _, profile = item.name.partition("/")
                if name == study:  # LIKE takes _ for any character
                    found[profile] = item.experiment_id
            if not (page := answer.token):
                return found

    def runs(self, experiment: str, tags: Mapping[str, str]) -> "list[Run]":
        """Return the runs that have these tags, oldest first."""
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
        found: list[Run] = []
        page = None
        while True:
            answer = self.client.search_runs(
                [experiment], wanted, max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=page
            )
            self._hear()
            found += answer
            if not (page := answer.token):
                return found

    def create_run(self, experiment: str, name: str, tags: Mapping[str, Any], *, start_time: int | None = None) -> str:
        """Return the id of a new run; `start_time` is in milliseconds."""
        made = self.client.create_run(experiment, run_name=name, tags=dict(tags), start_time=start_time)
        self._hear()
        return made.info.run_id

    def revive(self, run: str) -> bool:
        """Bring back a run that was deleted; return False where there is none."""
        try:
            stage = self.client.get_run(run).info.lifecycle_stage
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if stage == "deleted":
            self.client.restore_run(run)
        return True

    def log(
        self,
        run: str,
        *,
        points: Sequence[Point] = (),
        params: Mapping[str, Any] = MappingProxyType({}),
        tags: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Send all in as few calls as MLflow's limits allow: each costs milliseconds, whatever it carries.

        Of params only those that the run has not got, since MLflow refuses to change one.
        """
        from mlflow.entities import Metric, Param, RunTag

        known = self.client.get_run(run).data.params if params else {}
        named = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
        told = [RunTag(key, str(value)[:5000]) for key, value in tags.items() if value is not None]
        parts = zip_longest(_chunks(points, _MOST_METRICS), _chunks(named, _MOST_PARAMS), [told], fillvalue=())
        for some, given, said in parts:
            self.client.log_batch(run, metrics=[Metric(*point) for point in some], params=given, tags=said)
            self._hear()

    def drop_tags(self, run: str, names: Sequence[str]) -> None:
        """Remove those of the tags that the run has."""
        known = self.client.get_run(run).data.tags
        for name in names:
            if name in known:
                self.client.delete_tag(run, name)
        self._hear()

    def log_file(self, run: str, path: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact."""
        self.client.log_artifact(run, str(path), folder)
        self._hear()

    def log_dict(self, run: str, values: Mapping[str, Any], name: str) -> None:
        """Keep JSON values as an artifact."""
        self.client.log_dict(run, dict(values), name)
        self._hear()

    def set_running(self, run: str) -> None:
        """Mark a run as running and, if it had ended once, as without an end, for which MLflow's client has no call."""
        from mlflow.entities import RunStatus

        store = self.client._tracking_client.store
        store.update_run_info(run, RunStatus.from_string("RUNNING"), 0, None)  # 0 is how MLflow writes "none"
        self._hear()

    def set_over(self, run: str, status: str, *, end_time: int | None) -> None:
        """Mark a run as ended, at a time in milliseconds or now."""
        self.client.set_terminated(run, status, end_time)
        self._hear()

    def _hear(self) -> None:
        self.heard = time.monotonic()


def _chunks(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
