"""Which pictures a trial sees, and whether a folder can be used at all: answered without torch, before it starts."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from core.config import CocoFolder, Data
from core.paths import is_dir, is_file

SHAPES_VERSION = 2
"""Of what `core.data.shapes` draws: bump it when a picture or a box changes. Here, as this file loads without torch."""

SplitName = Literal["train", "val"]
LAYOUT = "annotations/instances_{train,val}.json with pictures in train/ and val/, or train2017 and val2017 for both"
_REMEDY = "export it again in COCO format or name another folder with --data"
MOST_FOLDERS = 100_000  # below one split; links can multiply them without end
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class DataProblem(ValueError):  # noqa: N818 - a flaw of the user's data, not of the program
    """The pictures or annotations cannot be used. The message names the path, what was found and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFiles:
    """Where one split of a COCO-format folder lies."""

    annotations: Path
    pictures: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderCheck:
    """What is wrong with a folder, one line each: `missing_pictures` stops a training only, `problems` a plan, too."""

    problems: list[str] = field(default_factory=list)
    missing_pictures: list[str] = field(default_factory=list)


def fingerprint(config: Data, *, root: Path | None) -> str:
    """Identify the pictures: annotation files by their bytes, pictures by name and size in bytes; not by their paths.

    A folder that has annotations only has a fingerprint, too: another one than with its pictures.

    Raises:
        DataProblem: when the folder or an annotation file is missing.
    """
    if not isinstance(config, CocoFolder):
        return f"shapes-{SHAPES_VERSION}"
    folder = data_root(config, root)
    digest = hashlib.sha256()
    for split in used_splits(config):
        files = SplitFiles(annotations=_annotations(folder, split), pictures=_picture_folder(folder, split))
        digest.update(split_fingerprint(files).encode())
    return f"coco-{digest.hexdigest()[:16]}"


def split_fingerprint(files: SplitFiles) -> str:
    """Identify one split, as `fingerprint` does."""
    stat = files.annotations.stat()
    digest = hashlib.sha256(_file_digest(files.annotations, stat.st_size, stat.st_mtime_ns).encode())
    for name, num_bytes in sorted(_pictures(files.pictures)) if files.pictures.is_dir() else ():
        digest.update(f"{name}\0{num_bytes}\n".encode())
    return digest.hexdigest()


def check_folder(config: Data, root: Path | None) -> list[str]:
    """Return what makes the folder unusable, one line each; an empty list when training can start."""
    check = inspect_folder(config, root)
    return [*check.problems, *check.missing_pictures]


def inspect_folder(config: Data, root: Path | None) -> FolderCheck:
    """Look through the folder's annotations, and for its pictures."""
    check = FolderCheck()
    if not isinstance(config, CocoFolder):
        return check
    try:
        folder = data_root(config, root)
    except DataProblem as problem:
        check.problems.append(str(problem))
        return check
    categories: list[dict[int, str]] = []
    for split in used_splits(config):
        try:
            annotations = _annotations(folder, split)
            raw = read_annotations(annotations)
            categories.append(category_names(raw))
        except DataProblem as problem:
            check.problems.append(str(problem))
            continue
        check.missing_pictures.extend(_missing_pictures(folder, split, annotations, raw))
    if len(categories) == 2:
        check.problems.extend(_disagreements(folder, *categories))
    return check


def _missing_pictures(folder: Path, split: SplitName, annotations: Path, raw: dict[str, Any]) -> Iterator[str]:
    """Say when a split has no folder of pictures, or none of the pictures that its annotations name."""
    try:
        pictures = split_files(folder, split).pictures
    except DataProblem as problem:
        yield str(problem)
        return
    names = [entry["file_name"] for entry in raw["images"] if isinstance(entry, dict) and "file_name" in entry]
    if not any(is_file(pictures / str(name)) for name in names):
        found = f"holds none of the {len(names)} pictures that {annotations} names"
        yield f"{pictures}: {found}; put them there or name another folder with --data"


def used_splits(config: CocoFolder) -> tuple[SplitName, ...]:
    """Return the splits of the folder that are read: tune is a part of train."""
    return ("train", "val") if config.split == "val" else ("train",)


def data_root(config: CocoFolder, root: Path | None) -> Path:
    """Return the folder of pictures; `root` goes before the configuration's own.

    Raises:
        DataProblem: when no folder is named, or it does not exist.
    """
    if root is None and not config.root:
        raise DataProblem(f"this study needs a folder of pictures in COCO format ({LAYOUT}): name it with --data DIR")
    folder = Path(config.root) if root is None else root
    if not is_dir(folder):
        found = "a file" if is_file(folder) else "nothing"
        raise DataProblem(f"{folder}: a folder of pictures was looked for, {found} is there; name it with --data DIR")
    return folder


def split_files(folder: Path, split: SplitName) -> SplitFiles:
    """Return where a split lies.

    Raises:
        DataProblem: when its annotation file or its folder of pictures is missing.
    """
    files = SplitFiles(annotations=_annotations(folder, split), pictures=_picture_folder(folder, split))
    if not files.pictures.is_dir():
        raise DataProblem(f"{files.pictures}: no such folder, nor {split}2017; --data needs a folder with {LAYOUT}")
    return files


def _annotations(folder: Path, split: SplitName) -> Path:
    found, other = (folder / "annotations" / f"instances_{name}.json" for name in (split, f"{split}2017"))
    for path in (found, other):
        if path.is_file():
            return path
    raise DataProblem(f"{found}: no such file, nor {other.name}; --data needs a folder with {LAYOUT}")


def _picture_folder(folder: Path, split: SplitName) -> Path:
    """Return the first of the two folders that is there; the first one where there is none."""
    found, other = folder / split, folder / f"{split}2017"
    return other if other.is_dir() and not found.is_dir() else found


def read_annotations(path: Path) -> dict[str, Any]:
    """Read an annotation file and check its outline: three lists, of which images and categories are not empty.

    Raises:
        DataProblem: when it cannot be read, is no JSON or lacks a list.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DataProblem(f"{path}: cannot be read ({error.strerror}); check the folder given by --data") from error
    except (ValueError, RecursionError) as error:  # of JSON, of its encoding, and of lists in lists without end
        raise DataProblem(f"{path}: is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(raw, dict):
        raise DataProblem(
            f"{path}: holds a {type(raw).__name__}, not a JSON object with images, annotations, categories; {_REMEDY}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list):
            raise DataProblem(f"{path}: has no list '{key}', found {sorted(map(str, raw))}; {_REMEDY}")
    if not raw["images"]:
        raise DataProblem(f"{path}: the list 'images' is empty; name another folder with --data")
    if not category_names(raw):
        raise DataProblem(
            f"{path}: the list 'categories' names no class; each entry needs an integer id and a name; {_REMEDY}"
        )
    if names := [name for name in map(_file_name, raw["images"]) if name is not None and leaves_folder(name)]:
        told = ", ".join(repr(name[:100]) for name in names[:3])
        raise DataProblem(
            f"{path}: {len(names)} file names lead out of the folder of pictures, such as {told}; allowed: names "
            f"inside it, without .. and not absolute; {_REMEDY}"
        )
    return raw


def _file_name(entry: Any) -> str | None:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def leaves_folder(name: str) -> bool:
    """Tell whether the name of a picture leads out of the folder that it is looked for in."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


def category_names(raw: dict[str, Any]) -> dict[int, str]:
    """Return the class names by category id; the first of a repeated id holds."""
    found: dict[int, str] = {}
    for entry in raw["categories"]:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str):
            found.setdefault(entry["id"], entry["name"])
    return found


def shared_categories(folder: Path, splits: list[dict[int, str]]) -> dict[int, str]:
    """Join the category names of the splits, in the order of the ids.

    Raises:
        DataProblem: when an id names two classes, so that labels of one split would be wrong in the other.
    """
    if len(splits) == 2 and (problems := _disagreements(folder, *splits)):
        raise DataProblem("; ".join(problems))
    return dict(sorted({key: name for names in splits for key, name in names.items()}.items()))


def _disagreements(folder: Path, train: dict[int, str], val: dict[int, str]) -> list[str]:
    return [
        f"{folder}: category {key} is '{train[key]}' in train and '{val[key]}' in val; export both with the same ones "
        "or name another folder with --data"
        for key in sorted(train.keys() & val.keys())
        if train[key] != val[key]
    ]


@lru_cache(maxsize=16)
def _file_digest(path: Path, num_bytes: int, mtime_ns: int) -> str:  # noqa: ARG001 - the arguments are the cache's key
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pictures(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and size of every picture below a folder; a stray note or thumbnail database changes no identity.

    Raises:
        DataProblem: when a folder cannot be read, or links make more folders than anybody has pictures for.
    """
    waiting = [""]
    for _ in range(MOST_FOLDERS):
        if not waiting:
            return
        prefix = waiting.pop()
        try:
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(f"{prefix}{entry.name}/")
                    elif Path(entry.name).suffix.lower() in PICTURE_SUFFIXES and entry.is_file():
                        yield f"{prefix}{entry.name}", entry.stat().st_size
        except OSError as error:  # also of links that lead round in circles
            raise DataProblem(f"{folder / prefix}: cannot be looked through ({error.strerror})") from error
    raise DataProblem(f"{folder}: holds more than {MOST_FOLDERS} folders: remove links that multiply them")
