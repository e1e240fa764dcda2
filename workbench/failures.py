"""Why trials fail, and which failures trying again can mend.

A failure that would come back (a wrong configuration, too little memory, code that cannot be imported) is reported as
what it is and never retried by itself; what may pass (a process or a machine that went away, a disk that answered with
an error, a step that never ended) is tried again from the newest valid checkpoint. A loss that is not finite is no
failure but an outcome, `diverged`.
"""

from collections.abc import Mapping
from typing import Any, Literal

FailureClass = Literal[
    "worker_lost",  # its process died without a word: killed, or its machine went away
    "io",  # a file or a disk answered with an error
    "stalled",  # no step and no scored batch for longer than the study allows
    "out_of_memory",  # of the host or of a device
    "bad_config",  # the configuration, the data or the weights cannot be used
    "import_error",  # code cannot be imported where the trial runs
    "exited",  # user code called sys.exit
    "error",  # anything else that was raised
]

RETRIED: frozenset[str] = frozenset({"worker_lost", "io", "stalled", "error"})
"""Classes that may pass. An `error` that comes back at the same step with the same words will not."""


def classify(error: BaseException) -> FailureClass:
    """Return the class of what a trial raised."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:  # torch's has no other base worth importing torch for
        return "out_of_memory"
    if "WorkerLost" in names:  # one of several processes of the trial
        return "worker_lost"
    if isinstance(error, SystemExit):
        return "exited"
    if isinstance(error, ImportError):
        return "import_error"
    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):  # also one that is told in our words
        return "io"
    return "bad_config" if names & {"WorkbenchError", "DataProblem", "WeightsProblem", "CustomProblem"} else "error"


def may_pass(error: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Tell whether trying again may mend a failure, by its error.json and that of the attempt before."""
    if error.get("class") != "error":
        return error.get("class") in RETRIED
    return before is None or any(error.get(key) != before.get(key) for key in ("type", "message", "step"))
