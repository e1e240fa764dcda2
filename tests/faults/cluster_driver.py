"""A driver of the toy study on a cluster, as a process: `python cluster_driver.py JSON`. Its exit code is the run's."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gate import Gate
from toys import Poison, ToyTrainer, toy_plan

from workbench.errors import WorkbenchError
from workbench.options import Options
from workbench.placement import Demand
from workbench.ray_executor import cluster, tuner
from workbench.runner import run_study
from workbench.store import Store
from workbench.study import Plan


def plan_of(
    place: Path, *, threads: int = 1, gpus: float = 1.0, nodes: int = 1, seeds: int = 2, variants: str = "all"
) -> Plan:
    """Return the plan that a driver in `place` runs."""
    plan = toy_plan(place, seeds=seeds, variants=(variants,))
    training = {"threads": threads}
    specs = {
        trial_id: replace(
            spec,
            config=spec.config.model_copy(update={"training": spec.config.training.model_copy(update=training)}),
        )
        for trial_id, spec in plan.specs.items()
    }
    study = replace(plan.study, execution=replace(plan.study.execution, gpus=gpus, nodes=nodes))
    return replace(plan, specs=specs, study=study)


def switch_off(protection: str) -> None:
    """Take a protection away from this process."""
    if protection == "node checks":
        cluster._ask = lambda nodes, *_: {node: {"problems": [], "versions": {}, "clock": (0, 0)} for node in nodes}
    elif protection == "resource checks":
        cluster.places = lambda *_: 1
        known_demand = cluster.demand_of
        cluster.demand_of = lambda specs, asked, _: (
            Demand(device="cpu", threads=1, gpus=1.0) if asked.gpus > 1 else known_demand(specs, asked, ())
        )
    elif protection == "retries":
        known = tuner.tune.FailureConfig
        tuner.tune.FailureConfig = lambda **_: known(max_failures=0)
    else:
        raise ValueError(protection)


def main(told: dict[str, Any]) -> int:
    """Run the study as told."""
    for protection in told["off"]:
        switch_off(protection)
    place = Path(told["place"])
    gate: Any = Gate(step=told.get("gate", 0), file=place / "gate")
    poisons = [Poison(**poison, marker=place / f"struck-{poison['kind']}") for poison in told.get("poisons", ())]
    options = Options(
        address=told["address"],
        executor=told["executor"],
        trainer=ToyTrainer(
            steps=told["steps"],
            every=told["every"],
            seconds=told.get("seconds", 0.0),
            poisons=(*poisons, gate),
            victim=told.get("victim", 0),
        ),
        tracking_uri="http://127.0.0.1:9",
    )
    try:
        return run_study(plan_of(place, **told["plan"]), Store(place / "runs"), options, out=sys.stdout, err=sys.stderr)
    except WorkbenchError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
