"""Trials as processes under Ray, on this machine or a cluster. The only importer of ray."""

from workbench.ray_executor.cluster import resources_of_cluster
from workbench.ray_executor.session import run_on_ray

__all__ = ["resources_of_cluster", "run_on_ray"]
