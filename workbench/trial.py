"""Run one trial in this process: train, score, and put everything on record.

The order of the files is the contract: events as they come, each evaluation when it is done, `result.json` last. So a
trial that has a result is complete, and one that has none goes on where its checkpoints and evaluations end.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core import numerics
from core.checkpoint_files import keep_only
from core.config import EvaluationConfig
from core.custom import given_as_text
from core.events import CheckpointPassedOver, CheckpointSaved, Event, TrainingStarted
from workbench import attempts, disk, durable, lineage, predictions, provenance, retention, trial_files
from workbench.errors import BusyError, WorkbenchError
from workbench.failures import FailureClass, classify
from workbench.lease import Heart
from workbench.processes import Process
from workbench.records import TrialRecord
from workbench.redaction import redact
from workbench.store import Store
from workbench.study import TrialSpec
from workbench.trainers import CoreTrainer, Trainer
from workbench.user_code import FLAG, custom_parts

if TYPE_CHECKING:
    from core.data.splits import DataSplits
    from core.training import TrainResult


_STALLED = 75  # exit code of a process that ends itself because its work hangs


class _Superseded(Exception):  # noqa: N818 - a reason to leave, not an error
    """Another process has taken the trial over, so this one must not write any more."""


def complete(record: TrialRecord, spec: TrialSpec) -> bool:
    """Tell whether nothing is left to do: the trial diverged, or is finished and scored as `spec` asks."""
    return record.state == "diverged" or (
        record.state == "finished" and spec.evaluations.keys() <= record.metrics.keys()
    )


def execute(  # noqa: PLR0913 - what a trial can be told
    spec: TrialSpec,
    runs: Path,
    *,
    should_stop: Callable[[], bool],
    device: str = "cpu",
    driver: Process | None = None,
    trainer: Trainer | None = None,
    allow_code: bool = False,
    stall_seconds: float | None = None,
    gpus: float = 0.0,
    placement: Mapping[str, Any] | None = None,
) -> attempts.Outcome | Literal["busy"]:
    """Bring a trial as far as it goes and return how this attempt ended; whatever the trial raises becomes its record.

    Args:
        spec: what to compute.
        runs: the runs folder.
        should_stop: asked after each step; the trial then writes a checkpoint and ends as `interrupted`.
        device: a torch device.
        driver: the process that asked for the trial; when it dies, the trial stops as well.
        trainer: the detector's code; `core` by default.
        allow_code: whether the user allows the code of custom parts to run.
        stall_seconds: without a step or a scored batch, after which this process records `stalled` and ends itself;
            None never does.
        gpus: how many the trial holds, for the record.
        placement: how many processes and which share of a GPU it has, for the provenance of its result.

    Returns:
        `busy` when another process works on the trial or has taken it over.

    Raises:
        WorkbenchError: the trial would run code that is not allowed; nothing was begun.
    """
    store = Store(runs)
    record = store.record(spec.trial_id)
    if complete(record, spec):
        return "diverged" if record.state == "diverged" else "finished"
    parts = [*map(str, custom_parts(spec.config)), *spec.code]
    if parts and not allow_code:
        raise WorkbenchError(f"{spec.trial_id}: {parts[0]} is code of your own, which runs with {FLAG} only")
    if should_stop():
        return "interrupted"
    folder = store.trial_dir(spec.trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        attempt = attempts.begin(folder, driver=driver, gpus=gpus)
    except BusyError:
        return "busy"
    work = _Work(
        spec=spec,
        store=store,
        attempt=attempt,
        should_stop=should_stop,
        device=device,
        placement=dict(placement or {}),
    )
    with work.beating(stall_seconds):
        return work.run(trainer or CoreTrainer(device))


@dataclass(kw_only=True)
class _Work:
    """One attempt at a trial."""

    spec: TrialSpec
    store: Store
    attempt: attempts.Attempt
    should_stop: Callable[[], bool]
    device: str
    placement: dict[str, Any]

    def __post_init__(self) -> None:
        self.folder = self.store.trial_dir(self.spec.trial_id)
        self._began = time.monotonic()
        self._cpu_began = _cpu_seconds()
        self._step = 0
        self._next_look = 0.0

    @contextmanager
    def beating(self, stall_seconds: float | None) -> Iterator[None]:
        """Show within the block that this process lives, and that its work goes on."""
        path = attempts.beat_file(self.folder, self.attempt.number)
        self._main_thread = threading.get_ident()
        self._heart = Heart(path, stall_seconds=stall_seconds, on_stall=self._end_stalled)
        try:
            yield
        finally:
            self._heart.stop()

    def run(self, trainer: Trainer) -> attempts.Outcome | Literal["busy"]:
        """Train and score; record the end whatever it is."""
        failure: FailureClass | None = None
        try:
            self._prepare_files()
            writer = durable.EventWriter(self.folder / "events.jsonl", attempt=self.attempt.number)
            with closing(writer) as events, given_as_text(self.spec.code, folder=self.folder / "code"):
                outcome = self._train_and_score(trainer, events)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a trial raises is an outcome, on record
            if self._superseded():
                return "busy"
            outcome, failure = "failed", classify(error)
            trace = "".join(traceback.format_exception(error))
            self._record_error(failure, type(error).__name__, str(error) or type(error).__name__, trace)
        except KeyboardInterrupt:  # of a second Ctrl-C inline, by which the process may live on, as in a notebook
            self._end("interrupted")
            raise
        self._end(outcome, failure)
        return outcome

    def _prepare_files(self) -> None:
        # Now, since the working tree may change while this process goes on with the code that it has loaded.
        training = self.spec.config.training
        self._provenance = provenance.collect(
            threads=training.threads, device=self.device, precision=training.precision
        )
        self._provenance |= self.placement
        trial_files.set_aside_damaged(self.folder)
        self._saved = [item.event for item in self.store.events(self.spec.trial_id)]
        self._rename_earlier("error.json")
        durable.write_json(self.folder / "spec.json", spec_to_json(self.spec))
        lineage.begin(self.folder, self.attempt.number, self._provenance, code=self.store.code_dir)

    def _rename_earlier(self, name: str) -> None:
        path = self.folder / name
        if path.exists():
            path.replace(path.with_name(f"{path.stem}.before_attempt_{self.attempt.number}.json"))

    def _train_and_score(self, trainer: Trainer, events: durable.EventWriter) -> attempts.Outcome:
        def on_event(event: Event) -> None:
            self._check_owner()
            self._step = event.step
            events.append(event)
            if isinstance(event, TrainingStarted):
                self._check_start(event.step, events)

        spec = self.spec
        root = Path(spec.data_root) if spec.data_root else None
        data = trainer.open_data(spec.config, root=root, cache=self.store.cache_dir)
        trained = trainer.train(
            spec.config,
            seed=spec.seed,
            data=data,
            checkpoints=self.folder / "checkpoints",
            on_event=on_event,
            should_stop=self._stop,
        )
        self._check_owner()
        if trained.outcome == "finished":
            for eval_id, evaluation in spec.evaluations.items():
                if self._stop():
                    return "interrupted"
                self._score(trainer, data, eval_id, evaluation, trained)
        if trained.outcome != "interrupted":
            self._check_owner()
            events.sync()
            self._record_result(trained, data.report)
            if trained.checkpoint is not None:
                keep_only(trained.checkpoint)  # the one before was for the case that this one is damaged
        return trained.outcome

    def _check_start(self, step: int, events: durable.EventWriter) -> None:
        """Put on record what had been trained before and is trained again, since its checkpoint is gone."""
        saved = [event for event in self._saved if isinstance(event, CheckpointSaved)]
        if saved and saved[-1].step > step and not any((self.folder / "checkpoints").glob(f"{saved[-1].path}*")):
            reason = "removed for the quota" if retention.was_removed(self.folder) else "missing"
            events.append(CheckpointPassedOver(step=step, path=saved[-1].path, reason=reason))
        ended = self.store.result(self.spec.trial_id)
        if ended is not None and step < ended.get("step", step):
            self._rename_earlier("result.json")  # a trial that is trained again is not finished
            retention.forget(self.folder)

    def _score(
        self, trainer: Trainer, data: DataSplits, eval_id: str, evaluation: EvaluationConfig, trained: TrainResult
    ) -> None:
        folder = self.store.evaluation_dir(self.spec.trial_id, eval_id)
        if trial_files.evaluation(folder, weights_hash=trained.weights_hash) is not None:
            return
        if trained.checkpoint is None:
            raise WorkbenchError(f"{self.spec.trial_id}: the training left no checkpoint to score")
        scored = trainer.evaluate(
            self.spec.config, evaluation, data=data, checkpoint=trained.checkpoint, on_batch=self._heart.pulse
        )
        self._check_owner()
        path = self.store.predictions(self.spec.trial_id, eval_id)
        durable.write_with(path, lambda draft: predictions.write(draft, scored.predictions))
        durable.write_json(
            folder / "metrics.json",
            {
                "eval_id": eval_id,
                "evaluation": evaluation.model_dump(mode="json"),
                "weights_hash": trained.weights_hash,
                "metrics": scored.metrics.to_json(),
                "seconds": scored.seconds,
            },
        )

    def _record_result(self, trained: TrainResult, data_report: Mapping[str, Any]) -> None:
        if self.store.result(self.spec.trial_id) is not None:
            return  # only an evaluation was missing
        earlier = attempts.read(self.folder)[:-1]
        seconds, cpu_seconds = self._spent()
        durable.write_json(
            self.folder / "result.json",
            {
                "trial_id": self.spec.trial_id,
                "outcome": trained.outcome,
                "reason": trained.reason,
                "step": trained.step,
                "seconds": trained.seconds,
                "total_seconds": seconds + sum(attempt.seconds for attempt in earlier),
                "cpu_seconds": cpu_seconds + sum(attempt.cpu_seconds for attempt in earlier),
                "attempts": self.attempt.number,
                "weights_hash": trained.weights_hash,
                "peak_memory_bytes": trained.peak_memory_bytes,
                "num_parameters": trained.num_parameters,
                "checkpoint": trained.checkpoint and trained.checkpoint.name,
                "data_report": dict(data_report),
                "damaged": trial_files.damaged(self.folder),
                "provenance": lineage.of_result(self.folder, self.attempt.number, self._provenance),
                "finished_at": durable.now(),
            },
        )

    def _record_error(self, kind: FailureClass, error_type: str, message: str, trace: str) -> None:
        write_error(
            self.folder,
            kind=kind,
            error_type=error_type,
            message=message,
            attempt=self.attempt.number,
            step=self._step,
            trace=trace[-4000:],
        )

    def _end(self, outcome: attempts.Outcome, failure: FailureClass | None = None) -> None:
        seconds, cpu_seconds = self._spent()
        attempts.end(
            self.folder, self.attempt, outcome=outcome, seconds=seconds, cpu_seconds=cpu_seconds, failure=failure
        )

    def _end_stalled(self) -> None:  # in the heart's thread
        """Record where the work hangs and end the process, which nothing else could."""
        try:
            if not self._superseded():
                frame = sys._current_frames().get(self._main_thread)
                trace = "".join(traceback.format_stack(frame)) if frame else ""
                where = f"where it hangs is in {self.folder / 'error.json'}"
                message = f"no step and no scored batch for longer than execution.stall_after allows; {where}"
                self._record_error("stalled", "Stalled", message, trace)
                self._end("failed", "stalled")
        finally:  # also when nothing can be put on record: who waits for this process has its exit code
            os._exit(_STALLED)

    def _spent(self) -> tuple[float, float]:
        return time.monotonic() - self._began, _cpu_seconds() - self._cpu_began

    def _superseded(self) -> bool:
        return attempts.superseded(self.folder, self.attempt)

    def _check_owner(self) -> None:
        if self._superseded():
            raise _Superseded

    def _stop(self) -> bool:
        """Whether to stop; looked up a few times a second at most, since a step may take a millisecond."""
        self._heart.pulse()
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + 0.2
        driver = self.attempt.driver
        orphaned = driver is not None and driver.is_here() and not driver.alive()
        return orphaned or self.should_stop()


def spec_to_json(spec: TrialSpec) -> dict[str, Any]:
    """Return the content of spec.json."""
    return {
        "trial_id": spec.trial_id,
        "seed": spec.seed,
        "numerics": numerics.VERSION,
        "data_root": spec.data_root,
        "data_fingerprint": spec.data_fingerprint,
        "config": spec.config.model_dump(mode="json"),
        "evaluations": {eval_id: item.model_dump(mode="json") for eval_id, item in spec.evaluations.items()},
        "code": spec.code,
    }


def write_error(
    folder: Path, *, kind: FailureClass, error_type: str, message: str, attempt: int, step: int, trace: str
) -> None:
    """Write error.json, in which `kind` is called `class`; secrets in what was raised are left out."""
    told = {
        "class": kind,
        "type": error_type,
        "message": redact(message),
        "attempt": attempt,
        "step": step,
        "traceback": redact(trace),
        "failed_at": durable.now(),
    }
    disk.patiently(lambda: durable.write_json(folder / "error.json", told))


def record_loss(store: Store, trial_id: str, attempt: attempts.Attempt, *, kind: FailureClass, message: str) -> None:
    """Put on record how an attempt ended whose process is dead and can say nothing more."""
    folder, step = store.trial_dir(trial_id), store.record(trial_id).step
    write_error(folder, kind=kind, error_type="Lost", message=message, attempt=attempt.number, step=step, trace="")
    attempts.end_for_dead(folder, attempt, outcome="failed", failure=kind)


def _cpu_seconds() -> float:
    """CPU time of this process and of the loaders that it has ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
