"""Run a study: bring its trials to their ends, look by look, judge, and report.

The same command is always the right recovery: what is finished is not run again, what was interrupted goes on, and what
failed is tried once more.
"""

from typing import TextIO

from workbench import disk, hook
from workbench.contacts import refuse_credentials
from workbench.driving import Run
from workbench.errors import StoreError
from workbench.options import Options
from workbench.screen import kept, line_to
from workbench.search_run import SearchRun
from workbench.store import Store
from workbench.study import Plan
from workbench.user_code import refuse_code


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
    if options.on_end is not None:
        hook.checked(options.on_end)
    if options.tracking_uri is None:
        refuse_credentials(plan.study)
    try:
        source = plan.study.path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{plan.study.path}: cannot be read again ({error.strerror})") from error
    with disk.in_words(store.root), kept(err) as screen:
        ref = store.register(plan, source=source)
        waiting = line_to(screen) if options.wait else None
        with disk.in_words(store.root, exit_code=1), store.lock(ref, wait=waiting) as hold:
            kind = Run if plan.study.search is None else SearchRun
            run = kind(plan, store, ref, wishes=hold.wish_file, options=options, err=screen)
            hold.on_loss(run.stop_superseded)
            with run.stop.listening():
                run.require_gate()
                return run.to_its_end(out)
