"""What the tests of estimates, limits and the gate share: runs without MLflow, made-up costs, GPUs and bands."""

import io
from dataclasses import replace

from workbench import bands, budget, driving, durable, gate
from workbench.costs import Machine, probe_file
from workbench.options import Options
from workbench.published import Published
from workbench.runner import run_study
from workbench.search import own_variants

GPUS = 3600.0  # of a trial, so that a second is a GPU-hour
ON_GPUS = Machine(device="cpu", at_once=2, gpus=GPUS)
PICTURES = 3  # that the folder of a stub gate has to score
PUBLISHED_HERE = {("deformable", 50): Published(ap=0.445, source="a table", num_pictures=PICTURES)}


def run(plan, store, trainer, **options):
    """Run a plan inline; return exit code, report and what was said."""
    out, err = io.StringIO(), io.StringIO()
    options = {"executor": "inline", "tracking_uri": "http://127.0.0.1:9", "trainer": trainer, **options}
    return run_study(plan, store, Options(**options), out=out, err=err), out.getvalue(), err.getvalue()


def hold_gpus(monkeypatch):
    """Let every attempt hold `GPUS`, and every run plan with them and watch its limits closely."""
    monkeypatch.setattr(budget, "gpus_of", lambda _: GPUS)
    monkeypatch.setattr(driving, "machine_of", lambda *_, **__: replace(ON_GPUS, at_once=1))
    monkeypatch.setattr(budget, "WATCH_SECONDS", 0.05)


def costing(store, plan, seconds, *, device="cpu"):
    """Let a kept probe say what a trial costs."""
    cost = dict.fromkeys(("seconds", "low", "high"), seconds) | {
        "memory_bytes": 1,
        "disk_bytes": 1,
        "source": "a probe",
    }
    names = [variant.name for variant in own_variants(plan)]
    durable.write_json(probe_file(store, plan), {"device": device, "costs": dict.fromkeys(names, cost)})


def passed(asked, store, **options):
    """Run a gate with the stub's published scores."""
    return gate.gate(asked, store, tell=lambda _: None, **{"published": PUBLISHED_HERE, **options})


def recorded(asked, store, *, epoch=True):
    """Record the band of what is asked for."""
    spec = gate.training(asked, "deformable")
    return bands.record(store, spec, name="stub", epoch=epoch, device="cpu", tell=lambda _: None)


def with_band(store, spec, **values):
    """Keep a band that nothing was measured for."""
    band = {"name": "stub", "windows": [[0, 99]], "first_epoch": None, "source": "made up", **values}
    durable.write_json(bands.own_file(store), {"bands": {bands.key_of(spec): band}})
