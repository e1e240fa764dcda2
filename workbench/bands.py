"""Where the losses of a sound training lie: in its first 200 steps, and over the first epoch. Loads without torch.

A band belongs to one training: configuration, pictures and version of the numerics. It is made of several seeds'
losses, so it catches what is broken (a wrong rate, wrong targets, another loss), not what is a little worse. Those that
could be measured here are shipped in `studies/bands.json`; those recorded by a user lie in the runs folder and are laid
over them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from core import numerics
from core.parts import scientific
from workbench import durable, provenance
from workbench.errors import StoreError, WorkbenchError
from workbench.store import Store
from workbench.study import Plan, TrialSpec

SHIPPED = Path(__file__).resolve().parent.parent / "studies" / "bands.json"
STEPS, WINDOW = 200, 50  # that are trained; the mean loss of each window of steps is compared
SEEDS = 5  # of a band that is recorded
WIDTH_SD, WIDTH_SHARE = 5.0, 0.03  # half the width of a band: standard deviations, but at least a share of the mean
KEY_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Means of the weighted sum of losses, lowest and highest; `windows`: of each `WINDOW` of the first steps."""

    name: str  # which training, in words
    windows: tuple[tuple[float, float], ...]
    first_epoch: tuple[float, float] | None  # mean of all its steps; None where only the steps were trained
    source: str


def key_of(spec: TrialSpec) -> str:
    """Return what a band belongs to: a training, whatever its seed, evaluation and study."""
    config = scientific(spec.config)
    del config["evaluation"]
    identity = {"config": config, "pictures": spec.data_fingerprint, "numerics": numerics.VERSION, "code": spec.code}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def own_file(store: Store) -> Path:
    """Return where the bands are that were recorded here."""
    return store.root / "gates" / "bands.json"


def known(store: Store, spec: TrialSpec) -> Band | None:
    """Return the band of a training."""
    key = key_of(spec)
    for path in (own_file(store), SHIPPED):
        found = kept(path).get(key)
        if found is not None:
            return _from_json(found, path)
    return None


def kept(path: Path) -> dict[str, Any]:
    """Return the bands in a file by their keys, as they are there; none where there is no file or a damaged one."""
    found = (durable.read_json(path) or {}).get("bands")
    return found if isinstance(found, dict) else {}


def _from_json(plain: dict[str, Any], path: Path) -> Band:
    try:
        first = plain["first_epoch"]
        return Band(
            name=plain["name"],
            windows=tuple((float(low), float(high)) for low, high in plain["windows"]),
            first_epoch=None if first is None else (float(first[0]), float(first[1])),
            source=plain["source"],
        )
    except (*durable.UNUSABLE, IndexError) as error:
        raise StoreError(f"{path}: a band cannot be read ({error!r}): remove the file and record it again") from error


def around(values: Sequence[float]) -> tuple[float, float]:
    """Return the band of some seeds' losses."""
    half = max(WIDTH_SD * stdev(values), WIDTH_SHARE * abs(fmean(values)))
    return fmean(values) - half, fmean(values) + half


def record(store: Store, spec: TrialSpec, *, name: str, epoch: bool, device: str, tell: Callable[[str], None]) -> Band:
    """Train the first steps with `SEEDS` seeds, or the first epoch too, and keep the band of their losses.

    Raises:
        WorkbenchError: a loss was not finite, so there is no band.
    """
    runs = []
    for seed in range(SEEDS):
        tell(f"Seed {seed}, {seed + 1} of {SEEDS}: {'the first epoch' if epoch else f'{STEPS} steps'} of {name}")
        runs.append(losses(spec, seed=seed, device=device, cache=store.cache_dir, epoch=epoch))
    windows = [in_windows(run.losses) for run in runs]
    means = [fmean(run.losses[: run.steps_per_epoch]) for run in runs]
    if not all(map(math.isfinite, (*means, *(mean for run in windows for mean in run)))):
        raise WorkbenchError(f"no band of {name}: a loss was not finite in one of {SEEDS} seeds")
    whole = all(len(run.losses) >= run.steps_per_epoch for run in runs)
    band = Band(
        name=name,
        windows=tuple(map(around, zip(*windows, strict=True))),
        first_epoch=around(means) if whole else None,
        source=f"{SEEDS} seeds on {device}, core code {provenance.code_hash()}, {durable.now()[:10]}",
    )
    path = own_file(store)
    durable.write_json(path, {"bands": {**kept(path), key_of(spec): asdict(band)}})
    return band


def in_windows(values: Sequence[float]) -> list[float]:
    """Return the mean of each window of the first steps, as `Band.windows` bounds them; the last may be shorter."""
    first = values[:STEPS]
    return [fmean(first[begin : begin + WINDOW]) for begin in range(0, len(first), WINDOW)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The total loss of each step; the last one is not finite where the training diverged there."""

    losses: tuple[float, ...]
    steps_per_epoch: int


def losses(spec: TrialSpec, *, seed: int, device: str, cache: Path, epoch: bool = False) -> Losses:
    """Train the first `STEPS` steps of a trial, or its first epoch where that is longer and asked for; keep nothing."""
    import torch

    from core.data.splits import open_data
    from core.trainer import Trainer

    data = open_data(spec.config.data, root=Path(spec.data_root) if spec.data_root else None, cache=cache)
    trainer = Trainer(spec.config, seed=seed, data=data, device=torch.device(device))
    count = max(STEPS, trainer.steps_per_epoch) if epoch else STEPS
    found: list[float] = []
    try:
        found.extend(trainer.step()[0]["total"] for _ in range(min(count, trainer.total_steps)))
    except FloatingPointError:
        found.append(math.nan)
    finally:
        trainer.close()
    return Losses(losses=tuple(found), steps_per_epoch=trainer.steps_per_epoch)


def first_epoch_watch(store: Store, plan: Plan) -> Callable[[], str | None] | None:
    """Return a check of the baseline's trials: what was found where the first epoch of one left the band.

    None where no band of the baseline's first epoch is known.
    """
    trials = {trial.trial_id: trial for trial in plan.trials if trial.variant == plan.study.baseline}
    band = known(store, plan.specs[next(iter(trials))])
    if band is None or band.first_epoch is None:
        return None
    low, high = band.first_epoch

    def check() -> str | None:
        for trial_id, trial in trials.items():
            record = store.record(trial_id)
            first = next((event for event in record.epochs if event.epoch == 1), None)
            loss = first.losses["total"] if first is not None else math.nan if record.state == "diverged" else None
            if loss is not None and not low <= loss <= high:
                return (
                    f"the first epoch of the baseline {trial.variant}, seed {trial.seed}, has a mean loss of "
                    f"{loss:.4g}, outside the band {low:.4g} to {high:.4g} ({band.source})"
                )
        return None

    return check
