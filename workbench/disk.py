"""Room on the disk: asked for before trials start, watched while they run, and told of where it ran out.

What an outstanding trial will write is known from finished trials of the same plan: as much as the largest of the last
20. Before one has finished it is estimated from the configuration, rather too high than too low: 20 bytes a parameter
for a checkpoint (weights, two moments of the optimiser and averaged weights in fp32), 30 bytes a row of predictions
(300 rows a picture) and 1 MB for the rest. Beside what stays, each trial at work has two further checkpoints.
"""

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import ExperimentConfig, SmallResNet
from workbench.errors import StoreError, WorkbenchError
from workbench.labels import size
from workbench.records import TrialRecord
from workbench.repeating import repeating
from workbench.study import TrialSpec

RESERVE_BYTES = 256 * 1000**2
"""What stays free for records, MLflow, Ray and everybody else: below it, a run stops in good order."""
WATCH_SECONDS = 10.0
CHECKPOINTS_AT_WORK = 3  # of one trial at most: the last, the one before, and the one that is being written

FULL = (errno.ENOSPC, errno.EDQUOT)
_PATIENCE_SECONDS = 5.0  # for what another process is about to give up
_MEASURED_TRIALS = 20
_BYTES_A_PARAMETER, _BYTES_A_ROW, _ROWS_A_PICTURE, _OTHER_BYTES = 20, 30, 300, 1024**2
_COCO_VAL_PICTURES = 5000  # of a folder whose pictures are not counted yet
_MILLIONS = {"resnet": {18: 11, 34: 21, 50: 24, 101: 43}, "swin_v2": {"tiny": 28, "small": 50, "base": 88}}
_MILLIONS_UNKNOWN = 30  # parameters of a backbone that is only known by a name


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bytes of a trial: one checkpoint, the predictions of all its evaluations, and all else."""

    checkpoint: int
    predictions: int
    rest: int

    @property
    def total(self) -> int:
        """Return what stays of a finished trial."""
        return self.checkpoint + self.predictions + self.rest


def check_room(
    runs: Path,
    records: Sequence[TrialRecord],
    outstanding: Sequence[TrialSpec],
    *,
    at_once: int,
    quota_bytes: int | None,
) -> None:
    """Refuse to start trials that the disk, or the quota, has no room for.

    Args:
        runs: the runs folder.
        records: of the same plan, from whose finished trials the size of others is known.
        outstanding: what is to run.
        at_once: how many trials run at a time.
        quota_bytes: of checkpoints and predictions; None where there is no limit.

    Raises:
        WorkbenchError: with what is needed, what is free and what to do.
    """
    if not outstanding:
        return
    measured = measured_size(runs, records)
    sizes = [expected_size(spec, measured) for spec in outstanding]
    largest = max(size.checkpoint for size in sizes)
    at_work = largest * (CHECKPOINTS_AT_WORK - 1) * min(at_once, len(sizes))
    if quota_bytes is not None and largest + at_work > quota_bytes:
        raise WorkbenchError(
            f"{runs}: execution.quota is {size(quota_bytes)}, and the checkpoints of the trials that run at once take "
            f"about {size(largest + at_work)}: raise the quota"
        )
    kept = sum(size.checkpoint + size.predictions for size in sizes)
    kept = kept if quota_bytes is None else min(kept, quota_bytes)
    needed = kept + at_work + sum(size.rest for size in sizes)
    free = free_bytes(runs)
    if needed + RESERVE_BYTES > free:
        known = "from the finished trials" if measured else "estimated before one has finished"
        raise WorkbenchError(
            f"{runs}: the {len(sizes)} trials to run will write about {size(needed)} ({known}), "
            f"{size(RESERVE_BYTES)} are to stay free, and {size(free)} are free: make room, name another folder "
            "with --runs, or set execution.quota, which removes checkpoints of finished trials"
        )


def measured_size(runs: Path, records: Sequence[TrialRecord]) -> Size | None:
    """Return the largest of the finished trials that still have their checkpoint; None where there is none."""
    ended = [record for record in records if record.state == "finished" and record.result]
    ended.sort(key=lambda record: (record.result or {})["finished_at"], reverse=True)
    found = [size_of(runs / "trials" / record.trial_id) for record in ended[:_MEASURED_TRIALS]]
    found = [size for size in found if size.checkpoint]
    if not found:
        return None
    parts = {name: max(getattr(size, name) for size in found) for name in ("checkpoint", "predictions", "rest")}
    return Size(**parts)


def expected_size(spec: TrialSpec, measured: Size | None) -> Size:
    """Return what a trial will leave: as measured, or by the rule at the top of this module."""
    if measured is not None:
        return measured
    data = spec.config.data
    pictures = data.num_val if data.kind == "shapes" else _COCO_VAL_PICTURES
    return Size(
        checkpoint=_BYTES_A_PARAMETER * parameters(spec.config),
        predictions=_BYTES_A_ROW * _ROWS_A_PICTURE * pictures * len(spec.evaluations),
        rest=_OTHER_BYTES,
    )


def parameters(config: ExperimentConfig) -> int:
    """Return about how many parameters a detector has, without building it: within a factor of two where it is known.

    Of a transformer layer of width d with an inner width f: 4 d^2 for each attention and 2 d f, and 30 d^2 for the
    neck, the heads and the queries together.
    """
    model: Any = config.model
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, SmallResNet):
        count = 500 * backbone.width**2
    else:
        sizes = _MILLIONS.get(getattr(backbone, "kind", ""), {})
        count = 10**6 * sizes.get(getattr(backbone, "depth", getattr(backbone, "size", None)), _MILLIONS_UNKNOWN)
    if config.model.kind != "detr":
        return count + 18 * 10**6
    width, inner = config.model.hidden_dim, config.model.ffn_dim
    encoder, decoder = config.model.encoder.num_layers, config.model.decoder.num_layers
    layers = encoder * (4 * width**2 + 2 * width * inner) + decoder * (8 * width**2 + 2 * width * inner)
    return count + layers + 30 * width**2


def size_of(folder: Path) -> Size:
    """Return what a trial's folder holds."""
    checkpoints = bytes_in(folder / "checkpoints")
    predictions = sum(path.stat().st_size for path in folder.glob("evaluations/*/predictions.parquet"))
    return Size(
        checkpoint=checkpoints, predictions=predictions, rest=max(0, bytes_in(folder) - checkpoints - predictions)
    )


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def free_bytes(folder: Path) -> int:
    """Return what this user may still write where a folder is or will be; a user's own quota is not seen here."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


def watched(
    runs: Path, *, on_low: Callable[[str], None], also: Callable[[], None], on_error: Callable[[Exception], None]
) -> AbstractContextManager[None]:
    """Look at the free space now and then within the block; call `on_low` once, with a line that says what is low.

    `also` is called as often: it may make room. `on_error` is told what could not be done, and it is tried again: a
    file system that is away for a while ends no study. All of them are called in a thread of its own.
    """
    told = False

    def look() -> None:
        nonlocal told
        try:
            also()
        finally:
            free = free_bytes(runs)
            if free < RESERVE_BYTES and not told:
                told = True
                on_low(
                    f"{runs}: {size(free)} are free, less than the {size(RESERVE_BYTES)} that are to stay free: "
                    "stopping. Make room, then give the same command again."
                )

    return repeating(look, every=WATCH_SECONDS, name="disk", on_error=on_error)


@contextmanager
def in_words(runs: Path, *, exit_code: int = StoreError.exit_code) -> Iterator[None]:
    """Say in one line what the file system refused within the block, instead of a traceback.

    Raises:
        StoreError: instead of the system's error, with that exit code.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in FULL
        if not full and not str(error.filename or "").startswith(str(runs)):
            raise
        remedy = "make room (docs/records.md tells of the quota)" if full else "mend that"
        told = StoreError(
            f"{error.filename or runs}: {(error.strerror or '').lower()}. What is on record is whole; {remedy}, then "
            "give the same command again"
        )
        told.exit_code = exit_code
        raise told from error


def patiently(write: Callable[[], None]) -> None:
    """Write something small and important on a disk that is full: others may give up room in a moment.

    Raises:
        OSError: it stayed full.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL or time.monotonic() > deadline:
                raise
            time.sleep(_PATIENCE_SECONDS / 10)
