"""`python -m workbench.ray_executor.wait ADDRESS NODES`: return once as many nodes of a Ray cluster are there."""

import sys
import time
from collections.abc import Sequence

import ray

from workbench.errors import WorkbenchError
from workbench.ray_executor.cluster import join, machines

PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    """Wait; exit code 1 when they do not come."""
    address, wanted = arguments[0], int(arguments[1])
    give_up = time.monotonic() + PATIENCE_SECONDS
    found, problem = 0, ""
    while time.monotonic() < give_up:
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
    sys.stderr.write(f"{found} of {wanted} nodes came to {address} in {PATIENCE_SECONDS:.0f} s. {problem}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
