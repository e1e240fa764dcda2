"""A folder in COCO format from an object store: copied once to a disk of this machine, then read as any folder.

Trials read pictures at random, thousands a second on a node, which object stores are not made for. So `--data` with a
scheme (s3, gs, file, ...) is a copy, made before the plan and named by what it was copied from; a trial's identity is
the fingerprint of the pictures, as always, so a copy and its source are the same data.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from workbench import durable
from workbench.errors import DataError

VARIABLE = "WORKBENCH_DATA_CACHE"
_LISTING = "copied.json"  # in the copy's folder: what is copied there, and whether all of it is


@dataclass(frozen=True, kw_only=True, slots=True)
class _Remote:
    """A file of the source: its name below the folder, its bytes, when it changed (None: not known)."""

    name: str
    num_bytes: int
    changed: str | None


def cache_folder() -> Path:
    """Return the folder of copies: WORKBENCH_DATA_CACHE, else in the user's cache. It should be a local disk."""
    named = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or f"{base}/detr-ablation-workbench/data").expanduser()


def folder_or_uri(text: str) -> Path | str:
    """Read `--data`: a path, unless it has a scheme, as s3://bucket/coco has."""
    return text if "://" in text else Path(text)


def local_folder(data: Path | str | None, *, tell: Callable[[str], None]) -> Path | None:
    """Return the folder on this machine that `--data` means; pictures of an object store are copied first."""
    return local_copy(data, tell=tell) if isinstance(data, str) else data


def local_copy(uri: str, *, cache: Path | None = None, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder on this machine that holds the same files as `uri`; only what is missing is copied.

    Args:
        uri: of a folder in COCO format, in any file system that Apache Arrow knows.
        cache: where copies are kept; None: `cache_folder()`.
        tell: takes a line before much is copied.

    Raises:
        DataError: the URI names no folder, cannot be read, or the disk is too small: what to do.
    """
    files, system, root = _listing(uri)
    place = (cache or cache_folder()) / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]
    listed = [[item.name, item.num_bytes, item.changed] for item in files]
    known = durable.read_json(place / _LISTING) or {"files": [], "complete": False}
    if known["complete"] and known["files"] == listed:
        return place / "data"
    _forget(place / "data", known["files"], listed)
    wanted = [item for item in files if not _is_there(place / "data" / item.name, item)]
    _refuse_full_disk(place, uri, sum(item.num_bytes for item in wanted))
    tell(f"Copying {len(wanted)} of {len(files)} files from {uri} to {place / 'data'}")
    durable.write_json(place / _LISTING, {"uri": uri, "complete": False, "files": listed}, indent=None)
    for item in wanted:
        _copy(system, f"{root}/{item.name}", place / "data" / item.name, uri)
    durable.write_json(place / _LISTING, {"uri": uri, "complete": True, "files": listed}, indent=None)
    return place / "data"


def _forget(copy: Path, known: list[list[Any]], listed: list[list[Any]]) -> None:
    """Remove what is no longer at the source, or no longer the same there: what stays has been copied as listed."""
    same = {tuple(item) for item in known} & {tuple(item) for item in listed}
    names = {name for name, *_ in same}
    for path in copy.rglob("*"):
        if path.is_file() and path.relative_to(copy).as_posix() not in names:
            path.unlink()


def _listing(uri: str) -> tuple[list[_Remote], Any, str]:
    """Return the files below a URI by name, the file system, and the folder's path in it."""
    from pyarrow import fs  # half a second, and only copies need it

    try:
        system, root = fs.FileSystem.from_uri(uri)
        entries = system.get_file_info(fs.FileSelector(root, recursive=True))
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"--data {uri}: cannot be read ({error}); check the address and the credentials in the environment, or "
            "copy the folder to a disk and name that"
        ) from error
    found: list[_Remote] = []
    for entry in entries:
        name = PurePosixPath(entry.path).relative_to(PurePosixPath(root)).as_posix()
        if entry.type == fs.FileType.File:
            if ".." in PurePosixPath(name).parts:
                raise DataError(f"--data {uri}: holds {name}, which would be written outside the copy; rename it")
            changed = entry.mtime.isoformat() if entry.mtime is not None else None
            found.append(_Remote(name=name, num_bytes=entry.size, changed=changed))
    if not found:
        raise DataError(f"--data {uri}: holds no file; name a folder in COCO format")
    return sorted(found, key=lambda item: item.name), system, root


def _is_there(path: Path, item: _Remote) -> bool:
    return path.is_file() and path.stat().st_size == item.num_bytes


def _refuse_full_disk(place: Path, uri: str, num_bytes: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise DataError(
            f"--data {uri}: {num_bytes / 1e9:.1f} GB are to be copied to {place}, where {free / 1e9:.1f} GB are free; "
            f"name a larger disk by {VARIABLE}"
        )


def _copy(system: Any, source: str, target: Path, uri: str) -> None:
    def write(draft: Path) -> None:
        with system.open_input_stream(source) as stream, draft.open("wb") as file:
            shutil.copyfileobj(stream, file, 2**20)

    try:
        durable.write_with(target, write)
    except OSError as error:
        raise DataError(f"--data {uri}: copying {source} failed ({error}); the same command goes on") from error
