"""Stop, pause or resume a running study from another shell: its driver finds the wish as a file beside its beat."""

from workbench import attempts
from workbench.errors import WorkbenchError
from workbench.stopping import Wish, ask, wish
from workbench.store import Store
from workbench.study import Plan

_DONE: dict[Wish | None, str] = {
    "stop": "each trial finishes its step and writes a checkpoint; then the run ends",
    "pause": "each trial finishes its step and writes a checkpoint; then the run waits, until `resume` or `stop`",
    None: "the run goes on from the checkpoints",
}


def steer(plan: Plan, store: Store, wanted: Wish | None) -> str:
    """Ask the driver of a plan to stop, to pause, or (None) to go on after a pause; return what will happen.

    Raises:
        WorkbenchError: nobody runs the plan, it is not paused, or it is stopping.
    """
    folder = store.study_dir(plan)
    name = f"{plan.study.name} ({plan.study.profile})"
    drivers = attempts.read(folder)
    if not drivers or not drivers[-1].running(folder):
        raise WorkbenchError(f"{name} is not being run with this selection: see what is with `status`")
    path = attempts.wish_file(folder, drivers[-1].number)
    if wanted != "stop" and wish(path) == "stop":
        raise WorkbenchError(f"{name} is stopping already: see what is with `status`, then go on with `run`")
    if wanted is None and wish(path) != "pause":
        raise WorkbenchError(f"{name} is not paused: nothing is to be resumed")
    ask(path, wanted)
    return f"{name}, run by {drivers[-1].worker}: {_DONE[wanted]}"
