"""One driver's work on one plan: its trials, look by look, until they have ended; then verdicts and a report."""

import shlex
import sys
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TextIO

from core.model import kernel
from workbench import attempts, commands, durable, gate, hook, report
from workbench.budget import Budget, watching
from workbench.costs import machine_of
from workbench.errors import LIMIT_REACHED, WorkbenchError
from workbench.execution import Job, run_inline
from workbench.housekeeping import Housekeeping
from workbench.mlflow_mirror import Mirror
from workbench.mlflow_mirror.mirror import FLUSH_SECONDS, FLUSH_STOPPED_SECONDS
from workbench.options import Options
from workbench.processes import Process
from workbench.progress import Progress
from workbench.records import StudyRef, StudyResults
from workbench.resources import Resources, resources_for
from workbench.retrying import canary_says, own_attempts
from workbench.screen import failure_lines, gpu_lines, line_to, page_lines
from workbench.searching import Searching
from workbench.spending import spent
from workbench.stopping import StopRequest
from workbench.store import Store
from workbench.study import Plan, PlannedTrial
from workbench.trial import complete, record_loss
from workbench.verdict import judge

WAIT_SECONDS = 2.0  # between looks at a trial that another driver runs


class Run:
    """One driver's work on one plan."""

    def __init__(self, plan: Plan, store: Store, ref: StudyRef, *, wishes: Path, options: Options, err: TextIO) -> None:
        self.plan, self.store, self.ref = plan, store, ref
        self.options, self.err = options, err
        self.began = time.monotonic()
        self.driver = Process.current(command=durable.now())
        self.tried: set[str] = set()  # trials that this driver has given to its executor
        uri = options.tracking_uri or plan.study.tracking_uri
        self.mirror = Mirror(store, ref, plan, tracking_uri=uri, warn=self.say)
        self.stop = StopRequest(wishes, announce=self.say)
        self.progress: Progress | None = None
        self.house = Housekeeping(store, plan, say=self.say)
        self.searching: Searching | None = None  # where configurations are suggested while trials run
        self.budget_seconds = options.budget_seconds or plan.study.budget_seconds

    def say(self, line: str) -> None:
        """Say a line, above the table of trials where there is one."""
        (self.progress.say if self.progress else line_to(self.err))(line)

    @cached_property
    def budget(self) -> Budget:
        """What may be spent, on what there is for the trials."""
        return Budget(
            self.plan,
            self.store,
            machine=machine_of(self.plan, self.resources, at_once=self._slots()),
            gpu_hours=self.options.gpu_hours,
            stop=self.stop,
            say=self.say,
        )

    def require_gate(self) -> None:
        """Refuse a dear study that has no passed gate; one in which nothing is left to run needs none."""
        started = max(1, self.store.results_for(self.plan).looks_started)
        looks = self.plan.study.looks
        over = all(map(self._over, self.plan.at_look(looks[-1 if self.options.until_decided else started - 1])))
        if over:
            return
        gate.require(self.budget, self.options, say=self.say)

    @cached_property
    def resources(self) -> Resources:
        """What there is for the trials, here or on the cluster, which is joined and checked for it.

        Raises:
            WorkbenchError: a trial does not fit, or a node of the cluster cannot run any.
        """
        specs, execution = tuple(self.plan.specs.values()), self.plan.study.execution
        if self.options.executor == "inline" or self.options.address is None:
            return resources_for(specs, execution)
        from workbench.ray_executor import resources_of_cluster  # Ray takes seconds

        self.say(f"Joining {self.options.address} and checking its nodes")
        return resources_of_cluster(
            self.options.address,
            specs=specs,
            execution=execution,
            runs=self.store.root,
            log=self.ref.path / "ray_check.log",
            tell=self.say,
        )

    def to_its_end(self, out: TextIO) -> int:
        """Run, judge and report; tell MLflow and the hook; return the exit code."""
        try:
            code = self.looks()
            interrupted = code > LIMIT_REACHED
            if not interrupted:
                out.write(self.report())
                out.flush()
            self.mirror.finish(limit=FLUSH_STOPPED_SECONDS if interrupted else FLUSH_SECONDS)
            if not interrupted:
                self.say_spending()
        except Exception as error:
            self.mirror.finish(limit=FLUSH_STOPPED_SECONDS)
            self.call_hook(getattr(error, "exit_code", 1))
            raise
        self.call_hook(code)
        return self.say_end(code)

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
            if self.stop.reason is not None:
                return LIMIT_REACHED
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
            driver=self.driver,
            began_at=now - (time.monotonic() - self.began),
            ended_at=now,
            slots=self._slots(),
        )
        if found is not None:
            cpu = {"driver_cpu_seconds": time.process_time(), "mirror_cpu_seconds": self.mirror.cpu_seconds}
            self.store.save_last_run(self.ref, {**asdict(found), "rest": found.rest, **cpu})
            self.say(str(found))

    def call_hook(self, code: int) -> None:
        """Tell the hook, if there is one, how the run ended."""
        if self.options.on_end is not None:
            results = self.store.results_for(self.plan)
            told = hook.news(results, exit_code=code, report=self.ref.path / "report.md")
            if problem := hook.call(self.options.on_end, told):
                self.say(problem)

    def say_end(self, code: int) -> int:
        """Name what failed, or the line that goes on; return `code`."""
        command = f"python -m workbench {shlex.join(hook.without_secrets(sys.argv[1:]))}"
        failed = [trial for trial in self.plan.trials if self.store.state(trial.trial_id) == "failed"]
        if code == 1:
            for trial in failed:
                for line in failure_lines(self.store, trial):
                    self.say(line)
            what = "Failed trials are tried again" if failed else "Trials are missing; they are run"
            self.say(f"{what} by the same command: {command}")
        elif code == LIMIT_REACHED:
            self.say(f"{self.stop.reason}. Nothing that was finished is lost. To go on, with what is said: {command}")
        elif code:
            self.say(f"Interrupted; nothing that was finished is lost. To go on: {command}")
        else:
            self.say(f"Report: {self.ref.path / 'report.md'}")
        return code

    def _complete(self, number: int, trials: tuple[PlannedTrial, ...]) -> None:
        """Run what is outstanding until every trial of the look has ended, here or under another driver."""
        if not self._candidates(trials) and not self._elsewhere(trials):
            return
        self.house.prepare(self.plan, self._candidates(trials), at_once=self._slots())
        self._say_start(number, trials)
        self.progress = Progress(self.store, trials, concurrency=self._slots(), stream=self.err)
        if self.options.executor == "ray":
            from workbench import ray_executor  # noqa: F401 - before MLflow, whose import would hold Ray's up
        self.mirror.start()
        checks = (self.budget.passed, gate.watch(self.budget, without_gate=self.options.without_gate, say=self.say))
        expected = self.budget.look(number, budget_seconds=self.budget_seconds)
        room = self.house.watching(self._stop_for_disk)
        with expected, self.progress.showing(), watching(checks, self.stop), room, self.stop.gently():
            while not self.stop.requested():
                if self.stop.paused():
                    self._wait_out_pause()
                elif candidates := self.budget.affordable(self._candidates(trials)):
                    if not self._execute(candidates):
                        return
                elif self._elsewhere(trials):
                    time.sleep(WAIT_SECONDS)
                else:
                    return

    def _wait_out_pause(self) -> None:
        line = commands.command(self.store.results_for(self.plan), verb="resume")
        self.say(f"Paused, with no trial at work. To go on: {line}")
        while self.stop.paused() and not self.stop.requested():
            time.sleep(WAIT_SECONDS / 4)

    def _execute(self, trials: tuple[PlannedTrial, ...]) -> bool:
        """Run trials as far as they go; return whether there is sense in looking for more to run."""
        self.tried.update(trial.trial_id for trial in trials)
        begun = self._begun(trials)
        job = Job(
            specs=tuple(self.plan.specs[trial.trial_id] for trial in trials),
            runs=self.store.root,
            folder=self.ref.path,
            stop=self.stop,
            resources=self.resources,
            execution=self.plan.study.execution,
            address=self.options.address,
            allow_code=self.options.allow_code,
            trainer=self.options.trainer,
            driver=self.driver,
            searching=self.searching,
            tell=self.say,
        )
        if self.options.executor == "inline":
            run_inline(job)
        else:
            from workbench.ray_executor import run_on_ray  # Ray takes seconds, and a complete study needs none

            run_on_ray(job)
        self.house.keep_quota()
        if self.stop.wanted():
            return True
        self._record_lost(trials)
        retries = self.plan.study.execution.retries
        alone = self.searching is not None or len(trials) == 1  # a search has a canary of its own
        if not alone and canary_says(self.store, trials[0].trial_id, self.driver, retries=retries) == "stop":
            self.say("The first trial could not take a single step, so the others were not begun.")
            return False
        if self._begun(trials) == begun and not self._elsewhere(trials):
            self.say(f"No trial could be started; what was printed: {self.ref.path / 'ray'}")
            return False
        return True

    def _record_lost(self, trials: tuple[PlannedTrial, ...]) -> None:
        """Write an error for trials whose slot died, as the ones that Ray gave them to next did, too."""
        message = f"its process died without an error, as when memory runs out; see {self.ref.path / 'ray'}"
        for trial in trials:
            own = self._own(trial)
            if self.store.state(trial.trial_id) == "interrupted" and own and not own[-1].ended_well():
                record_loss(self.store, trial.trial_id, own[-1], kind="worker_lost", message=message)

    def _stop_for_disk(self, line: str) -> None:
        self.stop.stop()
        self.say(line)

    def _candidates(self, trials: tuple[PlannedTrial, ...]) -> tuple[PlannedTrial, ...]:
        """Return the trials to run now, in order. What has failed under this driver is not run again by it."""
        return tuple(
            trial
            for trial in trials
            if not self._over(trial)
            and self.store.state(trial.trial_id) != "running"
            and not any(attempt.outcome == "failed" for attempt in self._own(trial)[-1:])
        )

    def _begun(self, trials: tuple[PlannedTrial, ...]) -> int:
        return sum(len(attempts.read(self.store.trial_dir(trial.trial_id))) for trial in trials)

    def _own(self, trial: PlannedTrial) -> list[attempts.Attempt]:
        return own_attempts(self.store, trial.trial_id, self.driver)

    def _elsewhere(self, trials: tuple[PlannedTrial, ...]) -> bool:
        return any(self.store.state(trial.trial_id) == "running" for trial in trials)

    def _over(self, trial: PlannedTrial) -> bool:
        return complete(self.store.record(trial.trial_id), self.plan.specs[trial.trial_id])

    def _another_look(self, results: StudyResults, number: int) -> bool:
        undecided = [verdict.claim for verdict in results.verdicts if commands.wants_seeds(results, verdict)]
        if not undecided:
            return False
        spent = time.monotonic() - self.began
        reason = self.budget.refuses_look(number + 1, spent=spent, budget_seconds=self.budget_seconds)
        if reason is not None:
            self.say(f"Undecided: {', '.join(undecided)}. {reason}.")
        return reason is None

    def _slots(self) -> int:
        return self.resources.concurrency if self.options.executor == "ray" else 1

    def stop_superseded(self) -> None:
        """Stop, since another driver has taken the study over."""
        self.stop.stop()
        self.say("Another driver has taken this study over, as when this machine had been asleep: stopping.")

    def _say_start(self, number: int, trials: tuple[PlannedTrial, ...]) -> None:
        study, over = self.plan.study, sum(self._over(trial) for trial in trials)
        self.say(
            f"{study.name} ({study.profile}), look {number} of {len(study.looks)}: {len(trials)} trials, {over} "
            f"already done; {self._slots()} at once on {self.resources.device}, "
            f"{self.resources.threads} thread{'s' if self.resources.threads > 1 else ''} each"
        )
        for line in gpu_lines(study, self.resources):
            self.say(line)
        self._say_pages()

    def _say_pages(self) -> None:
        """Say what to know of the plan and where to watch, and get what all trials need."""
        warnings = [f"Warning: {warning}" for warning in self.plan.warnings]
        for line in [*warnings, *page_lines(self.mirror.tracking_uri, self.store.root)]:
            self.say(line)
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
