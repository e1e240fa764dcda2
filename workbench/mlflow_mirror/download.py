"""Reading a study's copy in MLflow. What a server answers is not trusted: `fetch` checks it before anything is used."""

import errno
import json
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workbench import record_files, tracking
from workbench.errors import WorkbenchError
from workbench.mlflow_mirror.api import Api, answered, connect, reason
from workbench.record_files import MANIFEST, Entry

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
_PLAN_HASH, _TRIAL_ID = re.compile(r"[0-9a-f]{12}"), re.compile(r"[0-9a-f]{16}")


class MissingFile(Exception):  # noqa: N818 - a finding, told with the run's name
    """A run has no such file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemotePlan:
    """A plan as MLflow has it. `runs` are those of its trials, by the variant and the id of the trial."""

    study: str
    profile: str
    plan_hash: str
    experiment_id: str
    run_id: str
    copies: int  # how many runs MLflow has of the plan, of which this is the one
    runs: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])


class Remote:
    """An MLflow to read from.

    Raises:
        WorkbenchError: it cannot be reached, here and in every method.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking.checked(tracking_uri)
        self._repositories: dict[str, ArtifactRepository] = {}  # of the run that is being read
        path = tracking.sqlite_file(tracking_uri)
        if path is not None and not path.is_file():
            raise WorkbenchError(f"--tracking-uri: {path} is no file; name the database that has the copy")
        with self._told():
            self._api: Api = connect(tracking_uri, artifacts=Path("mlartifacts").absolute())

    def plans(self, study: str, profile: str | None) -> list[RemotePlan]:
        """Return the plans of a study, of all profiles unless one is named; what has no name of ours is left out."""
        with self._told():
            experiments = self._api.experiments(study)
            return [
                plan
                for name, experiment in sorted(experiments.items())
                if NAME.fullmatch(name) and profile in (None, name)
                for plan in self._plans(study, name, experiment)
            ]

    def manifest(self, run: str, kind: record_files.Kind) -> dict[str, Entry]:
        """Return what a run has of a record.

        Raises:
            MissingFile: it has no manifest, as a trial that still goes on.
            ValueError: the manifest is damaged, or none.
        """
        with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
            path = Path(folder) / MANIFEST
            self._download(run, MANIFEST, path, largest=record_files.LARGEST_MANIFEST)
            try:
                plain = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"its {MANIFEST} is not JSON ({error})") from error
        return record_files.read_manifest(kind, plain)

    def file(self, run: str, name: str, entry: Entry, target: Path) -> None:
        """Write one file of a run to `target`, durably, as the manifest describes it.

        Raises:
            MissingFile: the run has no such file.
            ValueError: it is another file than the manifest describes.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        self._download(run, name, target, largest=entry.bytes)
        if Entry.of(target) != entry:
            raise ValueError(f"{name} is not the file that its {MANIFEST} describes: sync again where it was trained")
        with target.open("rb") as file:
            os.fsync(file.fileno())

    def _plans(self, study: str, profile: str, experiment: str) -> list[RemotePlan]:
        parents: dict[str, list[Run]] = {}
        for run in self._api.runs(experiment, {"kind": "plan"}):
            plan_hash = run.data.tags.get("plan_hash", "")
            if _PLAN_HASH.fullmatch(plan_hash):
                parents.setdefault(plan_hash, []).append(run)
        children: dict[str, list[Run]] = {}
        for run in self._api.runs(experiment, {"kind": "trial"}):
            children.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
        found: list[RemotePlan] = []
        for plan_hash, runs in parents.items():
            # Two machines may have run one plan: the copy with the most trials finished, of equal ones the older.
            chosen = max(runs, key=lambda run: _num_finished(children.get(run.info.run_id, [])))
            plan = RemotePlan(
                study=study,
                profile=profile,
                plan_hash=plan_hash,
                experiment_id=experiment,
                run_id=chosen.info.run_id,
                copies=len(runs),
            )
            for run in children.get(chosen.info.run_id, []):
                trial_id, variant = run.data.tags.get("trial_id", ""), run.data.tags.get("variant", "")
                if _TRIAL_ID.fullmatch(trial_id):
                    plan.runs[variant, trial_id] = run.info.run_id
            found.append(plan)
        return found

    def _download(self, run: str, name: str, target: Path, *, largest: int) -> None:
        """Write a file of at most `largest` bytes, whatever the server sends.

        Of an artifact repository the one call is used that reads one file into one place: `download_artifacts` would
        ask the server first whether it is a folder, and then what is in it.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with self._told():
            if run not in self._repositories:  # a request less for each of its files
                uri = str(self._api.client.get_run(run).info.artifact_uri)
                self._repositories = {run: get_artifact_repository(uri, tracking_uri=self.tracking_uri)}
            repository = self._repositories[run]
            try:
                with _files_of_at_most(largest):
                    repository._download_file(name, str(target))
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EFBIG:
                    raise ValueError(f"{name} is larger than it may be") from error
                if _says_missing(error):
                    raise MissingFile(name) from error
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (MissingFile, ValueError, WorkbenchError):
            raise
        except Exception as error:
            what = "refuses" if answered(error) else "cannot be read"
            told = reason(error)
            raise WorkbenchError(f"--tracking-uri {self.tracking_uri}: MLflow {what} ({told})") from error


def _says_missing(error: Exception) -> bool:
    """Tell whether an error of a store of files, MLflow's own or S3, says that there is no such file."""
    answer = getattr(error, "response", None)  # a dict in S3's
    status = getattr(answer, "status_code", None)
    if isinstance(answer, dict):
        status = cast("dict[str, Any]", answer).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 404 or getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _num_finished(runs: "list[Run]") -> int:
    return sum(run.info.status == "FINISHED" for run in runs)


@contextmanager
def _files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let this process write no larger files meanwhile: a server need not send what it said it would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
