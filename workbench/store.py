"""The only reader and writer of the runs folder: it owns every path in it.

    trials/<trial_id>/   spec.json  attempts/  events.jsonl  checkpoints/  evaluations/<eval_id>/{metrics.json,
                         predictions.parquet}  and, last of all, result.json or error.json
    studies/<study>/<profile>/<plan_hash>/   plan.json  study.yaml  registered.json  looks.json  verdicts.json
                         mlflow.json  last_run.json  and what reports and Ray write
    index/   cache/   mlflow.db   mlartifacts/

The state of a trial is derived from its files, so there is nothing to keep in step with them.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.events import EpochFinished, StepsTaken, TrainingStarted
from core.metrics import Metrics
from workbench import attempts, durable, siblings
from workbench.errors import BusyError, StoreError
from workbench.plan import plan_from_json, plan_to_json
from workbench.processes import Process
from workbench.records import StudyRef, StudyResults, TrialRecord, TrialState, Verdict
from workbench.siblings import RegisteredPlan
from workbench.study import Plan

if TYPE_CHECKING:
    import pandas as pd

_RECORD = ("attempts", "result.json", "error.json", "events.jsonl", "evaluations")  # what a trial's record is read from
_SETTLED_NS = 2_000_000_000  # files that changed later may change again with the same time of change


class Store:
    """A runs folder. `create=False` only reads, and takes a folder that is not there for an empty one.

    Raises:
        StoreError: `runs` is a file, or cannot be written although `create` asks for it.
    """

    def __init__(self, runs: Path, *, create: bool = True) -> None:
        self.root = runs.absolute()
        for place in (self.root, *self.root.parents):
            if place.exists() and not place.is_dir():
                raise StoreError(f"--runs {runs}: {place} is a file; name a folder, or a place where one can be made")
        if create:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"--runs {runs}: cannot be created ({error.strerror}); name another folder") from error
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise StoreError(f"--runs {runs}: cannot be written; name another folder or change its permissions")
        self._readers: dict[str, durable.EventReader] = {}
        self._settled: dict[str, tuple[tuple[Any, ...], TrialRecord]] = {}  # with the stamps of the files it is from

    # Paths

    @property
    def cache_dir(self) -> Path:
        """Where data sets keep what they can rebuild."""
        return self.root / "cache"

    @property
    def index_dir(self) -> Path:
        """Where histories are kept as parquet; everything in it can be rebuilt."""
        return self.root / "index"

    @property
    def code_dir(self) -> Path:
        """Where the code that trials were computed with is kept, as differences to a revision."""
        return self.root / "code"

    @property
    def mlflow_database(self) -> Path:
        """The embedded MLflow database."""
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """The artifacts of the embedded MLflow."""
        return self.root / "mlartifacts"

    def trial_dir(self, trial_id: str) -> Path:
        """Return the folder of a trial."""
        return self.root / "trials" / trial_id

    def evaluation_dir(self, trial_id: str, eval_id: str) -> Path:
        """Return the folder of an evaluation of a trial's last checkpoint."""
        return self.trial_dir(trial_id) / "evaluations" / eval_id

    def predictions(self, trial_id: str, eval_id: str) -> Path:
        """Return the file of an evaluation's predictions: the columns of `core.evaluation.score.Evaluation`."""
        return self.evaluation_dir(trial_id, eval_id) / "predictions.parquet"

    def study_dir(self, plan: Plan) -> Path:
        """Return the folder of a plan, registered or not."""
        return self.root / "studies" / plan.study.name / plan.study.profile / plan.plan_hash

    # Studies

    def register(self, plan: Plan, *, source: str) -> StudyRef:
        """Keep a plan and the text of its study file, once; later calls with the same plan change nothing.

        The time of the first registration is kept: a claim registered after a trial of its own finished is post hoc.
        """
        folder = self.study_dir(plan)
        kept = durable.read_json(folder / "plan.json")
        if kept is None or not _readable(kept):  # the folder is named by what the plan asks, so both ask the same
            durable.write_text(folder / "study.yaml", source)
            durable.write_json(folder / "plan.json", plan_to_json(plan))
        durable.create_json(folder / "registered.json", {"registered_at": durable.now()})
        found = siblings.read(folder)
        assert found is not None  # both of its files are there now
        return _ref(folder, found.registered_at)

    def studies(self) -> tuple[StudyRef, ...]:
        """Return the registered plans, newest first; last come those that cannot be read, and `results` says why."""
        found: list[StudyRef] = []
        for path in (self.root / "studies").glob("*/*/*/plan.json"):
            try:
                plan = siblings.read(path.parent)
            except StoreError:
                found.append(_ref(path.parent, registered_at=""))
            else:
                found += [_ref(path.parent, plan.registered_at)] if plan else []
        return tuple(sorted(found, key=lambda ref: ref.registered_at, reverse=True))

    def results(self, ref: StudyRef) -> StudyResults:
        """Return a registered plan with all that is known of it.

        Raises:
            StoreError: the plan cannot be read.
        """
        found = siblings.read(ref.path)
        if found is None:
            raise StoreError(f"{ref.path} holds no registered plan: run the study again to write it")
        return self.results_for(plan_from_json(found.plain))

    def results_for(self, plan: Plan) -> StudyResults:
        """Return what is known of a plan's trials, also when the plan was never registered."""
        folder = self.study_dir(plan)
        records = {trial_id: self.record(trial_id) for trial_id in plan.specs}
        verdicts = durable.read_json(folder / "verdicts.json") or {"verdicts": []}
        mirrored = durable.read_json(folder / "mlflow.json")
        registered, unreadable = siblings.read_all(folder.parent)
        return StudyResults(
            plan=plan,
            runs=self.root,
            records=records,
            verdicts=tuple(_verdict_from_json(verdict) for verdict in verdicts["verdicts"]),
            looks_started=len((durable.read_json(folder / "looks.json") or {"looks": []})["looks"]),
            post_hoc=_post_hoc(plan, records, registered),
            looked_before=siblings.looked_before(plan, registered),
            unreadable=unreadable,
            mlflow=mirrored and {key: value for key, value in mirrored.items() if key != "format"},
        )

    def start_look(self, ref: StudyRef, number: int) -> None:
        """Record that the trials of look `number` (1 is the first), and so of all before it, are to be run."""
        path = ref.path / "looks.json"
        looks = (durable.read_json(path) or {"looks": []})["looks"]
        if len(looks) < number:
            looks += [{"started_at": durable.now()}] * (number - len(looks))
            durable.write_json(path, {"looks": looks})

    def save_verdicts(self, ref: StudyRef, verdicts: tuple[Verdict, ...]) -> None:
        """Keep the verdicts; the file changes only when they do."""
        path, plain = ref.path / "verdicts.json", json.loads(json.dumps([asdict(verdict) for verdict in verdicts]))
        stored = durable.read_json(path)
        if stored is None or stored["verdicts"] != plain:
            durable.write_json(path, {"judged_at": durable.now(), "verdicts": plain})

    def save_last_run(self, ref: StudyRef, spent: dict[str, Any]) -> None:
        """Keep what the time of the last run went into."""
        durable.write_json(ref.path / "last_run.json", spent)

    @contextmanager
    def lock(self, ref: StudyRef) -> Iterator[None]:
        """Hold a study for this driver; the operating system lets go when the process ends, however it ends.

        Raises:
            BusyError: another driver runs this plan.
        """
        with (ref.path / "driver.lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BusyError(
                    f"{ref.study} ({ref.profile}) is being run by {file.read().strip() or 'another process'}; "
                    "wait for it, or see it with `python -m workbench status`"
                ) from None
            file.truncate(0)
            file.write(f"{Process.current()} since {durable.now()}\n")
            file.flush()
            yield
            file.truncate(0)

    # Trials

    def record(self, trial_id: str) -> TrialRecord:
        """Return all that is known of a trial; a pending one has no folder.

        One that nobody works on is read again only when its files change: those who watch a study ask every second.
        """
        stamps = _stamps(f"{self.root}/trials/{trial_id}")
        kept = self._settled.get(trial_id)
        if kept is not None and kept[0] == stamps:
            return kept[1]
        record = self._read_record(trial_id, self.trial_dir(trial_id))
        changed = max((stamp[1] for stamp in stamps if stamp), default=0)
        if record.state != "running" and time.time_ns() - changed > _SETTLED_NS:
            self._settled[trial_id] = (stamps, record)
        return record

    def _read_record(self, trial_id: str, folder: Path) -> TrialRecord:
        tried = attempts.read(folder)
        result, error = self.result(trial_id), durable.read_json(folder / "error.json")
        events = self.events(trial_id)
        epochs = {item.event.epoch: item.event for item in events if isinstance(item.event, EpochFinished)}
        progress = [item.event for item in events if isinstance(item.event, StepsTaken | EpochFinished)]
        totals = [item.event.total_steps for item in events if isinstance(item.event, TrainingStarted)]
        return TrialRecord(
            trial_id=trial_id,
            state=_state(folder, tried, result, error),
            attempts=len(tried),
            seconds=result["seconds"] if result else max((event.seconds for event in progress), default=0.0),
            # An attempt ends a moment after the result is there.
            total_seconds=max(sum(attempt.seconds for attempt in tried), result["total_seconds"] if result else 0.0),
            step=max((item.event.step for item in events), default=0),
            total_steps=totals[-1] if totals else None,
            epochs=tuple(epochs[number] for number in sorted(epochs)),
            metrics=self._metrics(folder) if result else {},
            result=result,
            error=error,
        )

    def scoring_seconds(self, trial_id: str, *, since: float) -> float:
        """Return how long the evaluations of a trial took that were written after `since`, seconds since the epoch."""
        found = self.trial_dir(trial_id).glob("evaluations/*/metrics.json")
        written = [durable.read_json(path) for path in found if path.stat().st_mtime >= since]
        return sum(plain["seconds"] for plain in written if plain is not None)

    def state(self, trial_id: str) -> TrialState:
        """Return a trial's state without reading its events."""
        folder = self.trial_dir(trial_id)
        return _state(folder, attempts.read(folder), self.result(trial_id), durable.read_json(folder / "error.json"))

    def result(self, trial_id: str) -> dict[str, Any] | None:
        """Return a trial's result.json; None unless it is whole and says finished or diverged."""
        plain = durable.read_json(self.trial_dir(trial_id) / "result.json")
        if plain is None or plain.get("trial_id") != trial_id or "finished_at" not in plain:
            return None
        return plain if plain.get("outcome") in ("finished", "diverged") else None

    def reader(self, trial_id: str) -> durable.EventReader:
        """Return a new reader of a trial's events."""
        return durable.EventReader(self.trial_dir(trial_id) / "events.jsonl")

    def events(self, trial_id: str) -> list[durable.StampedEvent]:
        """Return the events of a trial that count, oldest first."""
        reader = self._readers.setdefault(trial_id, self.reader(trial_id))
        reader.poll()
        return reader.events

    def history(self, results: StudyResults) -> "pd.DataFrame":
        """Return the curves of a study's trials as a tidy table; see `workbench.index`."""
        from workbench.index import history  # pandas takes half a second that status must not pay

        return history(results, path=self.index_dir / f"{results.plan.plan_hash}.parquet", events=self.events)

    def _metrics(self, folder: Path) -> dict[str, Metrics]:
        found: dict[str, Metrics] = {}
        for path in folder.glob("evaluations/*/metrics.json"):
            plain = durable.read_json(path)
            if plain is not None:
                found[path.parent.name] = Metrics.from_json(plain["metrics"])
        return found


def _ref(folder: Path, registered_at: str) -> StudyRef:
    study, profile, plan_hash = folder.parts[-3:]
    return StudyRef(study=study, profile=profile, plan_hash=plan_hash, registered_at=registered_at, path=folder)


def _stamps(folder: str) -> tuple[tuple[int, int, int] | None, ...]:
    """Return what changes with what a trial's record is read from; of many trials most have no folder yet."""
    found = durable.stamp(folder)
    return (None,) if found is None else tuple(durable.stamp(f"{folder}/{name}") for name in _RECORD)


def _post_hoc(plan: Plan, records: dict[str, TrialRecord], registered: Sequence[RegisteredPlan]) -> frozenset[str]:
    """Name the claims first registered, in any plan of this study and profile, after a trial had finished."""
    first = siblings.first_registered(registered)
    late: set[str] = set()
    for claim in plan.study.claims:
        variants = {term.variant for term in claim.terms}
        since = first.get(siblings.identity(asdict(claim)), durable.now())
        finished = [
            result["finished_at"]
            for trial in plan.trials
            if trial.variant in variants and (result := records[trial.trial_id].result)
        ]
        if any(time < since for time in finished):
            late.add(claim.id)
    return frozenset(late)


def _state(
    folder: Path,
    tried: tuple[attempts.Attempt, ...],
    result: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> TrialState:
    if result is not None:
        return result["outcome"]
    if tried and tried[-1].running(folder):
        return "running"
    if error is not None:
        return "failed"
    return "interrupted" if tried else "pending"


def _verdict_from_json(plain: dict[str, Any]) -> Verdict:
    known = {item.name for item in fields(Verdict)}
    values = {key: value for key, value in plain.items() if key in known}
    values["differences"] = {int(seed): value for seed, value in plain["differences"].items()}
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Verdict(**values)


def _readable(plain: dict[str, Any]) -> bool:
    try:
        plan_from_json(plain)
    except StoreError:
        return False
    return True
