"""The files that make up a record elsewhere: their names, and a manifest that says what each holds.

`mlflow_mirror` sends them and `fetch` takes nothing else, so what a server can put into a runs folder is told here.
Checkpoints are not among them: a fetched trial can be judged, and not be resumed.
"""

import hashlib
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from workbench.durable import FORMAT

Kind = Literal["trial", "study"]

MANIFEST = "manifest.json"
MOST_FILES = 2000  # of one trial: attempts and evaluations
LARGEST_MANIFEST = 1 << 20
_LARGEST = {".json": 256 << 20, ".yaml": 1 << 20, ".jsonl": 1 << 30, ".parquet": 8 << 30}  # bytes

_NAMES: dict[Kind, re.Pattern[str]] = {
    "study": re.compile(r"(plan|registered|looks|verdicts|last_run|search|estimate|without_gate)\.json|study\.yaml"),
    "trial": re.compile(
        r"(spec|result|error|stopped)\.json|(result|error)\.before_attempt_\d{1,6}\.json|events\.jsonl"
        r"|(attempts|provenance)/\d{4,6}\.json|evaluations/[0-9a-f]{12}/[a-z0-9_]{1,40}\.(json|parquet)"
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of a record: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read a file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(bytes=file.tell(), sha256=digest)


def allowed(kind: Kind, name: str) -> bool:
    """Tell whether a record of this kind has files of this name; `/` parts folders."""
    return _NAMES[kind].fullmatch(name) is not None


def largest(name: str) -> int:
    """Return how many bytes a file of this name may have."""
    return _LARGEST[Path(name).suffix]


def present(kind: Kind, folder: Path) -> list[str]:
    """Return the names of a record's files that are there, in order."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if allowed(kind, name))


def manifest(kind: Kind, folder: Path) -> dict[str, Any]:
    """Return what a record consists of now, as JSON values."""
    files: dict[str, Any] = {}
    for name in present(kind, folder):
        with suppress(FileNotFoundError):  # renamed by an attempt that has just begun
            files[name] = asdict(Entry.of(folder / name))
    return {"format": FORMAT, "kind": kind, "files": files}


def read_manifest(kind: Kind, plain: Any) -> dict[str, Entry]:
    """Return the files that a manifest names, which anybody may have written.

    Raises:
        ValueError: with a sentence that says what is wrong with it.
    """
    if not isinstance(plain, dict) or not isinstance(plain.get("files"), dict) or plain.get("kind") != kind:
        raise ValueError(f"its {MANIFEST} is none of a {kind}")
    if not isinstance(plain.get("format"), int) or plain["format"] > FORMAT:
        raise ValueError(f"its {MANIFEST} was written by a later version; this one reads {FORMAT}")
    if len(plain["files"]) > MOST_FILES:
        raise ValueError(f"its {MANIFEST} names {len(plain['files'])} files, of at most {MOST_FILES}")
    return {name: _entry(kind, name, entry) for name, entry in plain["files"].items()}


def _entry(kind: Kind, name: str, plain: Any) -> Entry:
    if not allowed(kind, name):
        raise ValueError(f"its {MANIFEST} names {name[:80]!r}, which is no file of a {kind}")
    size, digest = (plain.get("bytes"), plain.get("sha256")) if isinstance(plain, dict) else (None, None)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= largest(name):
        raise ValueError(f"{name}: {size!r} bytes, of at most {largest(name)}")
    if not isinstance(digest, str) or re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise ValueError(f"{name}: no SHA-256 in its {MANIFEST}")
    return Entry(bytes=size, sha256=digest)
