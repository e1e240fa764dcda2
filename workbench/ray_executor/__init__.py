"""Trials as processes under Ray, on this machine or a cluster. The only importer of ray."""

from workbench.ray_executor.tuner import run_on_ray

__all__ = ["run_on_ray"]
