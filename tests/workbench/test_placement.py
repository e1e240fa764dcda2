"""Where trials fit: on one machine each, on several where the study says so, or nowhere, which is said at once."""

from dataclasses import replace

import pytest

from core.config import CocoFolder
from workbench.errors import WorkbenchError
from workbench.placement import Demand, Machine, demand_of, places
from workbench.resources import resources_for
from workbench.study import Execution


def node(cores, gpus=0, name="node"):
    """Return a machine."""
    return Machine(name=name, cores=cores, gpus=gpus)


@pytest.fixture
def drawn(toy_plan):
    """Return trials with drawn pictures."""
    return tuple(toy_plan.specs.values())


@pytest.fixture
def real(drawn):
    """Return trials with real pictures."""
    return tuple(
        replace(spec, config=spec.config.model_copy(update={"data": CocoFolder(kind="coco", root="/data")}))
        for spec in drawn
    )


@pytest.mark.parametrize(
    ("demand", "machines", "expected"),
    [
        (Demand(device="cpu", threads=2), [node(5), node(3)], 3),
        (Demand(device="cuda", threads=4, gpus=1.0), [node(16, 8), node(64, 8)], 12),
        (Demand(device="cuda", threads=1, gpus=0.5), [node(8, 2)], 4),
        (Demand(device="cuda", threads=1, gpus=0.4), [node(8, 2)], 4),  # a share does not lie across two GPUs
        (Demand(device="cuda", threads=2, processes=4, gpus=1.0), [node(64, 8), node(64, 6), node(4, 8)], 3),
        (Demand(device="cpu", threads=1, nodes=2), [node(2), node(2), node(2)], 1),
        (Demand(device="cpu", threads=1, nodes=2), [node(6), node(2), node(2)], 2),
        (Demand(device="cuda", threads=1, processes=8, nodes=2, gpus=1.0), [node(64, 8)] * 5, 2),
    ],
)
def test_trials_at_once(demand, machines, expected):
    """As many trials run at once as find all that they need on one machine, or on as many as they span."""
    assert places(demand, machines) == expected


@pytest.mark.parametrize(
    ("demand", "machines"),
    [
        (Demand(device="cpu", threads=4), [node(3), node(3)]),
        (Demand(device="cuda", threads=1, processes=4, gpus=1.0), [node(64, 3), node(64, 3)]),
        (Demand(device="cpu", threads=1, nodes=2), [node(64)]),
        (Demand(device="cpu", threads=1), []),
    ],
)
def test_what_only_the_sum_of_machines_has_is_refused(demand, machines):
    """A trial that no machine can hold is refused with what it asks for, what each has, and what to change."""
    with pytest.raises(WorkbenchError, match=r"lower training\.threads, execution\.gpus or execution\.nodes") as caught:
        places(demand, machines)
    assert f"a trial asks for {demand}" in str(caught.value)
    assert all(str(machine) in str(caught.value) for machine in machines)


def test_what_a_trial_takes_follows_its_pictures_and_the_study(drawn, real):
    """Real pictures go to GPUs where there are any, one process for each; drawn ones stay on the CPU."""
    gpus = [node(64, 8)]
    assert demand_of(drawn, Execution(), gpus).device == "cpu"
    assert demand_of(real, Execution(), [node(64)]).device == "cpu"
    four = demand_of(real, Execution(gpus=4), gpus)
    assert (four.device, four.processes, four.gpus, four.world_size, four.gpu_share) == ("cuda", 4, 1.0, 4, 1.0)
    assert four.cores_a_node == 4 * four.threads
    half = demand_of(real, Execution(gpus=0.5), gpus)
    assert (half.processes, half.gpus, half.to_json()["gpu_share"]) == (1, 0.5, 0.5)
    two = demand_of(real, Execution(gpus=4, nodes=2), gpus)
    assert (two.world_size, two.cores_a_node) == (8, 4 * two.threads + 0.5)
    assert demand_of(drawn, Execution(nodes=2), [node(2)] * 2).world_size == 2


def test_gpus_that_would_not_be_used_are_refused(drawn, real):
    """GPUs on a machine without any, or for drawn pictures, are refused before anything starts."""
    with pytest.raises(WorkbenchError, match=r"execution.gpus is 2, and no GPU is there: a: 8 cores, 0 GPUs"):
        demand_of(real, Execution(gpus=2), [node(8, name="a")])
    with pytest.raises(WorkbenchError, match="its pictures are drawn"):
        demand_of(drawn, Execution(gpus=2), [node(8, 8)])
    with pytest.raises(WorkbenchError, match="a trial on several nodes needs whole GPUs"):
        demand_of(real, Execution(gpus=0.5, nodes=2), [node(8, 8)] * 2)


def test_pictures_that_do_not_divide_are_refused(drawn):
    """A step's pictures are shared evenly, which is checked before the processes start."""
    batch = drawn[0].config.training.batch_size
    with pytest.raises(WorkbenchError, match=rf"training.batch_size {batch} does not divide into 7 processes .* 7"):
        demand_of(drawn, Execution(nodes=7), [node(2)] * 7)


def test_this_machine_is_a_machine(drawn, monkeypatch):
    """Two halves of a GPU are two trials here, too."""
    monkeypatch.setattr("workbench.provenance.available_cores", lambda: 3)
    monkeypatch.setattr("workbench.provenance.visible_gpus", lambda: ("a GPU",))
    found = resources_for(drawn, Execution())
    assert (found.concurrency, found.device, found.threads) == (3, "cpu", 1)
