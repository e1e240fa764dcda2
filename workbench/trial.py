"""Run one trial in this process: train, score, and put everything on record.

The order of the files is the contract: events as they come, each evaluation when it is done, `result.json` last. So a
trial that has a result is complete, and one that has none goes on where its checkpoints and evaluations end.
"""

from __future__ import annotations

import os
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from core import numerics
from core.config import EvaluationConfig, ExperimentConfig
from core.custom import given_as_text
from core.events import Event
from workbench import attempts, durable, provenance
from workbench.errors import BusyError, WorkbenchError
from workbench.failures import FailureClass, classify
from workbench.processes import Process
from workbench.records import TrialRecord
from workbench.store import Store
from workbench.study import TrialSpec
from workbench.user_code import FLAG, custom_parts

if TYPE_CHECKING:
    import numpy as np

    from core.data.splits import DataSplits
    from core.evaluation.score import Evaluation
    from core.training import TrainResult


class Trainer(Protocol):
    """What a trial needs of a detector's code."""

    def open_data(self, config: ExperimentConfig, *, root: Path | None, cache: Path) -> DataSplits:
        """Return the pictures; `report` counts what was left out."""
        ...

    def train(
        self,
        config: ExperimentConfig,
        *,
        seed: int,
        data: DataSplits,
        checkpoints: Path,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> TrainResult:
        """Train, resuming from the newest checkpoint."""
        ...

    def evaluate(
        self, config: ExperimentConfig, evaluation: EvaluationConfig, *, data: DataSplits, checkpoint: Path
    ) -> Evaluation:
        """Score a checkpoint."""
        ...


class CoreTrainer:
    """The detector of `core`, on one device. Importing torch waits until a trial begins."""

    def __init__(self, device: str) -> None:
        self.device = device

    def open_data(self, config: ExperimentConfig, *, root: Path | None, cache: Path) -> DataSplits:
        """Open the trial's pictures."""
        from core.data.splits import open_data  # torch takes seconds

        return open_data(config.data, root=root, cache=cache)

    def train(self, config: ExperimentConfig, **rest: Any) -> TrainResult:
        """Train with `core.training`."""
        import torch  # torch takes seconds

        from core.training import train

        return train(config, device=torch.device(self.device), **rest)

    def evaluate(self, config: ExperimentConfig, evaluation: EvaluationConfig, **rest: Any) -> Evaluation:
        """Score with `core.evaluation`."""
        import torch  # torch takes seconds

        from core.evaluation.score import evaluate

        return evaluate(config, evaluation, device=torch.device(self.device), **rest)


class _Superseded(Exception):  # noqa: N818 - a reason to leave, not an error
    """Another process has taken the trial over, so this one must not write any more."""


def complete(record: TrialRecord, spec: TrialSpec) -> bool:
    """Tell whether nothing is left to do: the trial diverged, or is finished and scored as `spec` asks."""
    return record.state == "diverged" or (
        record.state == "finished" and spec.evaluations.keys() <= record.metrics.keys()
    )


def execute(
    spec: TrialSpec,
    runs: Path,
    *,
    should_stop: Callable[[], bool],
    device: str = "cpu",
    driver: Process | None = None,
    trainer: Trainer | None = None,
    allow_code: bool = False,
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
        attempt = attempts.begin(folder, driver=driver)
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
    return work.run(trainer or CoreTrainer(device))


@dataclass(kw_only=True)
class _Work:
    """One attempt at a trial."""

    spec: TrialSpec
    store: Store
    attempt: attempts.Attempt
    should_stop: Callable[[], bool]
    device: str
    placement: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.folder = self.store.trial_dir(self.spec.trial_id)
        self._began = time.monotonic()
        self._cpu_began = _cpu_seconds()
        self._step = 0
        self._next_look = 0.0
        # Now, since the working tree may change while this process goes on with the code that it has loaded.
        self._provenance = provenance.collect(threads=self.spec.config.training.threads, device=self.device)

    def run(self, trainer: Trainer) -> attempts.Outcome | Literal["busy"]:
        """Train and score; record the end whatever it is."""
        self._prepare_files()
        events = durable.EventWriter(self.folder / "events.jsonl", attempt=self.attempt.number)
        try:
            with given_as_text(self.spec.code, folder=self.folder / "code"):
                outcome = self._train_and_score(trainer, events)
        except _Superseded:
            return "busy"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a trial raises is an outcome, on record
            self._record_error(error)
            outcome = "failed"
        finally:
            events.close()
        self._end(outcome)
        return outcome

    def _prepare_files(self) -> None:
        for name in ("result.json", "error.json"):
            path = self.folder / name
            if path.exists() and (name == "error.json" or self.store.result(self.spec.trial_id) is None):
                path.replace(path.with_name(f"{path.stem}.before_attempt_{self.attempt.number}.json"))
        durable.write_json(self.folder / "spec.json", spec_to_json(self.spec))

    def _train_and_score(self, trainer: Trainer, events: durable.EventWriter) -> attempts.Outcome:
        def on_event(event: Event) -> None:
            self._check_owner()
            self._step = event.step
            events.append(event)

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
            self._record_result(trained, data.report)
        return trained.outcome

    def _score(
        self, trainer: Trainer, data: DataSplits, eval_id: str, evaluation: EvaluationConfig, trained: TrainResult
    ) -> None:
        folder = self.store.evaluation_dir(self.spec.trial_id, eval_id)
        known = durable.read_json(folder / "metrics.json")
        if known is not None and known["weights_hash"] == trained.weights_hash:
            return
        if trained.checkpoint is None:
            raise WorkbenchError(f"{self.spec.trial_id}: the training left no checkpoint to score")
        scored = trainer.evaluate(self.spec.config, evaluation, data=data, checkpoint=trained.checkpoint)
        self._check_owner()
        durable.write_with(
            self.store.predictions(self.spec.trial_id, eval_id), lambda path: _write_parquet(path, scored.predictions)
        )
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
                "provenance": self._provenance | self.placement | {"kernel": provenance.kernel()},
                "finished_at": durable.now(),
            },
        )

    def _record_error(self, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        write_error(
            self.folder,
            kind=classify(error),
            error_type=type(error).__name__,
            message=str(error) or type(error).__name__,
            attempt=self.attempt.number,
            step=self._step,
            trace=trace[-4000:],
        )

    def _end(self, outcome: attempts.Outcome) -> None:
        seconds, cpu_seconds = self._spent()
        attempts.end(self.folder, self.attempt, outcome=outcome, seconds=seconds, cpu_seconds=cpu_seconds)

    def _spent(self) -> tuple[float, float]:
        return time.monotonic() - self._began, _cpu_seconds() - self._cpu_began

    def _check_owner(self) -> None:
        if attempts.superseded(self.folder, self.attempt):
            raise _Superseded

    def _stop(self) -> bool:
        """Whether to stop; looked up a few times a second at most, since a step may take a millisecond."""
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
    """Write error.json, in which `kind` is called `class`."""
    durable.write_json(
        folder / "error.json",
        {
            "class": kind,
            "type": error_type,
            "message": message,
            "attempt": attempt,
            "step": step,
            "traceback": trace,
            "failed_at": durable.now(),
        },
    )


def _cpu_seconds() -> float:
    """CPU time of this process and of the loaders that it has ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _write_parquet(path: Path, columns: dict[str, np.ndarray]) -> None:
    import numpy as np  # only a trial writes predictions
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(values: np.ndarray) -> pa.Array:  # as pa.array does, which imports pandas first
        buffer = pa.py_buffer(np.ascontiguousarray(values))
        return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])

    table = pa.table({name: column(values) for name, values in columns.items()})
    pq.write_table(table, path, compression="zstd")
    with path.open("rb") as file:
        os.fsync(file.fileno())
