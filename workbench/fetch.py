"""`fetch`: rebuild records from MLflow on another machine. What is there already is kept.

A server is a stranger. Only files of a record are taken, each of the size and content that its manifest says; they are
read in a folder of their own as any record is, and only what can be read is put in place: a new record by renaming its
folder, so it is there whole or not at all. Checkpoints are not in MLflow, so a fetched trial can be judged and shown,
and one that was not finished starts over where it is run.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from core.events import EpochFinished, StepsTaken
from workbench import attempts, durable, placing, record_files, search
from workbench.errors import StoreError, WorkbenchError
from workbench.mirror_content import keys
from workbench.mlflow_mirror.download import NAME, MissingFile, Remote, RemotePlan
from workbench.placing import Outcome
from workbench.plan import plan_from_json
from workbench.record_files import Entry, Kind
from workbench.records import StudyRef
from workbench.report import render
from workbench.screen import line_to
from workbench.series import numbers
from workbench.store import Store
from workbench.study import Plan

_STAGING = ".fetch-"
_FORGOTTEN_SECONDS = 24 * 3600.0  # after which what a killed fetch left is removed


def fetch(store: Store, *, tracking_uri: str, study: str, profile: str | None = None, out: TextIO, err: TextIO) -> int:
    """Rebuild a study's records from MLflow; return 0, or 1 when something was refused or a record here differs.

    Raises:
        WorkbenchError: MLflow cannot be reached or has no such study, or a name is none.
    """
    for option, name in (("--study", study), ("--profile", profile)):
        if name is not None and not NAME.fullmatch(name):
            raise WorkbenchError(f"{option} {name}: letters, digits, - and _ make a name, as in the study's file")
    remote = Remote(tracking_uri)
    plans = remote.plans(study, profile)
    if not plans:
        raise WorkbenchError(f"{remote.tracking_uri} has no study {study}{f' at profile {profile}' if profile else ''}")
    code = 0
    for found in plans:
        with _staging(store) as folder:
            work = _Fetch(store, remote, found, folder, err=err)
            work.run()
        told = Counter(work.outcomes.values())
        counts = ", ".join(f"{told[name]} {word}" for name, word in _WORDS.items() if told[name])
        out.write(f"{study} ({found.profile}), plan {found.plan_hash}: {counts or 'no trial'}\n")
        code |= int(work.incomplete)
    return code


_WORDS: dict[Outcome, str] = {
    "new": "trials fetched",
    "updated": "brought up to date",
    "same": "already here",
    "kept": "kept as they are here",
    "absent": "not finished when they were copied",
    "refused": "refused",
}


class _Fetch:
    """The fetching of one plan. `outcomes` are of its trials, by id."""

    def __init__(self, store: Store, remote: Remote, found: RemotePlan, folder: Path, *, err: TextIO) -> None:
        self.store, self.remote, self.found, self.err = store, remote, found, err
        self.staged = Store(folder, create=False)
        self.outcomes: dict[str, Outcome] = {}
        self.incomplete = False

    def run(self) -> None:
        """Fetch the plan's trials, then the plan: so whoever sees the plan sees its trials."""
        found = self.found
        label = f"{found.study} ({found.profile}), plan {found.plan_hash}"
        if found.copies > 1:
            self._say(f"{label}: MLflow has {found.copies} copies of it; the one with most trials finished is taken")
        staged = self.staged.root / "studies" / found.study / found.profile / found.plan_hash
        try:
            entries = self._download(found.run_id, "study", staged, self._study_folder())
            plan = self._plan(staged if (staged / "plan.json").exists() else self._study_folder())
        except MissingFile as missing:
            self._refuse(label, f"MLflow has no {missing} of it: run `sync` of this version where it was trained")
            return
        except (ValueError, StoreError) as error:
            self._refuse(label, str(error))
            return
        for trial_id, run in self._runs(plan).items():
            self.outcomes[trial_id] = self._trial(plan, trial_id, run)
        self._study(plan, staged, entries, label)

    # Trials

    def _runs(self, plan: Plan) -> dict[str, str]:
        """Return the run of each trial; of variants that share a trial the first one's, as all have its files."""
        runs: dict[str, str] = {}
        for trial in plan.trials:
            run = self.found.runs.get((trial.variant, trial.trial_id))
            if run is not None:
                runs.setdefault(trial.trial_id, run)
        return runs

    def _trial(self, plan: Plan, trial_id: str, run: str) -> Outcome:
        staged, here = self.staged.trial_dir(trial_id), self.store.trial_dir(trial_id)
        try:
            entries = self._download(run, "trial", staged, here)
            if staged.exists():
                self._check_trial(plan, trial_id, staged)
        except MissingFile as missing:
            if str(missing) == record_files.MANIFEST:
                return "absent"
            return self._refuse(trial_id, f"MLflow has no {missing} of it")
        except Exception as error:
            if isinstance(error, WorkbenchError) and not isinstance(error, StoreError):
                raise
            shutil.rmtree(staged, ignore_errors=True)  # or it would keep the plan from being read
            return self._refuse(trial_id, f"{type(error).__name__}: {error}"[:300])
        return self._place("trial", staged, here, entries, run, label=f"trial {trial_id}")

    def _check_trial(self, plan: Plan, trial_id: str, folder: Path) -> None:
        """Read all that is later read of a trial; what a reader cannot take raises here."""
        spec = durable.read_json(folder / "spec.json")
        if spec is not None and (spec["trial_id"], spec["seed"]) != (trial_id, plan.specs[trial_id].seed):
            raise ValueError(f"its spec.json is of trial {spec['trial_id']!r}")
        result = durable.read_json(folder / "result.json")
        if result is not None and self.staged.result(trial_id) is None:
            raise ValueError("its result.json says neither finished nor diverged")
        if durable.damaged(folder / "error.json"):
            raise ValueError("its error.json is damaged")
        events = self.staged.events(trial_id)
        for stamped in events:
            datetime.fromisoformat(stamped.time)
            if isinstance(stamped.event, StepsTaken | EpochFinished):
                [float(value) for value in numbers(stamped.event).values()]
        self.staged.record(trial_id)
        _restore_times(folder, events[-1].time if events else None)

    # The plan

    def _study_folder(self) -> Path:
        return self.store.root / "studies" / self.found.study / self.found.profile / self.found.plan_hash

    def _plan(self, folder: Path) -> Plan:
        """Read the plan. Raises ValueError or StoreError where it is none, or another."""
        plain = durable.read_json(folder / "plan.json")
        if plain is None:
            raise ValueError("its plan.json is damaged")
        try:
            plan = plan_from_json(plain)
        except RecursionError as error:
            raise ValueError("its plan.json is nested too deeply") from error
        found = (plan.study.name, plan.study.profile, plan.plan_hash)
        if found != (self.found.study, self.found.profile, self.found.plan_hash):
            raise ValueError(f"its plan.json is of {' '.join(map(str, found))}")
        return plan if plan.study.search is None else search.expanded(plan, search.read(folder))

    def _study(self, plan: Plan, staged: Path, entries: dict[str, Entry], label: str) -> None:
        here = self._study_folder()
        if staged.exists():
            try:
                ref = next((ref for ref in self.staged.studies() if ref.path == staged and ref.registered_at), None)
                if ref is None:
                    raise ValueError("its registered.json is missing or damaged")
                datetime.fromisoformat(ref.registered_at)
                render(self.staged.results(ref), format="text")
            except Exception as error:  # noqa: BLE001 - as above: whatever breaks a reader is refused
                self._refuse(label, f"{type(error).__name__}: {error}"[:300])
                return
            names = keys(plan)
            runs = {
                names[trial.variant, trial.seed]: run
                for trial in plan.trials
                if (run := self.found.runs.get((trial.variant, trial.trial_id)))
            }
            mirror = {
                "tracking_uri": self.remote.tracking_uri,
                "experiment_id": self.found.experiment_id,
                "parent_run_id": self.found.run_id,
                "runs": runs,
                "watermarks": {},
                "reached": {},
            }
            if not (here / "mlflow.json").exists():
                durable.write_json(staged / "mlflow.json", mirror, indent=None)
        with self._locked(here):
            self._place("study", staged, here, entries, self.found.run_id, label=label)
        self._report(here)

    @contextmanager
    def _locked(self, here: Path) -> Iterator[None]:
        """Hold a plan that is here already: a driver may be at work on it."""
        if not here.exists():
            yield
            return
        study, profile, plan_hash = here.parts[-3:]
        with self.store.lock(StudyRef(study=study, profile=profile, plan_hash=plan_hash, registered_at="", path=here)):
            yield

    def _report(self, here: Path) -> None:
        """Render the report from the records: a stranger's is not taken."""
        ref = next((ref for ref in self.store.studies() if ref.path == here), None)
        if ref is None:
            return
        try:
            render(self.store.results(ref), format="md", out=here / "report.md")
        except Exception as error:  # noqa: BLE001 - as above, of numbers that only together break it
            self._refuse(f"the report of {here}", f"{type(error).__name__}: {error}"[:300])

    # One record

    def _download(self, run: str, kind: Kind, staged: Path, here: Path) -> dict[str, Entry]:
        """Fetch a record to `staged`, unless all of it is `here` already; return its manifest."""
        entries = self.remote.manifest(run, kind)
        if not placing.differing(entries, here):
            return entries
        for name, entry in entries.items():
            self.remote.file(run, name, entry, staged / name)
        return entries

    def _place(
        self, kind: Kind, staged: Path, here: Path, entries: dict[str, Entry], run: str, *, label: str
    ) -> Outcome:
        """Put a record in place, or tell why it is not."""
        source = {"tracking_uri": self.remote.tracking_uri, "run_id": run}
        outcome, names = placing.place(kind, staged, here, entries, source=source)
        if outcome == "kept":
            told = ", ".join(names[:4])
            self._say(f"{label}: differs from what is here ({told}); {here} is kept. Move it away to fetch the other.")
            self.incomplete = True
        return outcome

    def _refuse(self, label: str, why: str) -> Outcome:
        self._say(f"{label}: left out: {why}")
        self.incomplete = True
        return "refused"

    def _say(self, line: str) -> None:
        line_to(self.err)(line)


def _restore_times(folder: Path, last: str | None) -> None:
    """Give the files by which a worker is known to live the time of its last event: the copy is no sign of life."""
    began = [attempt.began_at for attempt in attempts.read(folder)]
    times = [time for time in (last, *began) if time]
    if times:
        then = max(datetime.fromisoformat(time).timestamp() for time in times)
        for path in (folder / "events.jsonl", *(folder / "attempts").glob("*.json")):
            if path.exists():
                os.utime(path, (then, then))


@contextmanager
def _staging(store: Store) -> Iterator[Path]:
    """Give a folder beside the records, so that they are put in place by renaming."""
    for path in store.root.glob(f"{_STAGING}*"):
        if time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=store.root, prefix=_STAGING, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
