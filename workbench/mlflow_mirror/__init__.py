"""Copies the records to MLflow while they grow, and back. The only importer of mlflow.

One thread of the driver tails the events files, so there is one writer, trials never wait for MLflow, and when MLflow
is away the copy is late, not lost. Everything sent carries the time of its event, by which MLflow drops what it
already has: sending again is safe, and `sync` replays exactly once.
"""

from workbench.mlflow_mirror.api import default_uri
from workbench.mlflow_mirror.mirror import Mirror, sync

__all__ = ["Mirror", "default_uri", "sync"]
