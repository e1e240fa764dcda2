"""Whether a trial fits on what a cluster has now. Ray does not say when it does not, and waits for ever."""

import time
from collections.abc import Callable, Iterable

from ray.exceptions import RayError

from workbench.labels import duration
from workbench.placement import Demand, Machine, at_once, listed
from workbench.ray_executor.cluster import machines

TOLD_AFTER_SECONDS = 60.0
TOLD_AGAIN_SECONDS = 600.0
PATIENCE_SECONDS = 3600.0
"""After so long the study is stopped in good order: the nodes that are left do nothing and may cost money."""


class Room:
    """The check that a driver makes while its trials run."""

    def __init__(
        self,
        demand: Demand,
        *,
        tell: Callable[[str], None],
        nodes: Callable[[], Iterable[Machine]] = lambda: machines().values(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._demand, self._tell, self._nodes, self._clock = demand, tell, nodes, clock
        self._missing_since: float | None = None
        self._tell_at = 0.0

    def check(self) -> str | None:
        """Tell where no trial fits for a while; return why to stop once it has been too long."""
        try:
            nodes = tuple(self._nodes())
        except RayError:
            return None  # the cluster is going, which others notice
        now = self._clock()
        if at_once(self._demand, nodes):
            if self._missing_since is not None and self._tell_at > self._missing_since + TOLD_AFTER_SECONDS:
                self._tell("A trial fits on the cluster again.")
            self._missing_since = None
            return None
        if self._missing_since is None:
            self._missing_since, self._tell_at = now, now + TOLD_AFTER_SECONDS
        waited = now - self._missing_since
        found = f"no trial fits on what is left of the cluster (it asks for {self._demand}; there is {listed(nodes)})"
        if waited >= PATIENCE_SECONDS:
            return f"Stopped: {found}, for {duration(waited)} now"
        if now >= self._tell_at:
            self._tell_at = now + TOLD_AGAIN_SECONDS
            left = duration(PATIENCE_SECONDS - waited)
            self._tell(f"Waiting for a node: {found}. In {left} the study stops by itself.")
        return None
