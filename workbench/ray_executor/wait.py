"""`python -m workbench.ray_executor.wait ADDRESS NODES PID`: return once as many nodes of a Ray cluster are there.

PID is the process that starts them: there is nothing to wait for once it has ended.
"""

import sys
import time
from collections.abc import Sequence

import ray

from workbench.errors import WorkbenchError
from workbench.processes import Process
from workbench.ray_executor.cluster import join, machines

PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    """Wait; exit code 1 when they do not come."""
    address, wanted, starter = arguments[0], int(arguments[1]), Process.of(int(arguments[2]))
    began = time.monotonic()
    found, problem = 0, ""
    while starter.alive() and time.monotonic() - began < PATIENCE_SECONDS:
        try:
            join(address)
            found = len(machines())
        except WorkbenchError as error:
            problem = str(error)
        finally:
            ray.shutdown()
        if found >= wanted:
            return 0
        time.sleep(_POLL_SECONDS)
    waited = time.monotonic() - began
    sys.stderr.write(f"{found} of {wanted} nodes came to {address} in {waited:.0f} s. {problem}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
