"""What is computed once for all trials of a machine: by one process, while others wait for it, whole or not at all.

Everything here may be deleted whenever nothing runs; it is then computed again. Where the file system has no locks, or
the holder of one never lets go, processes compute for themselves, which costs time only: the files of the first stay.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from core.data.fingerprint import DataProblem

LONGEST_WAIT_SECONDS = 1800.0
"""For another process that computes the same: longer than any data set here takes."""
_POLL_SECONDS = 0.1


def written_once(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file or folder `path`, under another name that it is given, unless it is there.

    What appears at `path` is complete and on disk. What a process that was killed left half-written goes with the next
    call that holds the lock.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path) as alone:
        prefix = f".{path.name}.{'writing' if alone else 'unlocked'}-"  # the second ones may be somebody's, still
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
            try:
                draft.rename(path)
            except OSError:  # a folder is there: another process has been as fast, and its is as good
                if not path.exists():
                    raise


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
    """Keep other processes out until the block ends; yield False where that is not to be had."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        yield _locked(file.fileno(), path)


def _locked(handle: int, path: Path) -> bool:
    """Take the lock, and wait for whoever holds it until `path` is there; a call that blocks might do so for ever."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if path.exists() or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: this file system has no locks
            return False
        else:
            return True
