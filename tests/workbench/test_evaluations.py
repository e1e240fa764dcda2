"""Variants that differ in how a checkpoint is scored: it is trained once. Real training, tiny scale."""

import io
import json

import pandas as pd
import pytest

from workbench.options import Options
from workbench.plan import make_plan
from workbench.runner import run_study
from workbench.study_file import Selection, load_study

NOWHERE = "http://127.0.0.1:9"  # nobody listens there
SETS = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")
STUDY = """\
version: 1
study: nms
question: Does NMS help?
baseline: none
variants:
  none: {}
  half: {why: duplicates go, set: {evaluation.nms_iou: 0.5}}
claims:
  - {id: nms_changes_nothing, text: NMS changes nothing., plus: half, minus: none, metric: ap, kind: equivalence}
scope: seeds
"""


@pytest.fixture
def run(tmp_path, store):
    """Return a runner of the study with a text of its own: the plan and what its records hold."""

    def run_text(text=STUDY, seeds=2):
        (tmp_path / "nms.yaml").write_text(text)
        plan = make_plan(load_study(tmp_path / "nms.yaml", Selection(profile="smoke", seeds=seeds, sets=SETS)))
        err = io.StringIO()
        code = run_study(plan, store, Options(executor="inline", tracking_uri=NOWHERE), out=io.StringIO(), err=err)
        assert code == 0, err.getvalue()
        return plan, store.results_for(plan)

    return run_text


def test_variants_that_differ_in_nms_train_once_and_are_scored_apart(run, store):
    """Two variants of two seeds are two trainings, each scored with and without NMS, and judged by their own scores."""
    plan, results = run()
    assert [trial.variant for trial in plan.trials] == ["none", "half"] * 2
    assert len(plan.specs) == len(list(store.root.glob("trials/*/result.json"))) == 2
    for seed in (0, 1):
        none, half = (trial for trial in plan.trials if trial.seed == seed)
        assert none.trial_id == half.trial_id
        assert not set(none.evaluations.values()) & set(half.evaluations.values())
        assert plan.specs[none.trial_id].config.evaluation.nms_iou is None  # curves are the baseline's
        record = results.records[none.trial_id]
        assert record.attempts == 1
        assert record.metrics.keys() == {*none.evaluations.values(), *half.evaluations.values()}
        for parameters in ("raw", "averaged"):
            folders = [store.evaluation_dir(none.trial_id, trial.evaluations[parameters]) for trial in (none, half)]
            kept = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
            assert [one["evaluation"]["nms_iou"] for one in kept] == [None, 0.5]
            assert [one["evaluation"]["parameters"] for one in kept] == [parameters] * 2
            tables = [pd.read_parquet(folder / "predictions.parquet") for folder in folders]
            pd.testing.assert_frame_equal(*tables)  # they are from before NMS
    assert [verdict.claim for verdict in results.verdicts] == ["nms_changes_nothing"]


def test_another_nms_later_trains_nothing(run, store):
    """A variant that is added afterwards is scored from the checkpoints that are there."""
    run(seeds=1)
    results = sorted(store.root.glob("trials/*/result.json"))
    before = [path.read_bytes() for path in results]
    plan, again = run(
        STUDY.replace("claims:", "  loose: {why: fewer go, set: {evaluation.nms_iou: 0.9}}\nclaims:"), seeds=1
    )
    assert sorted(store.root.glob("trials/*/result.json")) == results
    assert [path.read_bytes() for path in results] == before
    for trial in plan.trials:
        assert again.records[trial.trial_id].metrics.keys() >= set(trial.evaluations.values())
    assert len(list(store.root.glob("trials/*/evaluations/*/metrics.json"))) == 3 * 2  # variants, parameters
