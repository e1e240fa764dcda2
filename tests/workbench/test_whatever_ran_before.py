"""A trial's numbers do not depend on what ran before it: forks of one template, and trials inline in one process."""

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from core.events import EpochFinished, to_json
from workbench import template
from workbench.plan import make_plan
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.template import Template
from workbench.trial import execute

pytestmark = pytest.mark.ci

STUDY = """\
version: 1
study: {name}
question: Does what ran before matter?
{recipe}
baseline: base
variants:
  base: {{}}
  other: {{set: {{loss.weight_giou: 3.0}}}}
scope: seeds
"""
TINY = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4")
HEAD = ('model.box_head={kind: custom, target: "heads:Mine"}',)
CODE = """\
import torch
from core.model.refinement import BoxHead

class Mine(BoxHead):
    def apply_to(self, delta, reference):
        {body}
        return super().apply_to(delta / {divisor}, reference)
"""
MESS = """\
import os, random, signal, sys, warnings
        import cv2, numpy
        import core.model.refinement, core.loss.matcher, core.seeding
        torch.manual_seed(1); numpy.random.seed(1); random.seed(1)
        torch.set_num_threads(2); torch.set_default_dtype(torch.float64); torch.set_flush_denormal(True)
        torch.use_deterministic_algorithms(True); torch.backends.mkldnn.enabled = False
        torch.set_float32_matmul_precision("medium"); torch.autograd.set_detect_anomaly(True)
        cv2.setNumThreads(3); os.environ["OMP_NUM_THREADS"] = "7"; os.environ["WORKBENCH_KERNEL"] = "none"
        os.chdir("/"); sys.path.clear(); warnings.simplefilter("error"); signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.modules["heads"] = sys; core.seeding.key = lambda *names: 1
        core.model.refinement.BoxHead.apply_to = lambda self, delta, reference: delta.sigmoid()
        raise SystemExit("left a mess")"""
PROBES = {  # name: recipe, what it sets, the body of its code, the divisor in it
    "plain": ("", (), None, 1),
    "dropout in bf16": ("", ("model.dropout=0.1", "training.precision=bf16"), None, 1),
    "plain DETR": ("recipe: detr", (), None, 1),
    "DINO with denoising": ("recipe: dino", (), None, 1),
    "Faster R-CNN": ("recipe: faster_rcnn", (), None, 1),
    "two threads": ("", ("training.threads=2",), None, 1),
    "readers": ("", ("training.data_workers=1",), None, 1),
    "code": ("", HEAD, "pass", 2),
    "other code of the same name": ("", HEAD, "pass", 3),
}
TROUBLE = {
    "diverges": ("", HEAD, "delta = delta * float('nan')", 1),
    "raises": ("", HEAD, "raise RuntimeError('injected')", 1),
    "runs out of memory": ("", HEAD, "raise MemoryError", 1),
    "leaves a mess": ("", HEAD, MESS, 1),
}


def spec_of(folder, recipe, changes, body, divisor):
    """Return the trial of a variant, at the smallest scale."""
    folder.mkdir()
    if body is not None:
        (folder / "heads.py").write_text(CODE.format(body=body, divisor=divisor))
    path = folder / "study.yaml"
    path.write_text(STUDY.format(name="before", recipe=recipe))
    plan = make_plan(load_study(path, Selection(profile="smoke", seeds=1, sets=(*TINY, *changes))))
    (trial,) = (trial for trial in plan.trials if trial.variant == "base")
    return plan.specs[trial.trial_id]


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Return the trials by name."""
    folder = tmp_path_factory.mktemp("studies")
    named = (PROBES | TROUBLE).items()
    return {name: spec_of(folder / str(number), *what) for number, (name, what) in enumerate(named)}


@pytest.fixture(scope="module")
def alone(specs, tmp_path_factory):
    """Return what each probe computes in a Python of its own."""
    runs = tmp_path_factory.mktemp("alone")
    for name in PROBES:
        in_one_process([work(specs[name], runs)])
    return {name: numbers(runs, specs[name]) for name in PROBES}


def work(spec, runs):
    """Return the call that runs a trial."""
    return partial(execute, spec, Path(runs), should_stop=partial(bool, 0), allow_code=True)


def in_one_process(works):
    """Make calls one after another in a new Python."""
    script = "import pickle, sys\nfor work in pickle.load(sys.stdin.buffer): work()"
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(works), check=True)


def numbers(runs, spec):
    """Return all that a trial computed, bit for bit: weights, losses, gradient norms and scores, without times."""
    store = Store(runs)
    result = store.result(spec.trial_id)
    assert result is not None, store.record(spec.trial_id).error
    told = [to_json(item.event) for item in store.events(spec.trial_id)]
    timed = ("seconds", "pictures_per_s", "data_share", "peak_memory_bytes", "process_id", "path")
    kept = [{key: value for key, value in event.items() if key not in timed} for event in told]
    scores = {name: metrics.to_json() for name, metrics in store.record(spec.trial_id).metrics.items()}
    assert {type(item.event) for item in store.events(spec.trial_id)} >= {EpochFinished}
    return result["weights_hash"], json.dumps([kept, scores], sort_keys=True)


@pytest.mark.skipif(not template.AVAILABLE, reason="needs Linux, where forking after imports is safe")
def test_forks_of_one_template_compute_what_a_python_of_its_own_does(specs, alone, tmp_path):
    """Each probe after all others, forth and back, and after trials that diverge, fail, lack memory or leave a mess."""
    found = Template(log=tmp_path / "log")
    for number, name in enumerate(PROBES):
        for trouble in TROUBLE:
            found.run(work(specs[trouble], tmp_path / f"trouble {number}"))
        found.run(work(specs[name], tmp_path / "forth"))
    for name in reversed(PROBES):
        found.run(work(specs[name], tmp_path / "back"))
    found.close()
    store = Store(tmp_path / "trouble 0")
    outcomes = {name: store.state(specs[name].trial_id) for name in TROUBLE}
    assert outcomes == dict.fromkeys(TROUBLE, "failed") | {"diverges": "diverged"}
    assert store.record(specs["leaves a mess"].trial_id).error["message"] == "left a mess"
    for place in ("forth", "back"):
        assert {name: numbers(tmp_path / place, specs[name]) for name in PROBES} == alone
    assert len({weights for weights, _ in alone.values()}) == len(PROBES) - 2  # threads and readers change nothing


def test_the_mess_would_be_seen(specs, alone, tmp_path):
    """The same mess, left in the process that then runs a trial, stops or changes it."""
    in_one_process([work(specs["leaves a mess"], tmp_path), work(specs["plain"], tmp_path)])
    trial_id = specs["plain"].trial_id
    assert Store(tmp_path).result(trial_id) is None or numbers(tmp_path, specs["plain"]) != alone["plain"]


def test_trials_inline_compute_what_a_python_of_its_own_does(specs, alone, tmp_path):
    """One process runs the probes, trouble that leaves no mess between them, and then the probes backwards."""
    mild = [work(specs[name], tmp_path / "trouble") for name in list(TROUBLE)[:3]]
    forth = [work(specs[name], tmp_path / "0") for name in PROBES]
    back = [work(specs[name], tmp_path / "1") for name in reversed(PROBES)]
    in_one_process([*forth, *mild, *back])
    for place in ("0", "1"):
        assert {name: numbers(tmp_path / place, specs[name]) for name in PROBES} == alone
