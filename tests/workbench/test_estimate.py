"""What a plan will cost, where the numbers are from, and how good they were."""

import io
import json
import re
import time
from dataclasses import replace
from functools import partial

import pytest

from workbench import cli, durable, estimate, expenses, probe
from workbench.costs import Machine, machine_for, probe_file, trial_costs
from workbench.durable import write_json
from workbench.errors import WorkbenchError
from workbench.options import Options
from workbench.plan import make_plan
from workbench.runner import run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study
from workbench.template import Template
from workbench.trial import execute

NOWHERE = "http://127.0.0.1:9"
TWO = Machine(device="cpu", at_once=2)
SETS = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4", "training.epochs=1")


def with_result(results, trial_id, *, seconds, **result):
    """Return the results with another time and result of one trial."""
    record = results.records[trial_id]
    found = replace(record, total_seconds=seconds, result={**(record.result or {}), **result})
    return replace(results, records={**results.records, trial_id: found})


def rewritten(store, trial_id, name, **values):
    """Change values in a file of a trial."""
    path = store.trial_dir(trial_id) / name
    durable.write_json(path, {**(durable.read_json(path) or {}), **values})


def test_each_variant_is_estimated_from_its_own_trials(fake_results):
    """Mean, range, largest memory and the number of trials are those of the variant's finished trials."""
    results = fake_results({"base": [0.3, 0.3], "other": [0.3]})
    for trial_id, seconds, memory in (("base-0", 60, 5), ("base-1", 80, 7), ("other-0", 200, 9)):
        results = with_result(results, trial_id, seconds=seconds, peak_memory_bytes=memory)
    costs = trial_costs(results, TWO)
    assert costs is not None
    base, other = costs["base"], costs["other"]
    assert (base.seconds, base.low, base.high, base.memory_bytes) == (70, 60, 80, 7)
    assert base.source == "2 trials of the variant"
    assert (other.seconds, other.low, other.high, other.source) == (200, 200, 200, "1 trial of the variant")


def test_a_variant_without_trials_is_estimated_from_the_others(fake_results):
    """Before a variant has finished a trial, the mean of all finished trials of the plan stands for it, and says so."""
    costs = trial_costs(fake_results({"base": [0.3, 0.3], "other": []}), TWO)
    assert costs is not None
    assert costs["other"].source == "2 trials of the plan's other variants"
    assert costs["other"].seconds == costs["base"].seconds


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"threads": 4}])
def test_records_of_another_device_or_other_threads_say_nothing(fake_results, other):
    """A trial on a GPU, or with other threads, takes another time."""
    results = fake_results({"base": [0.3], "other": []})
    made = {**results.records["base-0"].result["provenance"], **other}
    assert trial_costs(with_result(results, "base-0", seconds=9.0, provenance=made), TWO) is None


def test_looks_run_after_each_other_in_as_many_slots_as_there_are():
    """Trials take the first free slot in order: 5, 3 and 4 s in two slots take 7 s; one slot takes them in a row."""
    assert estimate.makespan([5, 3, 4], 2) == 7
    assert estimate.makespan([5, 3, 4], 1) == 12
    assert estimate.makespan([], 2) == 0


def test_what_is_done_is_not_estimated_again(fake_results):
    """Finished trials are reused, an interrupted one counts what is left of it, and each look adds its own start."""
    results = fake_results(
        {"base": [0.3] * 5, "other": [0.3] * 5},
        states={("base", 4): "interrupted", ("other", 4): "pending", ("other", 3): "diverged"},
    )
    found = estimate.estimate(results, Machine(device="cpu", at_once=1))
    first, second = found.looks
    assert (first.trials, first.reused, first.to_run) == (10, 8, 2)
    assert first.seconds == pytest.approx(estimate.START_SECONDS + 88 / 2 + 88)
    assert (second.trials, second.reused, second.to_run) == (20, 8, 12)
    assert second.seconds == pytest.approx(first.seconds + estimate.START_SECONDS + 10 * 88)
    assert (first.gpu_hours, second.gpu_hours) == (0, 0)


def test_gpu_hours_are_seconds_times_gpus(fake_results):
    """Trials that hold two GPUs for 88 s each; slots make the wall time shorter, never the GPU-hours."""
    results = fake_results({"base": [0.3], "other": [0.3]}, looks=((5, 0.05),))
    for name in ("base-0", "other-0"):
        made = {**results.records[name].result["provenance"], "device": "cuda", "gpus": ["H100", "H100"]}
        results = with_result(results, name, seconds=88.0, provenance=made)
    (look,) = estimate.estimate(results, Machine(device="cuda", at_once=4, gpus=2.0)).looks
    assert look.gpu_hours == pytest.approx(8 * 88 * 2 / 3600)
    assert look.seconds == pytest.approx(estimate.START_SECONDS + 2 * 88)
    costs = trial_costs(results, Machine(device="cuda", at_once=4, gpus=2.0))
    assert costs is not None
    assert costs["base"].source == "1 trial of the variant on H100"


def test_similar_trials_of_another_study_are_scaled_to_the_pictures_trained(toy_study, toy_plan, store, toy_trainer):
    """Twice the epochs take twice the training and as long for the rest; a model of another size says nothing."""
    for spec in toy_plan.specs.values():
        execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer())
        rewritten(store, spec.trial_id, "result.json", seconds=30.0, total_seconds=36.0)
    longer = [item for item in SETS if "epochs" not in item] + ["training.epochs=2"]
    others = make_plan(load_study(toy_study, Selection(profile="smoke", sets=tuple(longer))))
    costs = trial_costs(store.results_for(others), TWO)
    assert costs is not None
    assert costs["plain"].seconds == pytest.approx(2 * 30 + 6)
    assert costs["plain"].source == "4 trials of other studies with like sizes"
    assert costs["plain"].memory_bytes == 1000
    assert costs["plain"].disk_bytes > 1000
    wider = make_plan(load_study(toy_study, Selection(profile="smoke", sets=(*longer, "model.hidden_dim=64"))))
    assert trial_costs(store.results_for(wider), TWO) is None


def test_a_damaged_folder_of_another_study_is_no_source(toy_study, toy_plan, store, toy_trainer):
    """Half-written or foreign files among the trials are passed over."""
    for number, spec in enumerate(toy_plan.specs.values()):
        execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer())
        folder = store.trial_dir(spec.trial_id)
        (folder / ("result.json" if number % 2 else "spec.json")).write_text("{")
    (store.root / "trials" / "notes.txt").write_text("mine")
    sets = (*SETS[:-1], "training.epochs=2")
    others = make_plan(load_study(toy_study, Selection(profile="smoke", sets=sets)))
    assert trial_costs(store.results_for(others), TWO) is None


def test_clusters_are_planned_by_their_gpus(coco_folder, toy_study, tmp_path):
    """`--gpus` divides by what a trial holds; fewer than that, or a profile that draws its pictures, is an error."""
    text = toy_study.read_text() + "execution: {gpus: 2, nodes: 2}\n"
    toy_study.write_text(text)
    drawn = make_plan(load_study(toy_study, Selection(profile="smoke")))
    with pytest.raises(WorkbenchError, match="--gpus 8: profile smoke draws its pictures and trains on the CPU"):
        machine_for(drawn, gpus=8)
    folder = make_plan(load_study(toy_study, Selection(profile="coco12", data=coco_folder, sets=NO_WEIGHTS)))
    assert machine_for(folder, gpus=17) == Machine(device="cuda", at_once=4, gpus=4.0)
    with pytest.raises(WorkbenchError, match="--gpus 3: a trial takes 4"):
        machine_for(folder, gpus=3)


NO_WEIGHTS = ("model.backbone.weights=null",)


def test_a_machine_that_is_too_small_is_said(toy_study):
    """A plan for more threads than there are cores can be estimated, and says that it cannot run here."""
    plan = make_plan(load_study(toy_study, Selection(profile="smoke", sets=("training.threads=4096",))))
    assert "a trial asks for 4096 cores on one machine" in machine_for(plan).note


def test_a_kept_probe_is_the_source_until_a_trial_has_finished(toy_plan, store, toy_trainer):
    """What `plan --probe` has measured is used by later commands, on the same device only."""
    cost = {"seconds": 5.0, "low": 4.0, "high": 6.0, "memory_bytes": 7, "disk_bytes": 8, "source": "a probe of 3 steps"}
    write_json(probe_file(store, toy_plan), {"device": "cpu", "costs": {"plain": cost, "sharp": cost}})
    found = estimate.estimate(store.results_for(toy_plan), TWO)
    assert found.sources() == ("a probe of 3 steps",)
    assert found.looks[0].disk_bytes == 32
    assert estimate.estimate(store.results_for(toy_plan), replace(TWO, device="cuda")).costs is None
    execute(toy_plan.specs[toy_plan.trials[0].trial_id], store.root, should_stop=lambda: False, trainer=toy_trainer())
    assert "a probe of 3 steps" not in estimate.estimate(store.results_for(toy_plan), TWO).sources()


def test_a_probe_of_each_extrapolates_to_whole_trials(toy_plan, store):
    """In this process: the steps of all epochs, the scored pictures, and the checkpoints make up a trial."""
    spec = toy_plan.specs[toy_plan.trials[0].trial_id]
    measured = probe.measure(spec, "cpu", 3, store.cache_dir)
    assert (measured.total_steps, measured.num_val) == (2, 8)
    assert len(measured.steps) == 2
    assert measured.checkpoint_bytes > 100_000
    assert measured.memory_bytes > 100_000_000
    known = replace(
        measured, steps=(0.5, 0.5, 0.5), total_steps=100, opening=2.0, picture=0.1, num_val=40, saving=0.25, rows=10.0
    )
    cheaper = replace(known, steps=(0.25,), total_steps=200)
    config = spec.config
    cost = probe.extrapolated(config, short=cheaper, found=known, reference=known, machine=TWO, dearest="plain")
    assert cost.seconds == pytest.approx(200 * 0.25 + 2.0 + 1 * (4 * 0.1 + 0.25) + 2 * (40 * 0.1 + 0.25))
    assert cost.source == "a probe of 3 steps of plain"
    eight = Machine(device="cuda", at_once=1, gpus=8.0)
    spread = probe.extrapolated(config, short=known, found=known, reference=known, machine=eight, dearest="plain")
    assert spread.seconds == pytest.approx(100 * 0.5 / 8 + 2.0 + 0.65 + 8.5)
    assert "as if 8 GPUs were that many times as fast" in spread.source


def test_a_probe_says_why_it_cannot_be_made(toy_plan, store):
    """Without a GPU there is no probe of one."""
    with pytest.raises(WorkbenchError, match="--probe: there is no GPU here"):
        probe.probe(toy_plan, store, Machine(device="cuda", at_once=1, gpus=1.0), allow_code=False, tell=print)


def test_plain_plan_answers_at_once_among_many_trials(toy_study, toy_plan, store, toy_trainer, capsys):
    """Nothing is trained, nothing written, and five hundred foreign trials cost less than a second."""
    (spec, *_) = toy_plan.specs.values()
    execute(spec, store.root, should_stop=lambda: False, trainer=toy_trainer())
    texts = {name: (store.trial_dir(spec.trial_id) / name).read_text() for name in ("spec.json", "result.json")}
    for number in range(500):
        folder = store.trial_dir(f"{number:016x}")
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text.replace(spec.trial_id, f"{number:016x}"))
    arguments = ["plan", str(toy_study), "--profile", "smoke", "--runs", str(store.root), "--json"]
    before = sorted(store.root.rglob("*"))
    began = time.perf_counter()
    assert cli.main(arguments) == 0
    assert time.perf_counter() - began < 5  # a fifth of a second on an idle machine
    assert sorted(store.root.rglob("*")) == before
    assert json.loads(capsys.readouterr().out)["cost"]["costs"] is None  # of pictures of another size


def test_a_run_keeps_its_estimate_and_the_report_tells_its_error(toy_plan, store, toy_trainer):
    """With one trial known a run says what it expects, and the report what it took; a complete study adds nothing."""
    execute(toy_plan.specs[toy_plan.trials[0].trial_id], store.root, should_stop=lambda: False, trainer=toy_trainer())
    out, err = io.StringIO(), io.StringIO()
    options = Options(executor="inline", tracking_uri=NOWHERE, trainer=toy_trainer())
    assert run_study(toy_plan, store, options, out=out, err=err) == 0
    assert re.search(
        r"Expected: 10 s .* for 3 trials, from 1 trial of the variant and 1 trial of the plan", err.getvalue()
    )
    (call,) = estimate.calls(store.study_dir(toy_plan))
    assert (call["look"], call["to_run"], call["at_once"]) == (1, 3, 1)
    assert 0 < call["took_seconds"] < 10
    told = " ".join(out.getvalue().split())
    assert re.search(
        r"Estimate of look 1: estimated 10 s for 3 trials from 1 trial of the variant .*, took \d+ s: \d+ % less", told
    )
    assert run_study(toy_plan, store, options, out=out, err=err) == 0
    assert len(estimate.calls(store.study_dir(toy_plan))) == 1


def test_an_estimate_of_a_run_that_was_stopped_has_no_error(toy_plan, store, toy_trainer):
    """It was of more than was done; the run that goes on has its own."""
    execute(toy_plan.specs[toy_plan.trials[0].trial_id], store.root, should_stop=lambda: False, trainer=toy_trainer())
    results = store.results_for(toy_plan)
    folder = store.study_dir(toy_plan)
    with estimate.kept(folder, estimate.estimate(results, TWO), 1, complete=lambda: False):
        pass
    assert [call["took_seconds"] for call in estimate.calls(folder)] == [None]
    assert estimate.errors(results) == []


@pytest.mark.parametrize("content", ["{", "[]", {"costs": 3}, {"calls": 3}, {"calls": [3, {}]}, {"reasons": [3]}])
def test_damaged_files_are_no_source_and_stop_no_report(toy_plan, store, content):
    """Whatever stands in the files of estimates, plan and report go on without; going without a gate is still said."""
    folder = store.study_dir(toy_plan)
    call = {"look": 1, "took_seconds": 3, "seconds": 0, "to_run": 1, "sources": []}
    text = content if isinstance(content, str) else json.dumps({"format": 1, "device": "cpu", **content})
    for name in ("probe.json", "estimate.json", "without_gate.json", "last_run.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    found = store.results_for(toy_plan)
    expected = estimate.estimate(found, TWO)
    assert (expected.costs, expected.start_seconds) == (None, estimate.START_SECONDS)
    assert estimate.errors(found) == []
    told = list(expenses.facts(found))
    damaged = isinstance(content, dict) and "reasons" in content
    assert told == (["Run without a gate since unknown: without_gate.json is damaged."] if damaged else [])
    write_json(folder / "estimate.json", {"calls": [call]})
    assert estimate.errors(found) == []  # nothing was estimated


@pytest.mark.ci
def test_the_error_of_a_probe_on_a_real_small_study(tmp_path, capsys):
    """`plan --probe` measures in other processes, keeps it, and the run's report says how far off it was.

    The bound is wide because the machine may be busy: three times as long or as short.
    """
    study, runs = tmp_path / "toy.yaml", tmp_path / "runs"
    study.write_text(SMALL)
    sets = [word for item in LEARNING for word in ("--set", item)]
    selection = [str(study), "--profile", "smoke", "--runs", str(runs), *sets]
    assert cli.main(["plan", *selection, "--probe", "--json"]) == 0
    captured = capsys.readouterr()
    costs = json.loads(captured.out)["cost"]["costs"]
    assert "Probing 2 variants" in captured.err
    assert cli.main(["run", *selection, "--executor", "inline", "--tracking-uri", NOWHERE]) == 0
    out = " ".join(capsys.readouterr().out.split())
    results = Store(runs).results_for(make_plan(load_study(study, Selection(profile="smoke", sets=LEARNING))))
    took = [record.total_seconds for record in results.records.values()]
    expected = sum(costs[trial.variant]["seconds"] for trial in results.plan.trials)
    assert 1 / 3 < expected / sum(took) < 3
    assert re.search(r"Estimate of look 1: estimated \d+ s for 4 trials from a probe of \d+ steps", out)


@pytest.mark.ci
def test_a_probe_knows_the_memory_of_a_trial_in_a_slot(tmp_path, store):
    """Its processes share the libraries as the trials' do, which are forks as well; a new Python has .3 GB more."""
    path = tmp_path / "toy.yaml"
    path.write_text(SMALL)
    plan = make_plan(load_study(path, Selection(profile="smoke", sets=LEARNING)))
    costs = probe.probe(plan, store, Machine(device="cpu", at_once=1), allow_code=False, tell=print)
    spec = plan.specs[plan.trials[0].trial_id]
    template = Template(log=tmp_path / "slot.log")
    template.run(partial(execute, spec, store.root, should_stop=bool))
    template.close()
    assert costs["plain"].memory_bytes == pytest.approx(store.result(spec.trial_id)["peak_memory_bytes"], rel=0.15)


LEARNING = ("data.side=64", "data.num_train=64", "data.num_val=24", "training.epochs=8")
SMALL = """\
version: 1
study: small
question: How far off is an estimate?
baseline: plain
variants:
  plain: {}
  dear: {why: the encoder learns from its own loss too, set: {model.encoder_supervision: {}}}
claims:
  - {id: dear_better, text: Supervision is better., plus: dear, minus: plain, metric: ap, kind: superiority}
scope: seeds
"""
