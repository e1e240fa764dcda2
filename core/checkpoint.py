"""Checkpoints of our own: atomic, checksummed, the previous one kept.

A file is a safe-to-load torch archive (tensors and plain values, no code) with a sidecar `<name>.sha256`. It appears by
write, fsync, rename, sidecar last: a checkpoint without a matching sidecar does not exist.
"""

import argparse
import hashlib
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from core.checkpoint_files import (
    PATTERN,
    PassedOver,
    is_intact,
    newest_first,
    path_of,
    publish,
    remove,
    set_aside,
)
from core.paths import is_dir, is_file

FORMAT = 1
KEPT = 2

# What torch's reader raises on files that are cut off or of another kind.
_NOT_TORCH = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    AssertionError,
)


class CheckpointProblem(ValueError):  # noqa: N818 - a flaw of the user's file, not of the program
    """A file that cannot be read or does not fit. The message names the file, what was found and what is allowed."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`, then drop all but the newest two.

    A write that fails, as on a full disk, leaves the earlier ones as they were and no part of a new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    for left in folder.glob("step_*.tmp"):  # by a process that was killed
        left.unlink()
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error  # torch hides what the file system said
        raise
    for old in sorted(folder.glob(PATTERN))[:-KEPT]:
        remove(old)
    return path


def load_newest(
    folder: Path, *, on_passed_over: Callable[[PassedOver], None] | None = None
) -> tuple[dict[str, Any], Path] | None:
    """Load the newest checkpoint whose checksum holds, or None.

    Newer ones that are damaged are passed over. With `on_passed_over` they are also set aside under another name and
    told, newest first: of several processes that load, one may do that.
    """
    for path in newest_first(folder):
        if is_intact(path):
            return load_checkpoint(path), path
        if on_passed_over is not None:
            on_passed_over(set_aside(path))
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load one checkpoint without running any code in it.

    Raises:
        CheckpointProblem: if it cannot be read safely or was written by a later version.
    """
    state = read_safely(path)
    check_format(state, path)
    return state


def check_format(state: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that this version cannot read.

    Raises:
        CheckpointProblem: a later version of the workbench wrote it, or none did.
    """
    found = state.get("format")
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise CheckpointProblem(
            f"{path}: checkpoint format {found}, this version reads {FORMAT}: "
            "if a later version of the workbench wrote it, upgrade this one"
        )


def read_safely(path: Path) -> dict[str, Any]:
    """Read a torch file of tensors and plain values, anybody's, without running any code in it.

    `argparse.Namespace` is allowed as well: the official training scripts store their options as one.

    Raises:
        CheckpointProblem: if there is no such file, it is none of torch's, or it holds other objects.
    """
    if not is_file(path):
        found = "a folder" if is_dir(path) else "nothing"
        raise CheckpointProblem(f"{path}: a checkpoint file was looked for, {found} is there")
    _refuse_packed(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of another protocol, which are read or refused all the same
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointProblem(f"{path}: {_why_refused(error)}") from error
    except _NOT_TORCH as error:
        raise CheckpointProblem(f"{path}: cannot be read as a torch checkpoint ({_first_line(error)})") from error
    if not isinstance(state, Mapping):
        raise CheckpointProblem(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    if any(map(_is_larger_than_stored, _tensors(state))):
        raise CheckpointProblem(f"{path}: holds a tensor that is larger than what is stored of it: save it in full")
    return dict(state)


def _refuse_packed(path: Path) -> None:
    """Refuse an archive whose parts are larger than itself: torch packs none, and a megabyte can hold a gigabyte."""
    try:
        with ZipFile(path) as archive:
            there = sum(part.file_size for part in archive.infolist())
    except (BadZipFile, OSError, ValueError, NotImplementedError):  # of another form, or cut off: torch tells which
        return
    if there > path.stat().st_size:
        raise CheckpointProblem(
            f"{path}: {path.stat().st_size} bytes that would become {there}: a packed archive, as torch writes none; "
            "where you trust it, load it yourself and save its tensors as a new file"
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in mappings and lists, which may hold themselves."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value


def _is_larger_than_stored(tensor: Tensor) -> bool:
    """Tell whether a tensor repeats what it stores: by strides of 0 a few bytes can stand for terabytes."""
    if tensor.layout is not torch.strided:  # its size says nothing of what is stored
        return True
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _why_refused(error: pickle.UnpicklingError) -> str:
    name = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
    if name is None:
        return "cannot be read as a torch checkpoint: it is none, or no whole one"  # torch would advise to trust it
    return (
        f"holds a {name[1]}, which reading would run as code; tensors, plain values and argparse.Namespace are read. "
        "Where you trust the file, load it yourself and save {'model': its state dict} as a new one"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def weights_hash(state: dict[str, Tensor]) -> str:
    """Return a hash of every tensor's name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
