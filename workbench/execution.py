"""What every executor is given, and the inline one."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.processes import Process
from workbench.ranks import trainer_on_one_machine
from workbench.resources import Resources
from workbench.retrying import canary_says, try_again
from workbench.searching import Searching
from workbench.stopping import StopRequest
from workbench.store import Store
from workbench.study import Execution, TrialSpec
from workbench.trainers import Trainer
from workbench.trial import execute


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Trials to run now, in this order, and where."""

    specs: tuple[TrialSpec, ...]
    runs: Path
    folder: Path  # of the study: for the executor's own files
    stop: StopRequest
    resources: Resources
    execution: Execution
    driver: Process
    tell: Callable[[str], None]  # takes a line for the user, while trials run
    address: str | None = None  # of a Ray cluster; None: this machine
    allow_code: bool = False  # whether the code of custom parts may run
    trainer: Trainer | None = None  # the detector's code; `core` by default
    searching: Searching | None = None  # suggests more trials while these run


def run_inline(job: Job) -> None:
    """Run the trials one after another in this process: nothing to start, and a debugger works."""
    os.environ.setdefault("OMP_NUM_THREADS", str(job.resources.threads))
    store = Store(job.runs)
    retries = job.execution.retries
    for spec in job.specs:
        first = job.specs[0].trial_id
        if spec.trial_id != first and canary_says(store, first, job.driver, retries=retries) == "stop":
            return
        again = True
        while again and not job.stop.wanted():
            execute(
                spec,
                job.runs,
                should_stop=job.stop.wanted,
                device=job.resources.device,
                gpus=job.resources.demand.all_gpus,
                driver=job.driver,
                allow_code=job.allow_code,
                trainer=trainer_on_one_machine(job.resources.demand, job.trainer),
                placement=job.resources.demand.to_json(),
            )
            again = try_again(store, spec.trial_id, job.driver, retries=retries, stop=job.stop.path)
