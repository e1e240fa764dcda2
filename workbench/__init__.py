"""Studies: from a claim in a YAML file to a verdict."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.notebook import LoadedStudy


def load(study: "str | Path", **options: Any) -> "LoadedStudy":
    """Return a study's records for a notebook; the options are those of `workbench.notebook.load`."""
    from workbench import notebook  # importing the package must cost nothing

    return notebook.load(study, **options)
