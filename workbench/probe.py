"""Measure what a trial costs from a few steps and a few scored pictures, before any trial has run.

The dearest variant is found by a step or two of each; then it is measured in processes like those of trials, on a CPU
in as many at once as trials run, since they share memory and cores. Nothing of it becomes a record of a trial; what
was measured is kept beside the plan.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from core.config import EvaluationConfig, ExperimentConfig, Shapes
from workbench import durable, provenance, template
from workbench.costs import Cost, Machine, probe_file, recorded
from workbench.errors import WorkbenchError
from workbench.records import StudyResults
from workbench.search import own_variants
from workbench.store import Store
from workbench.study import Plan, TrialSpec
from workbench.user_code import refuse_code

STEPS, SHORT_STEPS, WARM_UP = 24, 3, 2  # of the dearest variant; of each, to find it; not counted at the start of both
PICTURES = 24  # that are scored
MOST_COPIES = 8  # processes that measure at once
BYTES_A_ROW = 13  # of predictions.parquet, compressed: measured on 60,000 rows of drawn pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Of one process, on some pictures of its data. Times in seconds; `steps` are those of the timed ones."""

    steps: tuple[float, ...]
    total_steps: int
    opening: float  # data and model
    picture: float  # scored
    num_val: int
    rows: float  # of predictions, a picture
    saving: float
    checkpoint_bytes: int
    memory_bytes: int

    @property
    def step(self) -> float:
        """Return the mean of a step."""
        return fmean(self.steps)


def probe(
    plan: Plan,
    store: Store,
    machine: Machine,
    *,
    allow_code: bool,
    tell: Callable[[str], None],
    address: str | None = None,
) -> dict[str, Cost]:
    """Measure, keep and return the cost of a trial by variant; on nodes of the Ray cluster at `address`, if given.

    Raises:
        WorkbenchError: code of the user's own is not allowed, there is no such device here, or a measuring process
            failed, as when memory runs out.
    """
    if not allow_code:
        refuse_code(plan)
    if machine.device == "cuda" and address is None and not provenance.visible_gpus():
        raise WorkbenchError("--probe: there is no GPU here: run it on a machine that has one of the cluster's kind")
    specs = {
        variant.name: next(plan.specs[trial.trial_id] for trial in plan.trials if trial.variant == variant.name)
        for variant in own_variants(plan)
    }
    threads = max(spec.config.training.threads for spec in specs.values())
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    processes = partial(
        _processes,
        address=address,
        device=machine.device,
        threads=threads,
        gpus=min(1.0, machine.gpus),
        log=probe_file(store, plan).with_suffix(".log"),
    )
    copies = min(machine.at_once, MOST_COPIES) if machine.device == "cpu" else 1
    tell(f"Probing {len(specs)} variants with a step or two, and the dearest with {STEPS} steps, {copies} at once")
    try:
        with processes(1) as pool:
            short = pool.submit(_short, list(specs.values()), machine.device, store.cache_dir).result()
        by_variant = dict(zip(specs, short, strict=True))
        dearest = max(by_variant, key=lambda name: by_variant[name].step * by_variant[name].total_steps)
        with processes(copies) as pool:
            asked = [
                pool.submit(measure, specs[dearest], machine.device, STEPS, store.cache_dir) for _ in range(copies)
            ]
            found = _mean([future.result() for future in asked])
    except (BrokenProcessPool, OSError, RuntimeError, ValueError) as error:
        told = "a measuring process died, as when memory runs out" if isinstance(error, BrokenProcessPool) else error
        raise WorkbenchError(f"--probe: {told}") from error
    costs = {
        name: extrapolated(
            specs[name].config,
            short=by_variant[name],
            found=found,
            reference=by_variant[dearest],
            machine=machine,
            dearest=dearest,
        )
        for name in specs
    }
    path = probe_file(store, plan)
    kept = {"device": machine.device, "at_once": copies, "dearest": dearest, "code_hash": provenance.code_hash()}
    durable.write_json(
        path, {"probed_at": durable.now(), **kept, "costs": {name: asdict(cost) for name, cost in costs.items()}}
    )
    return costs


def probe_where_needed(
    results: StudyResults, machine: Machine, *, allow_code: bool, tell: Callable[[str], None]
) -> None:
    """Probe a plan unless a trial of it is on record, whose cost is a better source."""
    if recorded(results, machine) is not None:
        tell("--probe: trials of this plan are on record, which say more; nothing was measured")
    else:
        probe(results.plan, Store(results.runs), machine, allow_code=allow_code, tell=tell)


def _processes(
    count: int, *, address: str | None, device: str, threads: int, gpus: float, log: Path
) -> AbstractContextManager[Any]:
    """Return processes like those of trials: on a CPU forks of one that has imported torch, else they share nothing."""
    if address is not None:
        from workbench.ray_executor import measuring  # Ray takes seconds

        return measuring.processes(address, cores=threads, gpus=gpus, log=log)
    forks = template.AVAILABLE and device == "cpu"
    context = get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(list(template.MODULES))
    return ProcessPoolExecutor(count, mp_context=context)


def _mean(found: list[Measured]) -> Measured:
    """Return what the copies measured together: all their steps, the mean of the rest, the largest memory."""
    return replace(
        found[0],
        steps=tuple(step for one in found for step in one.steps),
        opening=fmean(one.opening for one in found),
        picture=fmean(one.picture for one in found),
        saving=fmean(one.saving for one in found),
        memory_bytes=max(one.memory_bytes for one in found),
    )


def extrapolated(
    config: ExperimentConfig, *, short: Measured, found: Measured, reference: Measured, machine: Machine, dearest: str
) -> Cost:
    """Return the cost of a whole trial of a variant.

    Args:
        config: of the variant.
        short: its short probe, which says how many steps it has and how dear they are beside the dearest's.
        found: the long probe of the dearest variant.
        reference: the short one of the same.
        machine: where the trials will run. On several GPUs the steps are taken to be that many times as fast.
        dearest: the name of the dearest variant.
    """
    ratio = short.step / reference.step / max(1.0, machine.gpus)
    training, evaluations = config.training, 1 if config.training.ema_decay is None else 2
    subset = min(config.evaluation.training_subset, found.num_val)
    rest = (
        found.opening
        + training.epochs * (subset * found.picture + found.saving)
        + evaluations * (found.num_val * found.picture + found.saving)
    )
    tenths = quantiles(found.steps, n=10) if len(found.steps) > 1 else [found.step]
    rows = evaluations * found.num_val * found.rows
    spread = f", as if {machine.gpus:g} GPUs were that many times as fast" if machine.gpus > 1 else ""
    return Cost(
        seconds=short.total_steps * ratio * found.step + rest,
        low=short.total_steps * ratio * tenths[0] + rest,
        high=short.total_steps * ratio * tenths[-1] + rest,
        memory_bytes=found.memory_bytes,
        disk_bytes=round(_kept() * found.checkpoint_bytes + rows * BYTES_A_ROW),
        source=f"a probe of {len(found.steps)} steps of {dearest}{spread}",
    )


def _kept() -> int:
    from core.checkpoint import KEPT  # brings torch

    return KEPT


# In a process of its own


def _short(specs: list[TrialSpec], device: str, cache: Path) -> list[Measured]:
    return [measure(spec, device, SHORT_STEPS, cache) for spec in specs]


def measure(spec: TrialSpec, device: str, steps: int, cache: Path) -> Measured:
    """Train `steps` steps after some that warm up, score some pictures and save once, in a temporary folder."""
    from core.custom import given_as_text

    with TemporaryDirectory() as folder, given_as_text(spec.code, folder=Path(folder) / "code"):
        return _measured(spec, device, steps, cache, Path(folder))


def _measured(spec: TrialSpec, device_name: str, steps: int, cache: Path, folder: Path) -> Measured:
    import torch

    from core.data.batching import steps_per_epoch
    from core.data.splits import open_data
    from core.memory import peak_memory_bytes, reset_peak_memory
    from core.trainer import Trainer

    device = torch.device(device_name)
    reset_peak_memory(device)
    config, drawn = _smaller(spec.config), spec.config.data
    began = time.perf_counter()
    data = open_data(config.data, root=Path(spec.data_root) if spec.data_root else None, cache=cache)
    trainer = Trainer(config, seed=spec.seed, data=data, device=device)
    opening = time.perf_counter() - began
    timed = [_seconds(trainer.step) for _ in range(min(WARM_UP + steps, trainer.total_steps))]
    trainer.close()
    saving = _seconds(lambda: trainer.save(folder))
    picture, rows = _scoring(trainer, config.evaluation, device)
    shapes = isinstance(drawn, Shapes)
    per_epoch = steps_per_epoch(drawn.num_train if shapes else len(data.train), config.training)
    return Measured(
        steps=tuple(timed[WARM_UP:] or timed),
        total_steps=per_epoch * config.training.epochs,
        opening=opening,
        picture=picture,
        num_val=drawn.num_val if shapes else len(data.scored),
        rows=rows,
        saving=saving,
        checkpoint_bytes=sum(path.stat().st_size for path in folder.glob("*.pt")),
        memory_bytes=peak_memory_bytes(device),
    )


def _smaller(config: ExperimentConfig) -> ExperimentConfig:
    """Draw only the pictures that a probe looks at; a folder is there as it is."""
    if not isinstance(config.data, Shapes):
        return config
    few = {
        "num_train": min(config.data.num_train, 8 * config.training.batch_size),
        "num_val": min(config.data.num_val, PICTURES),
    }
    return config.model_copy(update={"data": config.data.model_copy(update=few)})


def _scoring(trainer: Any, config: EvaluationConfig, device: Any) -> tuple[float, float]:
    """Return the seconds and the rows of predictions that a scored picture takes, after a batch that warms up."""
    from core.evaluation.score import KEPT_PAIRS, score

    (detector,) = trainer.scored().values()
    count = min(PICTURES, len(trainer.data.scored))
    first = range(min(config.batch_size, count))
    score(detector, config, data=trainer.data, indices=first, device=device)
    began = time.perf_counter()
    _, found = score(detector, config, data=trainer.data, indices=range(count), device=device)
    rows = fmean(min(len(one.scores), KEPT_PAIRS) for one in found)
    return (time.perf_counter() - began) / count, rows


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
