"""What every executor is given, the inline one, and stopping in good order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from workbench import provenance
from workbench.placement import Demand, Machine, demand_of, places
from workbench.processes import Process
from workbench.ranks import trainer_on_one_machine
from workbench.study import Execution, Plan, TrialSpec
from workbench.trial import Trainer, execute

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Ctrl-C or SIGTERM, passed on to the workers as a file: they finish their step, write a checkpoint and end.

    A second signal ends the driver at once.
    """

    def __init__(self, path: Path, *, announce: Callable[[str], None]) -> None:
        self.path = path
        self.signal: int | None = None
        self._announce = announce

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block; only a main thread can, and in others they keep their meaning."""
        self.path.unlink(missing_ok=True)
        earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in earlier.items():
                    signal.signal(number, handler)
            self.path.unlink(missing_ok=True)

    def install(self) -> None:
        """Take the signals, again where a library has taken them since."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._handle)

    def requested(self) -> bool:
        """Tell whether the driver is to stop."""
        return self.signal is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self.path.touch()
        self._announce("Stopping: each trial finishes its step and writes a checkpoint. Once more to stop at once.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Trials to run now, in this order, and where."""

    specs: tuple[TrialSpec, ...]
    runs: Path
    folder: Path  # of the study: for the executor's own files
    stop: StopRequest
    resources: "Resources"
    address: str | None = None  # of a Ray cluster; None: this machine
    allow_code: bool = False  # whether the code of custom parts may run
    trainer: Trainer | None = None  # the detector's code; `core` by default
    driver: Process = field(default_factory=Process.current)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What there is for a study, here or on a cluster, and what each trial takes of it."""

    cores: int
    gpus: tuple[str, ...]
    concurrency: int  # how many trials run at once, so that threads never outnumber the cores
    demand: Demand  # of a trial

    @property
    def threads(self) -> int:
        """Threads of each process of a trial."""
        return self.demand.threads

    @property
    def device(self) -> str:
        """The device of every trial: cpu or cuda."""
        return self.demand.device


def resources_for(specs: tuple[TrialSpec, ...], execution: Execution) -> Resources:
    """Return what trials on this machine get.

    Raises:
        WorkbenchError: a trial asks for what this machine does not have.
    """
    cores, gpus = provenance.available_cores(), provenance.visible_gpus()
    machines = [Machine(name="this machine", cores=cores, gpus=len(gpus))]
    demand = demand_of(specs, execution, machines)
    return Resources(cores=cores, gpus=gpus, concurrency=places(demand, machines), demand=demand)


def resources_anywhere(
    address: str | None, *, plan: Plan, runs: Path, log: Path, tell: Callable[[str], None]
) -> Resources:
    """Return what the trials of a plan get here, or on the Ray cluster at `address`, whose nodes are checked for it.

    Raises:
        WorkbenchError: a trial does not fit, or a node could not run any.
    """
    specs, execution = tuple(plan.specs.values()), plan.study.execution
    if address is None:
        return resources_for(specs, execution)
    from workbench.ray_executor import resources_of_cluster  # Ray takes seconds

    tell(f"Joining {address} and checking its nodes")
    return resources_of_cluster(address, specs=specs, execution=execution, runs=runs, log=log, tell=tell)


def run_inline(job: Job) -> None:
    """Run the trials one after another in this process: nothing to start, and a debugger works."""
    os.environ.setdefault("OMP_NUM_THREADS", str(job.resources.threads))
    for spec in job.specs:
        if job.stop.requested():
            return
        execute(
            spec,
            job.runs,
            should_stop=job.stop.requested,
            device=job.resources.device,
            driver=job.driver,
            allow_code=job.allow_code,
            trainer=trainer_on_one_machine(job.resources.demand, job.trainer),
            placement=job.resources.demand.to_json(),
        )
