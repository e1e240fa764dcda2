"""What is computed once for all trials of a machine: by one process, while others wait for it, whole or not at all.

Everything here may be deleted whenever nothing runs; it is then computed again.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from core.data.fingerprint import DataProblem


def written_once(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file or folder `path`, under another name that it is given, unless it is there.

    What appears at `path` is complete and on disk. What a process that was killed left half-written goes with the next
    call.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path) as alone:
        prefix = f".{path.name}.writing-"
        for left in path.parent.glob(f"{prefix}*") if alone else ():
            shutil.rmtree(left)
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
            draft = Path(folder) / path.name
            write(draft)
            for file in draft.iterdir() if draft.is_dir() else (draft,):
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if not path.exists():  # another process may have been as fast where there are no locks
                draft.rename(path)


def mapped(path: Path) -> np.ndarray:
    """Return the array in a .npy file of a folder that was written once: read-only, its memory shared by processes.

    Raises:
        DataProblem: when the file is no such array, or a part of one.
    """
    try:
        return np.load(path, mmap_mode="r").view(np.ndarray)  # each slice of numpy's own class for it costs a µs more
    except (OSError, ValueError) as error:
        remedy = f"delete the folder {path.parent} and run again"
        raise DataProblem(f"{path}: the pictures kept there cannot be read ({error}); {remedy}") from error


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Keep other processes out until the block ends; yield False where the file system knows no locks."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False  # each process computes for itself, which costs time only
            return
        yield True
