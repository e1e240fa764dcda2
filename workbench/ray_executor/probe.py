"""What a node of a cluster is asked before any trial: can it run one? Sent as text, since it may lack this package.

Nothing of this project is imported here before the answer can say that it cannot be.
"""

import os
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import metadata
from typing import Any


def probe(questions: Mapping[str, Any]) -> dict[str, Any]:
    """Answer on the node that this runs on.

    Args:
        questions: `code`: folder of the driver's package, for the remedy; `libraries`: whose versions count;
            `token`: a file that the driver wrote into the runs folder; `answer`: where to write its text back; `data`:
            (pictures as a configuration, folder, fingerprint) each; `weights`: (file or "package", bytes) each.

    Returns:
        What was found, plain values; `problems`: one line each, with the remedy, of what no trial could do without.
    """
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in questions["libraries"]},
        "problems": [],
    }
    problems: list[str] = found["problems"]
    problems += _shared_folder(questions["token"], questions["answer"])
    try:
        from core import numerics
        from workbench import provenance, trial  # noqa: F401 - what a trial needs
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being imported is the answer
        problems.append(_not_importable(error, questions["code"]))
        return found
    found |= {
        "code_hash": provenance.code_hash(),
        "numerics": numerics.VERSION,
        "gpus": list(provenance.visible_gpus()),
    }
    try:
        import core.data.splits
        import core.evaluation.score
        import core.training  # noqa: F401 - torch, and all that it takes to train
    except Exception as error:  # noqa: BLE001 - as above
        problems.append(_not_importable(error, questions["code"]))
        return found
    problems += _pictures(questions["data"])
    problems += _weights(questions["weights"])
    return found


def clock() -> float:
    """Return this node's time, in seconds since the epoch."""
    return time.time()


def _shared_folder(token: str, answer: str) -> list[str]:
    """Read what the driver wrote and write it back, as trials write: a new file, then a link that only one can make."""
    remedy = "mount the runs folder at the same path on every node, on a shared POSIX file system, or name it by --runs"
    try:
        with open(token, encoding="ascii") as file:  # noqa: PTH123 - nothing but the standard library's simplest here
            text = file.read()
        with open(f"{answer}.draft", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(f"{answer}.draft", answer)
        os.unlink(f"{answer}.draft")  # noqa: PTH108
    except OSError as error:
        return [f"does not share the runs folder ({error}): {remedy}"]
    return []


def _not_importable(error: BaseException, code: str) -> str:
    last = traceback.format_exception_only(error)[-1].strip()
    return (
        f"cannot import the workbench ({last}; Python {sys.executable}): install the same package there, with "
        f"constraints.txt, or make {code} visible under the same path, or send it with "
        "ray job submit --working-dir (docs/cluster.md)"
    )


def _pictures(data: list[tuple[Any, str, str]]) -> list[str]:
    from pathlib import Path

    from core.data.fingerprint import DataProblem, fingerprint

    lines: list[str] = []
    for config, root, expected in data:
        remedy = f"put the same folder at {root} on every node, or on the shared file system"
        try:
            seen = fingerprint(config, root=Path(root))
        except (DataProblem, OSError) as error:
            lines.append(f"cannot read the pictures ({error}): {remedy}")
            continue
        if seen != expected:
            lines.append(f"holds other pictures in {root} ({seen}, the driver {expected}): {remedy}")
    return lines


def _weights(weights: list[tuple[str, int]]) -> list[str]:
    lines: list[str] = []
    for path, num_bytes in weights:
        size = os.path.getsize(path) if os.path.isfile(path) else None  # noqa: PTH113, PTH202
        if size != num_bytes:
            found = "no such file" if size is None else f"{size} bytes, the driver's has {num_bytes}"
            lines.append(f"lacks the pretrained weights {path} ({found}): copy them there, or set a shared path")
    return lines


def version(library: str) -> str | None:
    """Return the version of an installed library; None where there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
