"""What is kept of finished trials when `execution.quota` limits the checkpoints and predictions in a runs folder.

Above the quota, room is made in this order: the checkpoints of finished trials, the trial that finished first goes
first; then, if that was not enough, their predictions in the same order. Nothing is taken from a trial that is not
finished, that somebody works on, or of which this study still asks for an evaluation. Results, metrics, events and
specs always stay. What was taken is on record in the trial's `removed.json`.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workbench import attempts, disk, durable, trial_files
from workbench.records import TrialRecord
from workbench.study import Plan, TrialSpec

REMOVED = "removed.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What a look at the quota did: trials that lost files, the bytes these had, and by how much it is still passed."""

    trials: int
    freed: int
    over: int


def keep_within(runs: Path, quota_bytes: int, *, plan: Plan) -> Kept:
    """Make room until the checkpoints and predictions in `runs` fit the quota, or nothing more may go."""
    sizes = {folder: disk.size_of(folder) for folder in sorted((runs / "trials").glob("*"))}
    used = sum(size.checkpoint + size.predictions for size in sizes.values())
    if used <= quota_bytes:
        return Kept(trials=0, freed=0, over=0)
    finished = [folder for folder in _oldest_first(sizes) if _may_go(folder, plan.specs.get(folder.name))]
    freed, touched = 0, set[Path]()
    for part in ("checkpoint", "predictions"):
        for folder in finished:
            size: int = getattr(sizes[folder], part)
            if used - freed > quota_bytes and size:
                _remove(folder, part, size)
                freed += size
                touched.add(folder)
    return Kept(trials=len(touched), freed=freed, over=max(0, used - freed - quota_bytes))


def without_checkpoint(runs: Path, records: Iterable[TrialRecord]) -> list[str]:
    """Return the finished trials that have no checkpoint to score again: they must be trained again."""
    folders = [runs / "trials" / record.trial_id for record in records if record.state == "finished"]
    return [folder.name for folder in folders if not any((folder / "checkpoints").glob("*"))]


def was_removed(folder: Path) -> bool:
    """Tell whether a trial's checkpoint went for the quota."""
    plain = durable.read_json(folder / REMOVED)
    return plain is not None and "checkpoint" in plain


def forget(folder: Path) -> None:
    """Say that a trial has what was removed again."""
    (folder / REMOVED).unlink(missing_ok=True)


def _oldest_first(folders: Iterable[Path]) -> list[Path]:
    ended = [(result["finished_at"], folder) for folder in folders if (result := trial_files.result(folder))]
    return [folder for _, folder in sorted(ended)]


def _may_go(folder: Path, spec: TrialSpec | None) -> bool:
    tried = attempts.read(folder)
    if tried and tried[-1].running(folder):
        return False
    ended = trial_files.result(folder)
    if spec is None or ended is None or ended["outcome"] == "diverged":
        return ended is not None
    return spec.evaluations.keys() <= trial_files.metrics(folder, ended.get("weights_hash")).keys()


def _remove(folder: Path, part: str, size: int) -> None:
    if part == "checkpoint":
        shutil.rmtree(folder / "checkpoints")
    else:
        for path in folder.glob("evaluations/*/predictions.parquet"):
            path.unlink()
    # Only now, since a disk that is full has no room for it before.
    said = durable.read_json(folder / REMOVED) or {}
    durable.write_json(folder / REMOVED, {**said, part: {"bytes": size, "at": durable.now(), "for": "quota"}})
