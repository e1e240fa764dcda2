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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """Write `state` as the checkpoint of `step`, then drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    digest = _sha256(temporary)
    temporary.replace(path)
    _write_durably(sidecar_of(path), digest)
    for old in sorted(folder.glob("step_*.pt"))[:-KEPT]:
        sidecar_of(old).unlink(missing_ok=True)
        old.unlink()
    return path


def load_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Load the newest checkpoint whose checksum holds, or None; damaged ones are passed over."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        if is_intact(path):
            return load_checkpoint(path), path
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load one checkpoint without running any code in it.

    Raises:
        CheckpointProblem: if it cannot be read safely or was written by a later version.
    """
    state = read_safely(path)
    if state.get("format") != FORMAT:
        raise CheckpointProblem(f"{path}: checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def read_safely(path: Path) -> dict[str, Any]:
    """Read a torch file of tensors and plain values, anybody's, without running any code in it.

    `argparse.Namespace` is allowed as well: the official training scripts store their options as one.

    Raises:
        CheckpointProblem: if there is no such file, it is none of torch's, or it holds other objects.
    """
    if not is_file(path):
        found = "a folder" if is_dir(path) else "nothing"
        raise CheckpointProblem(f"{path}: a checkpoint file was looked for, {found} is there")
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
    return dict(state)


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


def is_intact(path: Path) -> bool:
    """Return whether the file's checksum is the one beside it."""
    sidecar = sidecar_of(path)
    return path.is_file() and sidecar.is_file() and sidecar.read_text(encoding="ascii").strip() == _sha256(path)


def weights_hash(state: dict[str, Tensor]) -> str:
    """Return a hash of every tensor's name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sidecar_of(path: Path) -> Path:
    """Return where the checksum of a checkpoint lies."""
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
