"""The code that computed something, beyond its revision: what was changed in the working tree, and what was installed.

Both are texts that many trials share, so each is kept once under a hash of its content, in `code/` of the runs folder.
Only tracked source files of `core` and `workbench` are compared, and the names of untracked ones listed: neither data
nor settings, where secrets might lie.
"""

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import core
from workbench import durable
from workbench.redaction import redact

MOST_BYTES = 1_000_000  # of a diff; what is beyond is cut off, and its length told
SOURCES = tuple(f":(glob){package}/**/*{kind}" for package in ("core", "workbench") for kind in (".py", ".cpp", ".h"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeState:
    """The two texts: `diff` to the revision, None without git or changes; `packages`, installed versions by line."""

    diff: str | None
    packages: str

    def files(self) -> dict[str, str]:
        """Return the texts by the names that they are kept under."""
        found = {_named(self.packages, "txt"): self.packages}
        return found if self.diff is None else {**found, _named(self.diff, "diff"): self.diff}

    def to_json(self) -> dict[str, str | None]:
        """Return the names under which they are kept."""
        return {
            "diff": None if self.diff is None else _named(self.diff, "diff"),
            "packages": _named(self.packages, "txt"),
        }


@cache
def current() -> CodeState:
    """Return the state of the code that this process has loaded; call it early, since the files may change."""
    return CodeState(diff=_diff(), packages=_packages())


def keep(state: CodeState, folder: Path) -> None:
    """Write the texts into `folder`, those that are not there yet."""
    for name, text in state.files().items():
        if not (folder / name).exists():
            durable.write_text(folder / name, text)


def git(*arguments: str, most_bytes: int | None = None) -> str | None:
    """Return what a git command says of the working tree that `core` lies in; None without git or such a tree."""
    folder = _tree()
    return None if folder is None else said_by("git", "-C", folder, *arguments, most_bytes=most_bytes)


@cache
def _tree() -> str | None:
    """Return the top of the working tree that `core` is tracked in."""
    package = Path(core.__path__[0])
    if shutil.which("git") is None:
        return None
    tracked = said_by("git", "-C", str(package), "ls-files", "--error-unmatch", "config.py")
    return None if tracked is None else str(package.parent)  # an installed copy may just lie in some working tree


def _diff() -> str | None:
    changes = git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", *SOURCES, most_bytes=MOST_BYTES)
    untracked = git("ls-files", "--others", "--exclude-standard", "--", *SOURCES)
    listed = [f"# untracked: {name} {_hash_of(name)}" for name in (untracked or "").splitlines()]
    text = "\n".join([*listed, *([changes] if changes else [])])
    return redact(text) + "\n" if text else None


def _hash_of(name: str) -> str:
    try:
        return hashlib.sha256((Path(_tree() or "") / name).read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def _packages() -> str:
    """Return the installed distributions as the lines of a constraints file."""
    found = {f"{dist.metadata['Name']}=={dist.version}" for dist in metadata.distributions() if dist.metadata["Name"]}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _named(text: str, kind: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.{kind}"


def said_by(*command: str, most_bytes: int | None = None) -> str | None:
    """Return what a short command prints, or None when it fails; beyond `most_bytes` only how much there was."""
    try:
        unlocked = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # another git at work is not disturbed
        done = subprocess.run(command, capture_output=True, timeout=20, check=True, env=unlocked)
    except (OSError, subprocess.SubprocessError):
        return None
    said = done.stdout
    if most_bytes is not None and len(said) > most_bytes:
        said = said[:most_bytes] + f"\n# cut off: {len(said)} bytes in all\n".encode()
    return said.decode("utf-8", "replace").strip("\n" if most_bytes else None)
