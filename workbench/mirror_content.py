"""What MLflow is told of records, as plain values; `mlflow_mirror` sends it."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from core import numerics
from core.events import EpochFinished, StepsTaken
from workbench import durable, provenance, record_files
from workbench.records import StudyRef, StudyResults, TrialRecord
from workbench.series import numbers
from workbench.store import Store
from workbench.study import Plan, PlannedTrial

Point = tuple[str, float, int, int]
"""A metric's name, value, time in milliseconds and step."""

LAST_RUN = "last_run.json"
"""Written after the last round of a run, so it is sent by the next one, or by `sync`."""

STATUS = {
    "pending": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FAILED",  # an outcome for the study, and no finished training; the tag `state` says which
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class Feed:
    """The points of one trial that MLflow has not got."""

    def __init__(self, store: Store, trial_id: str) -> None:
        self._reader = store.reader(trial_id)
        self._waiting: list[durable.StampedEvent] = []
        self._furthest = (0, "")  # the last step, and when it was first taken

    def points(self, marks: list[int]) -> tuple[list[Point], list[int]]:
        """Return (name, value, time, step) of what is new beyond `marks`, and the new marks.

        Marks are the last steps sent of StepsTaken and EpochFinished: after a resume some steps happen again, and
        MLflow would keep both.
        """
        self._waiting += self._reader.poll()
        reached, points = list(marks), []
        for stamped in self._waiting:
            event = stamped.event
            self._furthest = max(self._furthest, (event.step, stamped.time), key=lambda pair: pair[0])
            if not isinstance(event, StepsTaken | EpochFinished):
                continue
            kind = 0 if isinstance(event, StepsTaken) else 1
            if event.step <= reached[kind]:
                continue
            reached[kind] = event.step
            time = milliseconds(stamped.time)
            points += [
                (f"{_FOLDERS[parameters]}{name}", value, time, event.step)
                for (parameters, name), value in numbers(event).items()
                if math.isfinite(value)  # MLflow would store an infinity as 1.8e308
            ]
        return points, reached

    def final_points(self, trial: PlannedTrial, record: TrialRecord) -> list[Point]:
        """Return the scores of a finished trial on the whole validation split.

        Their time is that of the last step, when it was first taken: a trial that is trained again, because somebody
        asks for another evaluation and its checkpoint is gone, has a new result and no new point.
        """
        if record.result is None:
            return []
        time, step = milliseconds(self._furthest[1] or record.result["finished_at"]), record.result["step"]
        return [
            (f"{'final' if parameters == 'raw' else 'final_averaged'}/{name}", value, time, step)
            for parameters, eval_id in trial.evaluations.items()
            if eval_id in record.metrics
            for name, value in record.metrics[eval_id].numbers().items()
        ]

    def sent(self) -> None:
        """Forget what has been sent."""
        self._waiting.clear()


_FOLDERS = {"": "", "raw": "val/", "averaged": "averaged/"}


def report_files(ref: StudyRef) -> list[Path]:
    """Return what is kept of a study for readers of MLflow only: anybody can render it again from the records."""
    return [path for path in sorted(ref.path.glob("report*")) if path.is_file()]


def study_stamps(ref: StudyRef) -> dict[str, list[int]]:
    """Return size and time of change of the files of a study's record, by name."""
    names = record_files.present("study", ref.path)
    return {name: list(stamp[1:]) for name in names if (stamp := durable.stamp(ref.path / name)) is not None}


def study_params(plan: Plan) -> dict[str, str]:
    """Return the question, the variants and the claims as they were declared."""
    study = plan.study
    return {
        "question": study.question,
        "baseline": study.baseline,
        "variants": ", ".join(variant.name for variant in study.variants),
        "looks": ", ".join(f"{look.seeds} seeds at alpha {look.alpha:g}" for look in study.looks),
        **{f"claim.{claim.id}": f"{claim.text} ({claim.kind}, margin {claim.margin:g})" for claim in study.claims},
    }


def study_tags(plan: Plan) -> dict[str, str]:
    """Return what tells a plan's run from others."""
    return {"kind": "plan", "study": plan.study.name, "profile": plan.study.profile, "plan_hash": plan.plan_hash}


def trial_tags(trial: PlannedTrial, record: TrialRecord, *, began_at: str) -> dict[str, Any]:
    """Return what a trial's run is known by, and how it stands."""
    revision, dirty = provenance.git()
    source = (record.result or {}).get("provenance") or {"git_revision": revision, "git_dirty": dirty}
    return {
        "variant": trial.variant,
        "seed": trial.seed,
        "began_at": began_at,
        "git_revision": source["git_revision"],
        "git_dirty": source["git_dirty"],
        "numerics": numerics.VERSION,
        "state": record.state,
        "attempts": record.attempts,
        **({"outcome": record.result["outcome"]} if record.result else {}),
        **({"error": record.error["message"]} if record.error else {}),
        **({"reason": record.stopped["reason"]} if record.stopped else {}),
    }


PASSING_TAGS = ("outcome", "error")
"""Those of `trial_tags` that a trial may have and then no more, because it is tried again."""


def keys(plan: Plan) -> dict[tuple[str, int], str]:
    """Return the names that the runs of trials have in mlflow.json, by variant and seed.

    A trial's id, for the first variant that has the trial; variants that differ in their evaluation share trials, and
    each has a run of its own.
    """
    found: dict[tuple[str, int], str] = {}
    taken: set[str] = set()
    for trial in plan.trials:
        key = f"{trial.trial_id}/{trial.variant}" if trial.trial_id in taken else trial.trial_id
        taken.add(trial.trial_id)
        found[trial.variant, trial.seed] = key
    return found


def started(results: StudyResults) -> tuple[PlannedTrial, ...]:
    """Return the trials of the looks started, the first at least."""
    looks = results.plan.study.looks[: max(1, results.looks_started)]
    return results.plan.at_look(looks[-1])


def reached(record: TrialRecord) -> list[Any]:
    """What MLflow has of a trial once all of it is sent."""
    return [
        record.state,
        record.attempts,
        record.step,
        sorted(record.metrics),
        round(record.total_seconds, 3),
        ended_at(record),
    ]


def study_reached(results: StudyResults, ref: StudyRef, *, over: bool) -> list[Any]:
    """Return the status of a plan's run, the verdicts that it shows and its files but the last run's costs.

    `over` says that its driver does no more.
    """
    verdicts = [[verdict.claim, verdict.verdict, verdict.n_pairs] for verdict in results.verdicts]
    files = {name: stamp for name, stamp in study_stamps(ref).items() if name != LAST_RUN}
    records = [results.records[trial.trial_id] for trial in started(results)]
    states = {"finished" if record.stopped else record.state for record in records}
    if not over:
        return ["RUNNING", verdicts, files]
    if states <= {"finished", "diverged"}:
        return ["FINISHED", verdicts, files]
    return ["FAILED" if "failed" in states else "KILLED", verdicts, files]


def ended_at(record: TrialRecord) -> int | None:
    """Return when a trial ended, in milliseconds; None where no file says so."""
    time = (record.result or {}).get("finished_at") or (record.error or {}).get("failed_at")
    return None if time is None else milliseconds(time)


def milliseconds(time: str) -> int:
    """Return a recorded time as MLflow has it."""
    return round(datetime.fromisoformat(time).timestamp() * 1000)
