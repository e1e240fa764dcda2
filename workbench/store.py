"""The only reader and writer of the runs folder: it owns every path in it.

    trials/<trial_id>/   spec.json  attempts/  events.jsonl  checkpoints/  evaluations/<eval_id>/{metrics.json,
                         predictions.parquet}  and, last of all, result.json or error.json
    studies/<study>/<profile>/<plan_hash>/   plan.json  study.yaml  registered.json  looks.json  verdicts.json
                         mlflow.json  last_run.json  attempts/ of drivers  and what reports and Ray write
    index/   cache/   mlflow.db   mlartifacts/

The state of a trial is derived from its files, so there is nothing to keep in step with them.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from workbench import checks, durable, search, settled, siblings, trial_files
from workbench.errors import StoreError
from workbench.hold import Hold, held
from workbench.plan import plan_from_json, plan_to_json
from workbench.records import StudyRef, StudyResults, TrialRecord, TrialState, Verdict
from workbench.siblings import RegisteredPlan
from workbench.study import Plan

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
        self._plans: dict[Path, tuple[RegisteredPlan, Plan]] = {}
        self._settled: dict[str, tuple[settled.Stamps, TrialRecord]] = {}  # with the stamps of the files it is from

    # Paths

    @property
    def cache_dir(self) -> Path:
        """Where data sets keep what they can rebuild."""
        return self.root / "cache"

    @property
    def index_dir(self) -> Path:
        """Where records of ended trials are kept; everything in it can be rebuilt."""
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

        Raises:
            StoreError: there are links in the folders of the plan or its trials.
        """
        folder = self.study_dir(plan)
        for place in (folder, *map(self.trial_dir, plan.specs)):
            durable.refuse_links(place)
        for name in ("plan.json", "registered.json"):
            siblings.set_aside_damaged(folder / name)
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
        kept = self._plans.get(ref.path)
        if kept is None or kept[0] is not found:  # a page asks every few seconds, and a plan of many trials is long
            kept = self._plans[ref.path] = found, plan_from_json(found.plain)
        return self.results_for(kept[1])

    def results_for(self, plan: Plan) -> StudyResults:
        """Return what is known of a plan's trials, also when the plan was never registered."""
        folder = self.study_dir(plan)
        if plan.study.search is not None:
            plan = search.expanded(plan, search.read(folder))
        records = {trial_id: self.record(trial_id) for trial_id in plan.specs}
        registered, unreadable = siblings.read_all(folder.parent)
        return StudyResults(
            plan=plan,
            runs=self.root,
            records=records,
            verdicts=checks.verdicts(durable.read_json(folder / "verdicts.json")),
            looks_started=min(len(checks.looks(durable.read_json(folder / "looks.json"))), len(plan.study.looks)),
            post_hoc=_post_hoc(plan, records, registered),
            looked_before=siblings.looked_before(plan, registered),
            unreadable=unreadable,
            mlflow=checks.mirror(durable.read_json(folder / "mlflow.json")),
        )

    def start_look(self, ref: StudyRef, number: int) -> None:
        """Record that the trials of look `number` (1 is the first), and so of all before it, are to be run."""
        path = ref.path / "looks.json"
        looks = checks.looks(durable.read_json(path))
        if len(looks) < number:
            siblings.set_aside_damaged(path)
            looks += [{"started_at": durable.now()}] * (number - len(looks))
            durable.write_json(path, {"looks": looks})

    def save_verdicts(self, ref: StudyRef, verdicts: tuple[Verdict, ...]) -> None:
        """Keep the verdicts; the file changes only when they do."""
        path, plain = ref.path / "verdicts.json", json.loads(json.dumps([asdict(verdict) for verdict in verdicts]))
        stored = durable.read_json(path)
        if stored is None or stored.get("verdicts") != plain:
            siblings.set_aside_damaged(path)
            durable.write_json(path, {"judged_at": durable.now(), "verdicts": plain})

    def save_last_run(self, ref: StudyRef, spent: dict[str, Any]) -> None:
        """Keep what the time of the last run went into."""
        durable.write_json(ref.path / "last_run.json", spent)

    def lock(self, ref: StudyRef, *, wait: Callable[[str], None] | None = None) -> AbstractContextManager[Hold]:
        """Hold a study for this driver, who keeps showing that it lives; a dead one's hold is taken over.

        `wait` is told of a driver that holds it, and it is waited for; without it that is an error.

        Raises:
            BusyError: another driver runs this plan.
        """
        return held(ref, wait=wait)

    # Trials

    def record(self, trial_id: str) -> TrialRecord:
        """Return all that is known of a trial; a pending one has no folder.

        One that nobody works on is read again only when its files change: those who watch a study ask every second.
        What has ended is kept in the index as well, without its events.
        """
        stamps = settled.stamps(f"{self.root}/trials/{trial_id}")
        kept = self._settled.get(trial_id)
        if kept is not None and kept[0] == stamps:
            return kept[1]
        path = self.index_dir / "trials" / f"{trial_id}.json"
        record = settled.read(path, stamps)
        if record is None:
            record = trial_files.read(self.trial_dir(trial_id), partial(self.events, trial_id))
            changed = max((stamp[1] for stamp in stamps if stamp), default=0)
            if record.state == "running" or time.time_ns() - changed <= _SETTLED_NS:
                return record
            if record.result is not None:
                settled.keep(path, stamps, record)
        self._readers.pop(trial_id, None)
        self._settled[trial_id] = (stamps, record)
        return record

    def scoring_seconds(self, trial_id: str, *, since: float) -> float:
        """Return how long the evaluations of a trial took that were written after `since`, seconds since the epoch."""
        found = self.trial_dir(trial_id).glob("evaluations/*/metrics.json")
        written = [path for path in found if path.stat().st_mtime >= since]
        return sum(checks.scoring_seconds(durable.read_json(path)) for path in written)

    def state(self, trial_id: str) -> TrialState:
        """Return a trial's state without reading its events."""
        return trial_files.state(self.trial_dir(trial_id))

    def result(self, trial_id: str) -> dict[str, Any] | None:
        """Return a trial's result.json; None unless it is whole and says finished or diverged."""
        return trial_files.result(self.trial_dir(trial_id))

    def errors(self, trial_id: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return the error.json of the attempt before the last, if that failed, and of the last."""
        folder = self.trial_dir(trial_id)
        earlier = sorted(folder.glob("error.before_attempt_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
        before = durable.read_json(earlier[-1]) if earlier else None
        return before, durable.read_json(folder / "error.json")

    def reader(self, trial_id: str, *, steps: bool = True) -> durable.EventReader:
        """Return a new reader of a trial's events."""
        return durable.EventReader(self.trial_dir(trial_id) / "events.jsonl", steps=steps)

    def events(self, trial_id: str, *, steps: bool = True) -> list[durable.StampedEvent]:
        """Return the events of a trial that count, oldest first; without `steps` none of progress within epochs."""
        if not steps or trial_id in self._settled:  # it has ended and is seldom asked for: nothing is kept in memory
            reader = self.reader(trial_id, steps=steps)
        else:
            reader = self._readers.setdefault(trial_id, self.reader(trial_id))
        reader.poll()
        return reader.events


def _ref(folder: Path, registered_at: str) -> StudyRef:
    study, profile, plan_hash = folder.parts[-3:]
    return StudyRef(study=study, profile=profile, plan_hash=plan_hash, registered_at=registered_at, path=folder)


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


def _readable(plain: dict[str, Any]) -> bool:
    try:
        plan_from_json(plain)
    except StoreError:
        return False
    return True
