"""Run a study: bring its trials to their ends, look by look, judge, and report.

The same command is always the right recovery: what is finished is not run again, what was interrupted goes on, and what
failed is tried once more.
"""

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TextIO

from core.model import kernel
from workbench import commands, report
from workbench.attempts import read as read_attempts
from workbench.errors import StoreError, WorkbenchError
from workbench.execution import Job, Resources, StopRequest, resources_anywhere, run_inline
from workbench.mlflow_mirror import Mirror
from workbench.processes import Process
from workbench.progress import Progress
from workbench.records import StudyRef, StudyResults
from workbench.spending import spent
from workbench.store import Store
from workbench.study import Plan, PlannedTrial
from workbench.trial import Trainer, complete, write_error
from workbench.user_code import refuse_code
from workbench.verdict import judge

Executor = Literal["ray", "inline"]

WAIT_SECONDS = 2.0  # between looks at a trial that another driver runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How `run` goes about a plan; nothing of it enters a trial's identity."""

    executor: Executor = "ray"  # `ray` runs trials as processes, `inline` one after another in this one
    until_decided: bool = False  # go on look by look while a claim is undecided for want of seeds
    budget_seconds: float | None = None  # wall time within which a further look must fit; None: the study's own
    tracking_uri: str | None = None  # MLflow's; None: the study's own, or the embedded database
    address: str | None = None  # of a Ray cluster; None: this machine
    allow_code: bool = False  # run the code of custom parts; without it a study that has some is refused
    trainer: Trainer | None = None  # the detector's code, which travels to the trials' processes; None: `core`


def run_study(plan: Plan, store: Store, options: Options, *, out: TextIO, err: TextIO) -> int:
    """Complete the looks started, the first at least, then judge and report; return the exit code.

    Args:
        plan: what to run.
        store: where the records are.
        options: how to go about it.
        out: takes the results.
        err: takes progress and warnings.

    Raises:
        BusyError: another driver runs this plan.
        WorkbenchError: nothing could be started.
    """
    if not options.allow_code:
        refuse_code(plan)
    try:
        source = plan.study.path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{plan.study.path}: cannot be read again ({error.strerror})") from error
    ref = store.register(plan, source=source)
    with store.lock(ref), _kept(err) as screen:
        uri = options.tracking_uri or plan.study.tracking_uri
        mirror = Mirror(store, ref, plan, tracking_uri=uri, warn=_line_to(screen))
        run = _Run(plan, store, ref, mirror, options=options, err=screen)
        with run.stop.listening():
            code = run.looks()
            if run.stop.signal is None:
                out.write(run.report())
                out.flush()
            mirror.finish()
            if run.stop.signal is None:
                run.say_spending()
        return run.say_end(code)


class _Run:
    """One driver's work on one plan."""

    def __init__(
        self, plan: Plan, store: Store, ref: StudyRef, mirror: Mirror, *, options: Options, err: TextIO
    ) -> None:
        self.plan, self.store, self.ref, self.mirror = plan, store, ref, mirror
        self.options, self.err = options, err
        self.say = _line_to(err)
        self.began = time.monotonic()
        self.tried: set[str] = set()
        self.stop = StopRequest(ref.path / "stop", announce=self._announce_stop)
        self.progress: Progress | None = None

    @cached_property
    def resources(self) -> Resources:
        """What there is for the trials, here or on the cluster, which is joined and checked for it.

        Raises:
            WorkbenchError: a trial does not fit, or a node of the cluster cannot run any.
        """
        return resources_anywhere(
            self.options.address if self.options.executor == "ray" else None,
            plan=self.plan,
            runs=self.store.root,
            log=self.ref.path / "ray_check.log",
            tell=self.say,
        )

    def looks(self) -> int:
        """Complete look after look; return the exit code."""
        number = max(1, self.store.results_for(self.plan).looks_started)
        while True:
            trials = self.plan.at_look(self.plan.study.looks[number - 1])
            self.store.start_look(self.ref, number)
            self._complete(number, trials)
            if self.stop.signal is not None:
                return 128 + self.stop.signal
            results = self.judge()
            if any(not self._over(trial) for trial in trials):
                return 1
            if not self.options.until_decided or not self._another_look(results, number):
                return 0
            number += 1

    def judge(self) -> StudyResults:
        """Judge the claims on what is known, keep the verdicts, and return the results with them."""
        results = self.store.results_for(self.plan)
        self.store.save_verdicts(self.ref, judge(results, seeds=len(self.plan.study.seeds)))
        return self.store.results_for(self.plan)

    def report(self) -> str:
        """Write the Markdown report beside the plan and return the one for a terminal."""
        results = self.store.results_for(self.plan)
        report.render(results, format="md", out=self.ref.path / "report.md")
        return report.render(results, format="text")

    def say_spending(self) -> None:
        """Say and record what the time of this run went into; of a cluster it is not known how many trials it holds."""
        if self.options.address is not None:
            return
        now = time.time()
        found = spent(
            self.store,
            self.tried,
            driver=Process.current(),
            began_at=now - (time.monotonic() - self.began),
            ended_at=now,
            slots=self._slots(),
        )
        if found is not None:
            cpu = {"driver_cpu_seconds": time.process_time(), "mirror_cpu_seconds": self.mirror.cpu_seconds}
            self.store.save_last_run(self.ref, {**asdict(found), "rest": found.rest, **cpu})
            self.say(str(found))

    def say_end(self, code: int) -> int:
        """Name what failed, or the line that goes on; return `code`."""
        command = f"python -m workbench {shlex.join(sys.argv[1:])}"
        failed = [trial for trial in self.plan.trials if self.store.state(trial.trial_id) == "failed"]
        if code == 1:
            for trial in failed:
                self._say_failure(trial)
            self.say(f"Failed trials are tried again by the same command: {command}")
        elif code:
            self.say(f"Interrupted; nothing that was finished is lost. To go on: {command}")
        else:
            self.say(f"Report: {self.ref.path / 'report.md'}")
        return code

    def _complete(self, number: int, trials: tuple[PlannedTrial, ...]) -> None:
        """Run what is outstanding until every trial of the look has ended, here or under another driver."""
        if not self._candidates(trials) and not self._elsewhere(trials):
            return
        self._say_start(number, trials)
        self.progress = Progress(self.store, trials, concurrency=self._slots(), stream=self.err)
        if self.options.executor == "ray":
            from workbench import ray_executor  # noqa: F401 - before MLflow, whose import would hold Ray's up
        self.mirror.start()
        with self.progress.showing():
            while not self.stop.requested():
                if candidates := self._candidates(trials):
                    self._execute(candidates)
                elif self._elsewhere(trials):
                    time.sleep(WAIT_SECONDS)
                else:
                    return

    def _execute(self, trials: tuple[PlannedTrial, ...]) -> None:
        self.tried.update(trial.trial_id for trial in trials)
        job = Job(
            specs=tuple(self.plan.specs[trial.trial_id] for trial in trials),
            runs=self.store.root,
            folder=self.ref.path,
            stop=self.stop,
            resources=self.resources,
            address=self.options.address,
            allow_code=self.options.allow_code,
            trainer=self.options.trainer,
        )
        if self.options.executor == "inline":
            run_inline(job)
        else:
            from workbench.ray_executor import run_on_ray  # Ray takes seconds, and a complete study needs none

            run_on_ray(job)
        if not self.stop.requested():
            self._record_lost(trials)

    def _record_lost(self, trials: tuple[PlannedTrial, ...]) -> None:
        """Write an error for trials whose process died, as Ray's second one did too."""
        for trial in trials:
            if self.store.state(trial.trial_id) not in ("pending", "interrupted"):
                continue
            folder = self.store.trial_dir(trial.trial_id)
            write_error(
                folder,
                kind="worker_lost",
                error_type="WorkerLost",
                message=f"its process died without an error, as when memory runs out; see {self.ref.path / 'ray'}",
                attempt=len(read_attempts(folder)),
                step=self.store.record(trial.trial_id).step,
                trace="",
            )

    def _candidates(self, trials: tuple[PlannedTrial, ...]) -> tuple[PlannedTrial, ...]:
        """Return the trials to run now, in order: each is started once by a command."""
        return tuple(
            trial
            for trial in trials
            if trial.trial_id not in self.tried
            and self.store.state(trial.trial_id) != "running"
            and not self._over(trial)
        )

    def _elsewhere(self, trials: tuple[PlannedTrial, ...]) -> bool:
        return any(self.store.state(trial.trial_id) == "running" for trial in trials)

    def _over(self, trial: PlannedTrial) -> bool:
        return complete(self.store.record(trial.trial_id), self.plan.specs[trial.trial_id])

    def _another_look(self, results: StudyResults, number: int) -> bool:
        budget_seconds = self.options.budget_seconds or self.plan.study.budget_seconds
        undecided = [verdict.claim for verdict in results.verdicts if commands.wants_seeds(results, verdict)]
        if not undecided:
            return False
        new = [trial for trial in self.plan.at_look(self.plan.study.looks[number]) if not self._over(trial)]
        known = [record.total_seconds for record in results.records.values() if record.state == "finished"]
        expected = len(new) * sum(known) / max(1, len(known)) / self.resources.concurrency
        elapsed = time.monotonic() - self.began
        if new and budget_seconds is not None and elapsed + expected > budget_seconds:
            needs, left = report.duration(expected), report.duration(max(0.0, budget_seconds - elapsed))
            self.say(
                f"Undecided: {', '.join(undecided)}. The next look needs about {needs}, and {left} of the budget are "
                "left: raise --budget to go on."
            )
            return False
        return True

    def _slots(self) -> int:
        return self.resources.concurrency if self.options.executor == "ray" else 1

    def _announce_stop(self, line: str) -> None:
        (self.progress.say if self.progress else self.say)(line)

    def _say_start(self, number: int, trials: tuple[PlannedTrial, ...]) -> None:
        study, resources = self.plan.study, self.resources
        over = sum(self._over(trial) for trial in trials)
        self.say(
            f"{study.name} ({study.profile}), look {number} of {len(study.looks)}: {len(trials)} trials, {over} "
            f"already done; {self._slots()} at once on {resources.device}, "
            f"{resources.threads} thread{'s' if resources.threads > 1 else ''} each"
        )
        if resources.gpus:
            names = ", ".join(f"{count} x {name}" for name, count in Counter(resources.gpus).items())
            each = f"uses them, {resources.demand.gpus * resources.demand.world_size:g} a trial"
            used = each if resources.device == "cuda" else "draws its pictures and stays on the CPU"
            self.say(f"GPUs: {names}; profile {study.profile} {used}")
        for warning in self.plan.warnings:
            self.say(f"Warning: {warning}")
        line = commands.mlflow_command(self.mirror.tracking_uri)
        server = self.mirror.tracking_uri.rstrip("/") if line is None else "http://127.0.0.1:5000"
        pages = f"{server}/#/experiments?workflowType=machine_learning"
        self.say(f"MLflow:    {line or pages}")
        if line:
            self.say(f"           then {pages}")
        self.say(f"Dashboard: {commands.dashboard_command(self.store.root)}")
        if self.options.executor == "ray":
            self._prepare_kernel()
            self.say("Starting the processes that train, which takes some ten seconds")

    def _prepare_kernel(self) -> None:
        """Build the kernel of deformable attention once for all trials on a CPU here, or say why it is not there."""
        if self.resources.device != "cpu" or self.options.address is not None:
            return
        try:
            kernel.choose(lambda _: None, tell=self.say)
        except (ValueError, kernel.KernelProblem) as error:
            raise WorkbenchError(str(error)) from error

    def _say_failure(self, trial: PlannedTrial) -> None:
        error = self.store.record(trial.trial_id).error or {}
        self.say(f"{trial.variant} seed {trial.seed} ({trial.trial_id}) failed: {error.get('class')}")
        trace = [] if error.get("class") == "bad_config" else error.get("traceback", "").strip().splitlines()
        for line in trace[-4:] or [error.get("message", "")]:  # a message for users says more than where it was raised
            self.say(f"    {line}")
        self.say(f"    {self.store.trial_dir(trial.trial_id) / 'error.json'}")


@contextmanager
def _kept(stream: TextIO) -> Iterator[TextIO]:
    """Give a stream of our own to where `stream` writes: while Ray runs, what anybody prints goes to a file."""
    try:
        number = os.dup(stream.fileno())
    except (OSError, ValueError):  # a stream in memory
        yield stream
        return
    with os.fdopen(number, "w", encoding="utf-8", errors="replace") as own:
        yield own


def _line_to(stream: TextIO) -> Callable[[str], None]:
    def say(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return say
