"""Putting a fetched record in place: whole, and without touching what is there and differs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from workbench import durable, record_files
from workbench.record_files import Entry, Kind

MARK = "fetched.json"
"""In the folder of a fetched record: from where, and what was fetched. As long as nothing else has been written there
since, a later `fetch` brings it up to date."""

Outcome = Literal["new", "updated", "same", "kept", "absent", "refused"]
"""`kept`: what is there differs and stays; `absent`: there is no copy; `refused`: the copy cannot be used."""

_ENDS = ("result.json", "error.json")  # these say that a trial is over, and come last


def place(
    kind: Kind, staged: Path, here: Path, entries: dict[str, Entry], *, source: Mapping[str, Any]
) -> tuple[Outcome, list[str]]:
    """Put the record in `staged`, whose files are `entries`, into the folder `here`.

    A record that an earlier fetch put there and nobody has changed since is brought up to date, never back; one that
    only lacks evaluations gets them; any other that differs is kept.

    Returns:
        What became of it, and the names of the files that differ where it is kept.
    """
    mark = {**source, "fetched_at": durable.now(), "files": {name: entry.sha256 for name, entry in entries.items()}}
    if not here.exists():
        return _put(staged, here, mark), []
    other = differing(entries, here)
    extra = [name for name in record_files.present(kind, here) if name not in entries and not _scores(name)]
    if not other and not extra:
        return "same", []
    if kind == "trial" and _behind(entries, here):
        return "same", []
    only_more = not extra and all(_scores(name) and not (here / name).exists() for name in other)
    if not only_more and not _untouched(kind, here, entries):
        return "kept", sorted({*other, *extra})
    for name in sorted(other, key=_ENDS.__contains__):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(here / name)
        durable.sync_folder((here / name).parent)
    for name in extra:
        (here / name).unlink()
    durable.write_json(here / MARK, mark)
    return "updated", []


def _put(staged: Path, here: Path, mark: dict[str, Any]) -> Outcome:
    if not staged.exists():  # a manifest without files
        return "absent"
    durable.write_json(staged / MARK, mark)
    for folder in (staged, *(path for path in staged.rglob("*") if path.is_dir())):
        durable.sync_folder(folder)
    here.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(here)
    durable.sync_folder(here.parent)
    return "new"


def _scores(name: str) -> bool:
    return name.startswith("evaluations/")


def differing(entries: dict[str, Entry], folder: Path) -> list[str]:
    """Return the names of files that `folder` has not, or has otherwise."""
    return [name for name, entry in entries.items() if not _equal(folder / name, entry)]


def _behind(entries: dict[str, Entry], here: Path) -> bool:
    """Tell whether a trial has come further here than in a copy, which another study's driver made earlier."""

    def reach(names: Collection[str], events: int) -> tuple[bool, int, int]:
        return "result.json" in names, sum(name.startswith("attempts/") for name in names), events

    events, copied = here / "events.jsonl", entries.get("events.jsonl")
    return reach(entries, copied.bytes if copied else 0) < reach(
        record_files.present("trial", here), events.stat().st_size if events.exists() else 0
    )


def _equal(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and Entry.of(path) == entry


def _untouched(kind: Kind, here: Path, entries: dict[str, Entry]) -> bool:
    """Tell whether all of a record is as an earlier fetch, or this one, has put it there."""
    known: Any = (durable.read_json(here / MARK) or {}).get("files")
    if not isinstance(known, dict):
        return False
    return all(
        Entry.of(here / name).sha256 in (known.get(name), entries[name].sha256 if name in entries else None)
        for name in record_files.present(kind, here)
    )
