"""Checkpoints as files: their names, checksums, and what becomes of damaged ones. A leaf: loads without torch.

`step_<number>.pt` is a checkpoint if the checksum in `step_<number>.pt.sha256` beside it is its own. A damaged one
is set aside under another name, so that nobody meets it twice and somebody may still look at it.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PATTERN = "step_*.pt"
_SIDECAR = ".sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedOver:
    """A checkpoint that was there and cannot be used: its `name`, and why."""

    name: str
    reason: Literal["damaged", "missing"]


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step_{step:09d}.pt"


def sidecar_of(path: Path) -> Path:
    """Return where the checksum of a checkpoint lies."""
    return path.with_name(path.name + _SIDECAR)


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, those included whose file is gone and whose checksum is still there."""
    sidecars = {path.with_name(path.name.removesuffix(_SIDECAR)) for path in folder.glob(PATTERN + _SIDECAR)}
    return sorted({*folder.glob(PATTERN), *sidecars}, reverse=True)


def is_intact(path: Path) -> bool:
    """Return whether the file's checksum is the one beside it."""
    try:
        return sidecar_of(path).read_bytes().strip() == sha256(path).encode()
    except (FileNotFoundError, IsADirectoryError):  # also where another process sets it aside just now
        return False


def set_aside(path: Path) -> PassedOver:
    """Give what is left of a damaged checkpoint another name: `<name>.damaged`, or `.damaged-2` and so on."""
    found = PassedOver(name=path.name, reason="damaged" if path.exists() else "missing")
    for part, ending in ((path, ""), (sidecar_of(path), _SIDECAR)):
        if part.exists():
            part.rename(_free_name(path, ending))
    return found


def remove(path: Path) -> None:
    """Remove a checkpoint; its checksum goes first, so that a kill between the two leaves none without its file."""
    sidecar_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def keep_only(path: Path) -> None:
    """Remove all other checkpoints of a folder, and parts that a kill left; damaged ones that were set aside stay."""
    for other in newest_first(path.parent):
        if other != path:
            remove(other)
    for left in path.parent.glob("step_*.tmp"):
        left.unlink()


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(draft: Path, path: Path) -> None:
    """Give a checkpoint that is written and on disk its checksum and its name, durably, the checksum last.

    Both files are there before the first is renamed, so a disk without room for the second leaves neither.
    """
    sidecar, digest = sidecar_of(path), sha256(draft)
    sidecar_draft = sidecar.with_name(sidecar.name + ".tmp")
    try:
        with sidecar_draft.open("w", encoding="ascii") as file:
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sidecar_draft.replace(sidecar)
    except BaseException:
        sidecar_draft.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_name(path: Path, ending: str) -> Path:
    number = 1
    while (free := path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}{ending}")).exists():
        number += 1
    return free
