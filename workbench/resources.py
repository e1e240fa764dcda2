"""What there is for trials, and what each of them takes of it."""

from dataclasses import dataclass

from workbench import provenance
from workbench.placement import Demand, Machine, demand_of, places
from workbench.study import Execution, TrialSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What there is for a study, here or on a cluster, and what each trial takes of it."""

    cores: int
    gpus: tuple[str, ...]
    concurrency: int  # how many trials run at once, so that threads never outnumber the cores
    demand: Demand  # of a trial

    @property
    def threads(self) -> int:
        """Threads of each process of a trial."""
        return self.demand.threads

    @property
    def device(self) -> str:
        """The device of every trial: cpu or cuda."""
        return self.demand.device


def resources_for(specs: tuple[TrialSpec, ...], execution: Execution) -> Resources:
    """Return what trials on this machine get.

    Raises:
        WorkbenchError: a trial asks for what this machine does not have.
    """
    cores, gpus = provenance.available_cores(), provenance.visible_gpus()
    machines = [Machine(name="this machine", cores=cores, gpus=len(gpus))]
    demand = demand_of(specs, execution, machines)
    return Resources(cores=cores, gpus=gpus, concurrency=places(demand, machines), demand=demand)
