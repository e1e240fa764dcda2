"""Whether trials fit, and how many at once: each on one machine, unless the study spreads it over several.

Ray would wait for ever for what no machine has, so this is asked before anything starts. It knows nothing of Ray:
machines are numbers of cores and GPUs, of this one or of a cluster's nodes.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import WorkbenchError
from workbench.study import Execution, TrialSpec

SUPERVISOR_CORES = 0.5
"""Kept free for each trial that spans nodes: the process that supervises it must find room beside its workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a machine, or a node of a cluster, offers to trials."""

    name: str
    cores: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.name}: {self.cores:g} cores, {self.gpus:g} GPUs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a trial takes: `processes` on each of `nodes` machines, each with `threads` cores and `gpus` GPUs."""

    device: str  # cpu or cuda, of every process
    threads: int
    processes: int = 1
    nodes: int = 1
    gpus: float = 0.0  # a process; below 1, trials share one

    @property
    def world_size(self) -> int:
        """How many processes train the trial."""
        return self.processes * self.nodes

    @property
    def all_gpus(self) -> float:
        """How many GPUs the trial holds, a share of one included."""
        return self.gpus * self.world_size

    @property
    def gpu_share(self) -> float | None:
        """The share of a GPU that a process may fill; None where it has none, 1 where it has one to itself."""
        return min(1.0, self.gpus) if self.device == "cuda" else None

    @property
    def cores_a_node(self) -> float:
        """Cores that it takes of each machine."""
        return self.threads * self.processes + (SUPERVISOR_CORES if self.nodes > 1 else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return what of it belongs to the provenance of a result."""
        return {"world_size": self.world_size, "gpu_share": self.gpu_share, "nodes": self.nodes}

    def __str__(self) -> str:
        gpus = f" and {self.gpus * self.processes:g} GPUs" if self.gpus else ""
        where = f"on each of {self.nodes} machines" if self.nodes > 1 else "on one machine"
        return f"{self.cores_a_node:g} cores{gpus} {where}"


def demand_of(specs: Sequence[TrialSpec], execution: Execution, machines: Sequence[Machine]) -> Demand:
    """Return what each trial takes where these machines are.

    Real pictures are trained on GPUs where there are any. Drawn ones stay on the CPU, where numbers repeat bit for bit.

    Raises:
        WorkbenchError: `execution` asks for GPUs that the trials would not use, or the pictures of a step do not divide
            into the processes.
    """
    threads = max((spec.config.training.threads for spec in specs), default=1)
    on_gpu = any(machine.gpus for machine in machines) and any(spec.config.data.kind == "coco" for spec in specs)
    if not on_gpu and execution.gpus > 1:
        found = "its pictures are drawn, and those stay on the CPU" if _drawn(specs) else "no GPU is there"
        raise WorkbenchError(
            f"execution.gpus is {execution.gpus:g}, and {found}: {listed(machines)}; leave execution.gpus out, or name "
            "a cluster with GPUs by --address"
        )
    if on_gpu and execution.gpus < 1 and execution.nodes > 1:
        raise WorkbenchError(
            f"execution.gpus is {execution.gpus:g} and execution.nodes {execution.nodes}: a trial on several nodes "
            "needs whole GPUs; set execution.gpus to 1 or more, or execution.nodes to 1"
        )
    demand = Demand(
        device="cuda" if on_gpu else "cpu",
        threads=threads,
        processes=max(1, int(execution.gpus)) if on_gpu else 1,
        nodes=execution.nodes,
        gpus=min(1.0, execution.gpus) if on_gpu else 0.0,
    )
    for spec in specs:
        _refuse_uneven(spec, demand.world_size)
    return demand


def places(demand: Demand, machines: Sequence[Machine]) -> int:
    """Return how many trials run at once on these machines.

    Raises:
        WorkbenchError: not even one: what a trial asks for, what each machine has, and what to change.
    """
    found = at_once(demand, machines)
    if not found:
        remedies = "training.threads, execution.gpus or execution.nodes"
        raise WorkbenchError(
            f"a trial asks for {demand}, which is nowhere free: {listed(machines)}; lower {remedies}, or name a larger "
            "cluster by --address"
        )
    return found


def at_once(demand: Demand, machines: Sequence[Machine]) -> int:
    """Return how many trials these machines have room for; 0 where none fits."""
    rooms = [_room(demand, machine) for machine in machines]
    if demand.nodes == 1:
        return sum(rooms)
    # As many as find a machine for each of their nodes: one more than fits is the first that does not.
    return bisect_left(range(1, sum(rooms) + 1), 1, key=lambda n: sum(min(r, n) for r in rooms) < n * demand.nodes)


def listed(machines: Sequence[Machine]) -> str:
    """Return machines and what they offer, in words."""
    shown = "; ".join(map(str, machines[:8]))
    return f"{shown} and {len(machines) - 8} more" if len(machines) > 8 else shown or "no machine"


def _room(demand: Demand, machine: Machine) -> int:
    by_cores = int(machine.cores / demand.cores_a_node + 1e-9)
    if not demand.gpus:
        return by_cores
    if demand.gpus < 1:  # a share lies on one GPU
        return min(by_cores, int(1 / demand.gpus + 1e-9) * int(machine.gpus))
    return min(by_cores, int(machine.gpus) // demand.processes)


def _refuse_uneven(spec: TrialSpec, size: int) -> None:
    """Refuse what `core` would refuse once the processes have started."""
    training = spec.config.training
    if training.batch_size % (size * training.accumulate):
        raise WorkbenchError(
            f"training.batch_size {training.batch_size} does not divide into {size} processes x training.accumulate "
            f"{training.accumulate} equal parts: make it a multiple of {size * training.accumulate}, or change "
            "execution.gpus or execution.nodes"
        )


def _drawn(specs: Sequence[TrialSpec]) -> bool:
    return all(spec.config.data.kind != "coco" for spec in specs)
