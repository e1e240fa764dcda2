"""A slot runs trial after trial, each in a process of its own, and tries again what may pass. It knows nothing of Ray.

Which failures are tried again, and how often, is decided here alone: by the class on record, counted over the attempts
that this driver has made, on whatever machine. Whoever runs slots need only give the trial to another one when a whole
slot dies.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from workbench import attempts, lease
from workbench.execution import Job
from workbench.failures import FailureClass
from workbench.processes import Process
from workbench.retrying import canary_says, try_again
from workbench.store import Store
from workbench.study import TrialSpec
from workbench.template import AVAILABLE, Fresh, Here, Lost, Template
from workbench.trainers import Trainer
from workbench.trial import execute, record_loss

CANARY_PATIENCE_SECONDS = 600.0
"""How long trials wait for the first one to take a step; its data may have to be prepared."""

_POLL_SECONDS = 0.1
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every slot of a driver is given. `run` brings one trial as far as it goes, in the process that calls it."""

    run: Callable[[TrialSpec], Any]
    runs: Path
    logs: Path  # folder of what the processes print
    stop: Path  # a file that asks to stop
    driver: Process
    retries: int
    processes: Literal["forks", "new", "here"]  # of trials: `here` is the slot's own
    canary: str | None = None  # the trial that goes first: no other begins before it has taken a step


def task_for(
    job: Job,
    *,
    logs: Path,
    trainer: Trainer | None,
    work: Callable[..., Any] = execute,
    canary: str | None = None,
    **arguments: Any,
) -> Task:
    """Return what the slots need of a job: how a trial is run, by `work` with more `arguments` than a job knows."""
    demand = job.resources.demand
    run = partial(
        work,
        runs=job.runs,
        device=demand.device,
        driver=job.driver,
        allow_code=job.allow_code,
        trainer=trainer,
        stall_seconds=job.execution.stall_seconds,
        gpus=demand.all_gpus,
        placement=demand.to_json(),
        **arguments,
    )
    return Task(
        run=run,
        runs=job.runs,
        logs=logs,
        stop=job.stop.path,
        driver=job.driver,
        retries=job.execution.retries,
        # Over several nodes the slot itself has Ray, which places the trial's processes.
        processes="here" if demand.nodes > 1 else "forks" if AVAILABLE and demand.device == "cpu" else "new",
        canary=canary,
    )


class Slot:
    """Runs trials one after another. Close it to end its processes."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._store = Store(task.runs)
        self._processes = self._new_processes()

    def run(self, spec: TrialSpec) -> None:
        """Bring a trial as far as it goes; try again as often as the study allows what may pass."""
        task = self._task
        if not self._may_begin(spec.trial_id):
            return
        while True:
            before = _killed_for_memory()
            try:
                self._processes.run(partial(task.run, spec), watch=partial(self._watch, spec.trial_id))
            except Lost as lost:
                self._record_loss(spec.trial_id, lost, out_of_memory=_killed_for_memory() > before)
                if not self._processes.alive():
                    self._processes.close()
                    self._processes = self._new_processes()
            if not try_again(self._store, spec.trial_id, task.driver, retries=task.retries, stop=task.stop):
                return

    def close(self) -> None:
        """End what still runs."""
        self._processes.close()

    def _new_processes(self) -> Template | Fresh | Here:
        if self._task.processes == "here":
            return Here()
        log = self._task.logs / f"slot-{os.getpid()}.log"
        return Template(log=log) if self._task.processes == "forks" else Fresh(log=log)

    # Before

    def _may_begin(self, trial_id: str) -> bool:
        """Wait until the first trial has taken a step; False when it could not: the others would fail as well."""
        task = self._task
        give_up = time.monotonic() + CANARY_PATIENCE_SECONDS
        while task.canary not in (None, trial_id) and time.monotonic() < give_up:
            says = canary_says(self._store, task.canary, task.driver, retries=task.retries)
            if says != "wait":
                return says == "go"
            if task.stop.exists():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    # Meanwhile

    def _watch(self, trial_id: str) -> None:
        """Kill a process that does not even beat any more: it cannot end itself."""
        last = self._at_work(trial_id)
        if last is None:
            return
        silence = lease.silent_for(attempts.beat_file(self._store.trial_dir(trial_id), last.number))
        if silence > lease.EXPIRY_SECONDS and last.worker.alive():
            with suppress(ProcessLookupError):  # it has ended since we looked
                os.kill(last.worker.pid, signal.SIGKILL)

    # After

    def _record_loss(self, trial_id: str, lost: Lost, *, out_of_memory: bool) -> None:
        last = self._at_work(trial_id)
        if last is None:
            return  # it had put its end on record, or it never began
        kind: FailureClass = "out_of_memory" if out_of_memory else "worker_lost"
        message = f"{lost}, because memory ran out" if out_of_memory else f"{lost}; what it printed: {self._task.logs}"
        record_loss(self._store, trial_id, last, kind=kind, message=message)

    def _at_work(self, trial_id: str) -> attempts.Attempt | None:
        """Return the last attempt at a trial where it is of this driver, on this machine, and has no end.

        One elsewhere may still live: Ray moves a trial when it has lost sight of a machine, and its lease will tell.
        """
        for last in attempts.read(self._store.trial_dir(trial_id))[-1:]:
            if last.outcome is None and last.driver == self._task.driver and last.worker.is_here():
                return last
        return None


def _killed_for_memory() -> int:
    """Return how many processes of this container the kernel has killed because memory ran out."""
    try:
        lines = _MEMORY_EVENTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
