"""Studies: from a claim in a YAML file to a verdict."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.notebook import LoadedStudy


def load(study: "str | Path", *, runs: "str | Path" = "runs", **selection: Any) -> "LoadedStudy":
    """Return a study's records for a notebook; see `workbench.notebook.load`."""
    from workbench import notebook  # importing the package must cost nothing

    return notebook.load(study, runs=runs, **selection)
