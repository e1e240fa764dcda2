"""What a trial of each variant costs, from earlier records or a probe. Loads without torch.

Sources, best first: finished trials of the same variant, of the plan's other variants, a probe of the plan
(`workbench.probe`), similar trials of any study. Each number names its source; a range is that of its source.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from core.config import ExperimentConfig
from workbench import durable
from workbench.errors import WorkbenchError
from workbench.records import StudyResults, TrialRecord
from workbench.resources import Resources, resources_for
from workbench.search import own_name, own_variants
from workbench.store import Store
from workbench.study import Plan

MOST_SCANNED = 500  # trials of other studies that are looked at for similar ones, newest first
MOST_SIZED = 3  # trials of a variant whose folders are measured
_SAME_WORK = (  # of a configuration: with these equal, a picture takes about the same time and memory
    ("data", "kind"),
    ("data", "side"),
    ("data", "resize"),
    ("model", "kind"),
    ("model", "backbone"),
    ("model", "hidden_dim"),
    ("model", "ffn_dim"),
    ("model", "strides"),
    ("model", "extra_levels"),
    ("model", "encoder"),
    ("model", "decoder", "num_layers"),
    ("model", "decoder", "attention"),
    ("model", "queries", "num_queries"),
    ("model", "proposals"),
    ("training", "batch_size"),
    ("training", "accumulate"),
    ("training", "precision"),
    ("training", "threads"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What trials run on, as far as an estimate needs it. `note` says why this is not what the plan asks for."""

    device: str  # cpu, cuda
    at_once: int  # trials
    gpus: float = 0.0  # of a trial, on all its nodes
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one whole trial of a variant. `low` and `high` bound the seconds in the source; equal where it has one trial.

    `memory_bytes` is the trial's peak: resident on a CPU, allocated on the GPU otherwise.
    """

    seconds: float
    low: float
    high: float
    memory_bytes: int | None
    disk_bytes: int | None
    source: str


def machine_for(plan: Plan, *, gpus: float | None = None) -> Machine:
    """Return this machine, or a cluster of `gpus` GPUs.

    Raises:
        WorkbenchError: `gpus` are fewer than a trial takes, or its pictures are drawn, which never uses a GPU.
    """
    execution = plan.study.execution
    each = execution.gpus * execution.nodes
    if gpus is not None:
        if all(spec.config.data.kind != "coco" for spec in plan.specs.values()):
            raise WorkbenchError(
                f"--gpus {gpus:g}: profile {plan.study.profile} draws its pictures and trains on the CPU; "
                "name another with --profile, or drop --gpus"
            )
        if gpus < each:
            raise WorkbenchError(f"--gpus {gpus:g}: a trial takes {each:g} (execution.gpus x execution.nodes)")
        return Machine(device="cuda", at_once=int(gpus / each + 1e-9), gpus=each)
    try:
        return machine_of(plan, resources_for(tuple(plan.specs.values()), execution))
    except WorkbenchError as error:
        return Machine(device="cpu", at_once=1, note=str(error))


def machine_of(plan: Plan, resources: Resources, *, at_once: int | None = None) -> Machine:
    """Return what a driver gives to the trials of a plan; `at_once` where it runs fewer than fit."""
    execution = plan.study.execution
    gpus = execution.gpus * execution.nodes if resources.device == "cuda" else 0.0
    return Machine(device=resources.device, at_once=at_once or max(1, resources.concurrency), gpus=gpus)


def trial_costs(results: StudyResults, machine: Machine) -> dict[str, Cost] | None:
    """Return the cost of a trial by variant; None where there is no source."""
    store = Store(results.runs, create=False)
    return (
        recorded(results, machine)
        or _kept_probe(store, results.plan, machine)
        or _of_similar(store, results.plan, machine)
    )


def recorded(results: StudyResults, machine: Machine) -> dict[str, Cost] | None:
    """Return what the plan's own finished trials say, whichever study ran them; None where none has finished."""
    plan = results.plan
    own: dict[str, dict[str, TrialRecord]] = {variant.name: {} for variant in own_variants(plan)}
    for trial in plan.trials:
        record = results.records[trial.trial_id]
        if _usable(record, plan.specs[trial.trial_id].config.training.threads, machine):
            own[own_name(trial.variant)][trial.trial_id] = record
    together = {trial_id: record for records in own.values() for trial_id, record in records.items()}
    if not together:
        return None
    store = Store(results.runs, create=False)
    return {
        name: _of_records(store, records, "of the variant")
        if records
        else _of_records(store, together, "of the plan's other variants")
        for name, records in own.items()
    }


def _usable(record: TrialRecord, threads: int, machine: Machine) -> bool:
    """Tell whether a trial ran to its end on a device and with threads like those that are planned."""
    if record.state != "finished" or record.result is None or not record.total_seconds:
        return False
    return _ran_alike(record.result, threads, machine)


def _ran_alike(result: dict[str, Any], threads: int, machine: Machine) -> bool:
    made = result.get("provenance", {})
    return str(made.get("device", "cpu")).split(":")[0] == machine.device and made.get("threads", threads) == threads


def _of_records(store: Store, records: dict[str, TrialRecord], whose: str) -> Cost:
    seconds = [record.total_seconds for record in records.values()]
    results = [record.result or {} for record in records.values()]
    memory = [result["peak_memory_bytes"] for result in results if "peak_memory_bytes" in result]
    sizes = [size for trial_id in list(records)[:MOST_SIZED] if (size := folder_bytes(store.trial_dir(trial_id)))]
    return Cost(
        seconds=fmean(seconds),
        low=min(seconds),
        high=max(seconds),
        memory_bytes=max(memory, default=None),
        disk_bytes=round(fmean(sizes)) if sizes else None,
        source=f"{_count(len(seconds))} {whose}{_on(results)}",
    )


def _count(number: int) -> str:
    return f"{number} trial{'s' if number != 1 else ''}"


def _on(results: Iterable[dict[str, Any]]) -> str:
    """Name the GPUs that the source ran on: they may be others than those that are planned with."""
    names = dict.fromkeys(name for result in results for name in result.get("provenance", {}).get("gpus", ()))
    return f" on {', '.join(names)}" if names else ""


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            stamp = durable.stamp(f"{place}/{name}")  # None where it has just been replaced
            total += stamp[2] if stamp else 0
    return total


def _of_similar(store: Store, plan: Plan, machine: Machine) -> dict[str, Cost] | None:
    """Return costs from trials of other plans whose pictures and sizes are alike, scaled to the pictures trained."""
    found = list(_other_trials(store, set(plan.specs)))
    costs: dict[str, Cost] = {}
    for variant in own_variants(plan):
        config, data = variant.config.model_dump(mode="json"), _fingerprint(plan, variant.config)
        seconds, taken = [], []
        for trial_id, spec, result in found:
            scale = _scale(spec, config, data)
            if scale is not None and _ran_alike(result, config["training"]["threads"], machine):
                rest = max(0.0, result["total_seconds"] - result["seconds"])
                seconds.append(scale * result["seconds"] + rest)
                taken.append((trial_id, result))
        if not seconds:
            return None
        sizes = [folder_bytes(store.trial_dir(trial_id)) for trial_id, _ in taken[:MOST_SIZED]]
        costs[variant.name] = Cost(
            seconds=fmean(seconds),
            low=min(seconds),
            high=max(seconds),
            memory_bytes=max(result["peak_memory_bytes"] for _, result in taken),
            disk_bytes=round(fmean(sizes)),
            source=f"{_count(len(taken))} of other studies with like sizes{_on(result for _, result in taken)}",
        )
    return costs


def _fingerprint(plan: Plan, config: ExperimentConfig) -> str:
    return next((spec.data_fingerprint for spec in plan.specs.values() if spec.config.data == config.data), "")


def _other_trials(store: Store, own: set[str]) -> Iterable[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield id, spec.json and result.json of finished trials, newest first."""
    try:
        with os.scandir(store.root / "trials") as entries:
            folders = sorted(((entry.stat().st_mtime, entry.name) for entry in entries), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    for _, name in folders[:MOST_SCANNED]:
        result = None if name in own else store.result(name)
        spec = result and durable.read_json(store.trial_dir(name) / "spec.json")
        if result and spec and result["outcome"] == "finished" and _whole(result) and "config" in spec:
            yield name, spec, result


def _whole(result: dict[str, Any]) -> bool:
    return {"seconds", "total_seconds", "peak_memory_bytes"} <= result.keys()


def _scale(spec: dict[str, Any], config: dict[str, Any], data: str) -> float | None:
    """Return how many times the pictures of another trial are trained; None where the two are not alike."""
    theirs = spec["config"]
    if any(_at(theirs, path) != _at(config, path) for path in _SAME_WORK):
        return None
    ours, others = _pictures(config), _pictures(theirs)
    if (ours is None) != (others is None) or (ours is None and spec.get("data_fingerprint") != data):
        return None
    epochs = config["training"]["epochs"] / theirs["training"]["epochs"]
    return epochs * (ours / others if ours and others else 1.0)


def _pictures(config: dict[str, Any]) -> int | None:
    """Return the pictures of an epoch, or None where only the folder knows them."""
    return config["training"].get("epoch_pictures") or config["data"].get("num_train")


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def probe_file(store: Store, plan: Plan) -> Path:
    """Return where the probe of a plan is kept."""
    return store.study_dir(plan) / "probe.json"


def _cost_from_json(plain: dict[str, Any]) -> Cost:
    seconds = {name: float(plain[name]) for name in ("seconds", "low", "high")}
    sizes = {name: int(plain[name]) for name in ("memory_bytes", "disk_bytes")}
    return Cost(**seconds, **sizes, source=str(plain["source"]))


def _kept_probe(store: Store, plan: Plan, machine: Machine) -> dict[str, Cost] | None:
    kept = durable.read_json(probe_file(store, plan))
    if kept is None or kept.get("device") != machine.device:
        return None
    try:
        costs = {name: _cost_from_json(cost) for name, cost in kept["costs"].items()}
    except durable.UNUSABLE:  # as if it were not there: a probe is made again
        return None
    return costs if costs.keys() >= {variant.name for variant in own_variants(plan)} else None
