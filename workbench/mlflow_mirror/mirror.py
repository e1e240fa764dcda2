"""The thread that copies a study to MLflow while it runs, and `sync`, which makes up for what it could not send."""

import threading
import time
from collections.abc import Callable
from typing import TextIO

from workbench import filesystem, tracking
from workbench.contacts import refuse_credentials_of_records
from workbench.errors import BusyError, StoreError, WorkbenchError
from workbench.mlflow_mirror.api import Api, answered, connect, default_uri, reason
from workbench.mlflow_mirror.sender import Sender
from workbench.mlflow_mirror.state import State
from workbench.records import StudyRef, StudyResults
from workbench.screen import line_to
from workbench.store import Store
from workbench.study import Plan

SEND_SECONDS = 5.0  # between rounds, as often as a trial tells of its steps
FLUSH_SECONDS = 90.0  # at most, to finish at the end of a run, while MLflow takes what it is sent
FLUSH_STOPPED_SECONDS = 10.0  # at most, after Ctrl-C or SIGTERM, which batch systems follow up after some thirty
SILENCE_SECONDS = 25.0  # without an answer, after which a run no longer waits; a locked database answers after 20
CREATION_SECONDS = 60.0  # instead of it, to make the embedded database, which takes ten on a small machine

_POLL_SECONDS = 0.2


def sync(store: Store, *, tracking_uri: str | None = None, err: TextIO) -> int:
    """Bring MLflow up to date with all records; return 0 when it was seen to have them, 1 when not all could be sent.

    Each study goes to the MLflow that it was last sent to, or was to be, unless another is named.
    """
    code = 0
    away: set[str] = set()  # asked once, not again for every study

    warn = line_to(err)
    for ref in store.studies():
        try:
            results = store.results(ref)
            uri = tracking_uri or _last_uri(results) or results.plan.study.tracking_uri
            if uri is not None and uri != tracking_uri:
                refuse_credentials_of_records(uri)
            with store.lock(ref):
                mirror = Mirror(store, ref, results.plan, tracking_uri=uri, warn=warn)
                if mirror.tracking_uri not in away and not mirror.bring_up_to_date():
                    warn(f"{ref.study} ({ref.profile}): MLflow has not all of it; the same command goes on from there.")
                    code = 1
                if mirror.away:
                    away.add(mirror.tracking_uri)
        except BusyError as error:
            warn(f"{error}. Its driver keeps MLflow up to date.")
        except StoreError as error:
            warn(f"Left out: {error}")
            code = 1
        except WorkbenchError as error:
            warn(f"Left out: {ref.path}: {error}")
            code = 1
    return code


def _last_uri(results: StudyResults) -> str | None:
    uri = (results.mlflow or {}).get("tracking_uri")
    return uri if isinstance(uri, str) else None


class Mirror:
    """The copy of one study in MLflow. Whatever happens to it, training goes on.

    Raises:
        WorkbenchError: the tracking URI holds what must not be stored.
    """

    def __init__(
        self, store: Store, ref: StudyRef, plan: Plan, *, tracking_uri: str | None, warn: Callable[[str], None]
    ) -> None:
        self.tracking_uri = tracking.checked(tracking_uri or default_uri(store))
        self.away = False  # whether the last round could not be sent
        self.cpu_seconds = {"connect": 0.0, "send": 0.0}  # of the thread; at first, to make the embedded database
        self._artifacts = store.mlflow_artifacts
        self._state = State(ref.path / "mlflow.json", self.tracking_uri)
        self._sender = Sender(store, ref, plan, self._state)
        self._warn = warn
        self._warned = False
        self._api: Api | None = None
        self._finish = threading.Event()
        self._everything = False
        self._complete = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to copy, in a thread of its own."""
        if self._thread is None:
            self._state.save(now=True)  # so that `sync` knows where to, should MLflow be away to the end
            self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
            self._thread.start()

    def finish(self, *, limit: float = FLUSH_SECONDS) -> bool:
        """Copy what is left and end the thread; return whether all has been sent. Starts nothing in vain.

        Waits at most `limit` seconds, and less where MLflow does not answer.
        """
        if self._thread is None and self._sender.up_to_date():
            return True
        self._finish.set()
        self.start()
        self._wait(limit)
        if not self._complete:
            self._warn("MLflow has not everything yet: `python -m workbench sync` brings it up to date.")
        return self._complete

    def bring_up_to_date(self) -> bool:
        """Copy what MLflow is seen not to have, and what the last run cost, for as long as it takes; return success."""
        self._everything = True
        self._finish.set()
        self._loop()
        return self._complete

    def _wait(self, limit: float) -> None:
        assert self._thread is not None  # it has been started
        began = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)
            now, heard = time.monotonic(), max(began, self._api.heard if self._api else began)
            making = self._api is None and not tracking.is_remote(self.tracking_uri)
            silent = now - heard > (CREATION_SECONDS if making else SILENCE_SECONDS)
            if silent or now - began > limit:
                return

    def _loop(self) -> None:
        while True:
            last = self._finish.is_set()
            try:
                api = self._api or self._connect()
                self._sender.send(api, last=last, everything=self._everything)
                self._complete, self.away = last, False
            except Exception as error:  # noqa: BLE001 - whatever MLflow raises is told, and training goes on
                self.away = not answered(error)
                self._tell(error)
            self.cpu_seconds["send"] = time.thread_time() - self.cpu_seconds["connect"]
            if last:
                return
            self._finish.wait(SEND_SECONDS)

    def _connect(self) -> Api:
        self._api = connect(self.tracking_uri, artifacts=self._artifacts)
        self.cpu_seconds["connect"] = time.thread_time()
        path = tracking.sqlite_file(self.tracking_uri)
        if path is not None and (kind := filesystem.network_type(path)):
            self._warn(
                f"Warning: {path} lies on {kind}, where SQLite's locks cannot be relied on: name a server, or a file "
                "on a local disk, by --tracking-uri"
            )
        return self._api

    def _tell(self, error: Exception) -> None:
        """Say once that something is wrong; the next round may mend it."""
        if self._warned:
            return
        self._warned = True
        told = reason(error)
        meanwhile = "" if self._everything else ", training goes on without it"
        libraries = type(error).__module__.startswith(("mlflow", "sqlalchemy", "requests"))
        if answered(error):
            self._warn(f"MLflow has refused a part of the copy{meanwhile} ({told})")
        elif libraries or isinstance(error, ConnectionError | TimeoutError):
            self._warn(f"MLflow cannot be reached{meanwhile} ({told})")
        else:
            self._warn(f"MLflow cannot be kept up to date{meanwhile} ({type(error).__name__}: {told})")
