"""The gate before hundreds of GPU-hours, on stubs: a tiny folder, a stand-in for official files, published scores."""

import io
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluated import config_of, make_folder, trained

from workbench import bands, cli, durable, gate, provenance, runner
from workbench.bands import Band
from workbench.budget import Budget
from workbench.costs import Machine, probe_file
from workbench.errors import StoreError, WorkbenchError
from workbench.execution import StopRequest
from workbench.gate import Asked
from workbench.plan import make_plan
from workbench.published import PUBLISHED, Published
from workbench.runner import LIMIT_REACHED, Options, run_study
from workbench.store import Store
from workbench.study_file import Selection, load_study

sys.path.append(str(Path(__file__).parent.parent / "core"))  # where the published layouts are written down
from official_layouts import deformable, filled, quick_builds, training_file

NOWHERE = "http://127.0.0.1:9"
STUDY = """\
version: 1
study: stub
question: Does a heavier box loss help?
baseline: plain
variants:
  plain: {}
  sharp: {why: boxes weigh more, set: {loss.weight_giou: 4.0}}
claims:
  - {id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}
scope: seeds
"""
TINY = """\
looks: {seeds: [2], alpha: [0.05]}
margins: {ap: 0.02}
set:
  model.hidden_dim: 32
  model.num_heads: 4
  model.ffn_dim: 48
  model.backbone: {kind: small_resnet, width: 8}
  model.extra_levels: 0
  model.encoder: {num_layers: 0, attention: {num_points: 2}}
  model.decoder: {num_layers: 2, attention: {num_points: 2}}
  model.queries.num_queries: 10
  data: {kind: coco, resize: {kind: fixed, height: 48, width: 64}, augmentation: flip}
  evaluation.training_subset: 2
  training: {epochs: 3, batch_size: 2, lr: 2.0e-3, lr_backbone: 2.0e-3, ema_decay: 0.9}
"""
PICTURES = 3
PUBLISHED_HERE = {("deformable", 50): Published(ap=0.445, source="a table", num_pictures=PICTURES)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures to learn from and three to score."""
    return make_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def study(tmp_path):
    """Return a study file with a profile of its own beside it: a tiny model on any folder."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tiny.yaml").write_text(TINY)
    path = tmp_path / "stub.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Return a file that stands for an official one, of a recipe and an AP that `official.ap` sets."""
    path = tmp_path / "official.pth"
    path.write_bytes(b"stands for 160 MB")
    found = {"ap": 0.445, "num_pictures": PICTURES}
    monkeypatch.setattr(gate, "_official", lambda *_: ("deformable", 50))
    monkeypatch.setattr(gate, "scored", lambda *_: found)
    return path, found


@pytest.fixture
def few_steps(monkeypatch):
    """Let a gate train four steps, compared in windows of two."""
    monkeypatch.setattr(bands, "STEPS", 4)
    monkeypatch.setattr(bands, "WINDOW", 2)
    monkeypatch.setattr(bands, "SEEDS", 2)


@pytest.fixture
def asked(study, folder, official):
    """Return what a gate is asked for."""
    return Asked(profile="tiny", study=study, data=folder, checkpoint=official[0])


def passed(asked, store, **options):
    """Run a gate with the stub's published scores."""
    return gate.gate(asked, store, tell=lambda _: None, **{"published": PUBLISHED_HERE, **options})


def recorded(asked, store, *, epoch=True):
    """Record the band of what is asked for."""
    return bands.record(
        store, gate.training(asked, "deformable"), name="stub", epoch=epoch, device="cpu", tell=lambda _: None
    )


def with_band(store, spec, **values):
    """Keep a band that nothing was measured for."""
    band = {"name": "stub", "windows": [[0, 99]], "first_epoch": None, "source": "made up", **values}
    durable.write_json(bands.own_file(store), {"bands": {bands.key_of(spec): band}})


def test_a_gate_with_both_checks_good_is_passed_and_kept(asked, store, few_steps):
    """The published AP within .001 and losses inside the band; on record with what the gate is of."""
    recorded(asked, store)
    result = passed(asked, store)
    assert result.passed, gate.as_text(result)
    assert "AP 44.50 on 3 pictures; 44.5 was published (a table)" in gate.as_text(result)
    kept = json.loads((store.root / "gates" / "tiny.json").read_text())
    assert (kept["format"], kept["passed"]) == (1, True)
    spec = gate.training(asked, "deformable")
    assert kept["identity"] == {
        "code_hash": provenance.code_hash(),
        "numerics": gate.numerics.VERSION,
        "data_fingerprint": spec.data_fingerprint,
        "recipe": "deformable",
        "device": "cpu",
        "checkpoint": {"name": "official.pth", "sha256": gate._sha256(asked.checkpoint)},
    }
    assert gate.missing("tiny", {"t": spec}, store) is None


@pytest.mark.parametrize(
    ("found", "good"),
    [({"ap": 0.4440}, True), ({"ap": 0.4460}, True), ({"ap": 0.4439}, False), ({"ap": None}, False)],
)
def test_a_score_must_be_the_published_one(asked, store, few_steps, official, found, good):
    """A thousandth off is rounding, more is not; a checkpoint that scores nothing has not passed."""
    recorded(asked, store, epoch=False)
    official[1].update(found)
    result = passed(asked, store)
    assert result.passed is good
    assert json.loads((store.root / "gates" / "tiny.json").read_text())["passed"] is good


def test_scores_on_other_pictures_are_not_compared(asked, store, few_steps):
    """The published score is of 5,000 pictures: another folder proves nothing, whatever it scores."""
    recorded(asked, store, epoch=False)
    (ap, _) = passed(asked, store, published=PUBLISHED).checks
    assert not ap.passed
    assert ap.text.endswith("on 5000 pictures: scores of others cannot be compared")


def test_a_recipe_without_a_published_score_cannot_pass(asked, store, few_steps):
    """What nobody published cannot be reproduced."""
    (ap, _) = passed(asked, store, published={}).checks
    assert (ap.passed, ap.text) == (False, "no AP was published of deformable with a ResNet-50")


def test_without_a_band_the_gate_is_not_passed_and_says_how_to_record_one(asked, store, few_steps):
    """The line gives the command."""
    (_, loss) = passed(asked, store).checks
    assert not loss.passed
    assert loss.text.startswith(f"no band stored of the baseline of {asked.study}: record one")
    assert f"`python -m workbench doctor --profile tiny --study {asked.study} --data {asked.data} --record-band`" in (
        loss.text
    )


def test_losses_outside_the_band_do_not_pass(asked, store, few_steps):
    """A training whose losses lie elsewhere is told with both."""
    with_band(store, gate.training(asked, "deformable"), windows=[[0, 99], [1e-3, 2e-3]])
    (_, loss) = passed(asked, store).checks
    assert not loss.passed
    assert "the band (made up) is 0.001 to 0.002 where" in loss.text


def test_a_training_that_diverges_does_not_pass(asked, store, few_steps, monkeypatch):
    """Its loss is not finite, and it has fewer steps than the band."""
    recorded(asked, store)
    diverged = bands.Losses(losses=(3.0, math.nan), steps_per_epoch=2)
    monkeypatch.setattr(bands, "losses", lambda *_, **__: diverged)
    (_, loss) = passed(asked, store).checks
    assert not loss.passed
    assert "where nan was found; 2 windows where 1 were trained" in loss.text


def test_a_band_of_a_broken_training_is_not_recorded(asked, store, few_steps, monkeypatch):
    """A loss that is not finite makes no band."""
    monkeypatch.setattr(bands, "losses", lambda *_, **__: bands.Losses(losses=(3.0, math.nan), steps_per_epoch=2))
    with pytest.raises(WorkbenchError, match="no band of stub: a loss was not finite"):
        recorded(asked, store)
    assert not bands.own_file(store).exists()


def test_a_recorded_band_holds_its_seeds_and_another_training_leaves_it(asked, store, few_steps, study):
    """All seeds lie inside; with a fifth of the box loss the same steps lie outside; the keys differ."""
    band = recorded(asked, store)
    spec = gate.training(asked, "deformable")
    assert bands.known(store, spec) == band
    assert band.first_epoch is not None
    for seed in range(bands.SEEDS):
        found = bands.in_windows(bands.losses(spec, seed=seed, device="cpu", cache=store.cache_dir).losses)
        assert all(low <= loss <= high for loss, (low, high) in zip(found, band.windows, strict=True))
    study.write_text(STUDY.replace("question:", "set: {loss.weight_l1: 1.0}\nquestion:"))
    other = gate.training(asked, "deformable")
    assert bands.known(store, other) is None
    found = bands.in_windows(bands.losses(other, seed=0, device="cpu", cache=store.cache_dir).losses)
    assert not all(low <= loss <= high for loss, (low, high) in zip(found, band.windows, strict=True))


@pytest.mark.parametrize("recipe", ["deformable", "deformable_two_stage"])
def test_the_shipped_bands_are_of_the_present_recipes(store, recipe):
    """A change of a recipe, of the profile or of the numerics needs new bands: `doctor --record-band`."""
    spec = gate.training(Asked(profile="laptop"), recipe)
    band = bands.known(store, spec)
    assert band is not None, f"record it again: doctor --profile laptop --recipe {recipe} --record-band"
    assert len(band.windows) == bands.STEPS // bands.WINDOW
    assert band.first_epoch is not None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["deformable", "deformable_two_stage"])
def test_the_shipped_bands_hold(store, recipe):
    """The recipe at the laptop profile learns as it did when the band was recorded."""
    result = gate.gate(Asked(profile="laptop", recipe=recipe), store, tell=print)
    assert result.passed, gate.as_text(result)


def test_drawn_pictures_have_no_official_file_and_no_gate_on_record(store, monkeypatch):
    """Their losses can be checked; that alone is no gate."""
    monkeypatch.setattr(bands, "known", lambda *_: Band(name="", windows=((0, 9),), first_epoch=None, source="x"))
    monkeypatch.setattr(bands, "losses", lambda *_, **__: bands.Losses(losses=(3.0,), steps_per_epoch=9))
    result = gate.gate(Asked(profile="laptop"), store, tell=print)
    assert result.passed
    assert gate.as_text(result).endswith("What can be checked without an official file is good\n")
    assert not (store.root / "gates" / "laptop.json").exists()


def test_unusable_input_is_told_and_nothing_is_kept(study, folder, store, tmp_path):
    """No checkpoint for a folder, one of ours, none at all: each names its option."""
    with pytest.raises(WorkbenchError, match="--profile tiny: its gate needs an official file: name it with --check"):
        passed(Asked(profile="tiny", study=study, data=folder), store)
    ours = trained(config_of(folder), tmp_path / "ours", steps=1)
    with pytest.raises(WorkbenchError, match="is one of ours; a gate needs an official file"):
        passed(Asked(profile="tiny", study=study, data=folder, checkpoint=ours), store)
    with pytest.raises(WorkbenchError, match=r"--checkpoint .*none\.pth: a checkpoint file was looked for"):
        passed(Asked(profile="tiny", study=study, data=folder, checkpoint=tmp_path / "none.pth"), store)
    assert not (store.root / "gates" / "tiny.json").exists()


@pytest.mark.ci
def test_a_gate_reads_and_scores_an_official_file(study, store, tmp_path, monkeypatch):
    """A file with every published tensor, of random values: its recipe is found, and what it scores is compared.

    Half of what it finds is the truth of the folder, so the score is not 0. There is no band: only the score is good.
    """
    path, folder = tmp_path / "deformable.pth", make_folder(tmp_path / "coco")
    torch.save(training_file(filled(deformable())), path)
    asked = Asked(profile="tiny", study=study, data=folder, checkpoint=path)
    with quick_builds():
        results = tmp_path / "found.json"
        assert (
            cli.main(["evaluate", "--checkpoint", str(path), "--data", str(folder), "--predictions", str(results)]) == 0
        )
        _answer(folder, json.loads(results.read_text()))
        metrics = gate.scored(asked, "deformable", lambda _: None)
        ap = metrics["ap"]
        assert ap > 0.05
        monkeypatch.setattr(gate, "scored", lambda *_: metrics)  # it takes seconds
        for off, good in ((0.0, True), (0.0011, False)):
            published = {("deformable", 50): Published(ap=ap + off, source="here", num_pictures=PICTURES)}
            score, loss = passed(asked, store, published=published).checks
            assert (score.passed, loss.passed) == (good, False), score.text


def _answer(folder, results):
    """Make every other detection a true box, of a category that the folder then has."""
    path = folder / "annotations" / "instances_val.json"
    raw = json.loads(path.read_text())
    found = [entry for entry in results if min(entry["bbox"][2:]) > 1][::2]
    names = {entry["category_id"]: f"category {entry['category_id']}" for entry in found}
    names |= {category["id"]: category["name"] for category in raw["categories"]}  # as in the training pictures
    raw["categories"] = [{"id": key, "name": name} for key, name in names.items()]
    raw["annotations"] = [
        {"id": number, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3]}
        | {name: entry[name] for name in ("image_id", "category_id", "bbox")}
        for number, entry in enumerate(found, start=1)
    ]
    path.write_text(json.dumps(raw))


def test_a_damaged_file_of_bands_is_told(asked, store, few_steps):
    """A band that cannot be read names its file; a file that is no JSON holds none."""
    with_band(store, gate.training(asked, "deformable"), windows=[3])
    with pytest.raises(StoreError, match=r"bands\.json: a band cannot be read"):
        passed(asked, store)
    bands.own_file(store).write_text("{")
    assert bands.known(store, gate.training(asked, "deformable")) is None


# What run asks for


@pytest.fixture
def plan(study, folder):
    """Return the plan of the stub study."""
    return make_plan(load_study(study, Selection(profile="tiny", data=folder)))


@pytest.fixture
def dear(plan, store, tmp_path):
    """Return a budget of trials that take `hours` GPU-hours together, or an unknown number."""

    def make(hours):
        if hours is not None:
            seconds = 3600 * hours / len(plan.trials)
            cost = {"seconds": seconds, "low": seconds, "high": seconds, "memory_bytes": 1, "disk_bytes": 1}
            names = [variant.name for variant in plan.study.variants]
            costs = dict.fromkeys(names, cost | {"source": "a probe"})
            durable.write_json(probe_file(store, plan), {"device": "cuda", "costs": costs})
        stop = StopRequest(tmp_path / "stop", announce=print)
        machine = Machine(device="cuda", at_once=1, gpus=1.0)
        return Budget(plan, store, machine=machine, gpu_hours=None, stop=stop, say=print)

    return make


def required(budget, **options):
    """Ask for a gate; return what was said."""
    said = []
    gate.require(budget, Options(**options), say=said.append)
    return said


def test_a_study_of_few_gpu_hours_needs_no_gate(dear):
    """Up to the limit nothing is asked for."""
    assert required(dear(gate.GPU_HOURS)) == []


def test_a_study_without_gpus_needs_no_gate(dear, monkeypatch):
    """On a CPU nothing is asked for and nothing is probed."""
    budget = dear(None)
    budget.machine = Machine(device="cpu", at_once=1)
    assert required(budget) == []


def test_a_dear_study_is_refused_without_a_gate(dear, asked, store, few_steps):
    """The message has the hours, the command and the way around; a gate that matches lets it pass."""
    with pytest.raises(WorkbenchError) as refused:
        required(dear(101))
    assert str(refused.value) == (
        "no gate of profile tiny is on record, and 101 GPU-hours are expected; above 100 a study needs one: python -m "
        "workbench doctor --profile tiny --checkpoint FILE --data DIR (docs/budget.md); or go on knowingly: "
        "--without-gate"
    )
    assert refused.value.exit_code == 2
    recorded(asked, store)
    assert passed(asked, store).passed
    assert required(dear(101)) == []


def test_a_gate_of_other_code_or_pictures_or_one_not_passed_does_not_match(asked, store, few_steps, plan):
    """What a gate is of must be what is run."""
    recorded(asked, store)
    passed(asked, store)
    path = store.root / "gates" / "tiny.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    for change, said in (
        ({"identity": {**kept["identity"], "code_hash": "0123"}}, "by other detector code (0123)"),
        ({"identity": {**kept["identity"], "numerics": 0}}, "by other detector code"),
        ({"identity": {**kept["identity"], "data_fingerprint": "x"}}, "on other pictures"),
        ({"identity": None}, "is damaged"),
        ({"passed": False, "checks": [{"name": "loss", "passed": False, "text": "high"}]}, "not passed (loss: high)"),
    ):
        path.write_text(json.dumps({**kept, **change}))
        assert said in gate.missing("tiny", plan.specs, store)


def test_going_around_the_gate_is_kept_and_reported(dear, store, plan):
    """The study's folder and its report say that it was run without, and why that mattered."""
    said = required(dear(250), without_gate=True)
    reason = "no gate of profile tiny is on record, and 250 GPU-hours are expected"
    assert said[-1] == f"Warning: {reason}; going on without a gate, which the report will say"
    required(dear(250), without_gate=True)
    kept = json.loads((store.study_dir(plan) / "without_gate.json").read_text())
    assert [item["reason"] for item in kept["reasons"]] == [reason]
    facts = list(runner.report.contents(store.results_for(plan)).facts)
    assert any(fact.startswith("Run without a gate since ") and reason in fact for fact in facts)


def test_an_unknown_cost_is_probed_before_it_is_judged(dear, monkeypatch, plan):
    """Nothing on record and GPUs: a probe decides; where it cannot be made here, the run is refused."""
    budget = dear(None)
    with pytest.raises(WorkbenchError, match="--probe: there is no GPU here"):
        required(budget)
    monkeypatch.setattr("workbench.probe.probe", lambda *_, **__: dear(7))
    assert required(budget) == ["Nothing is on record of what a trial costs:"]


@pytest.mark.parametrize(("executor", "where"), [("ray", "head:6379"), ("inline", None)])
def test_an_unknown_cost_is_probed_where_the_trials_will_run(dear, monkeypatch, executor, where):
    """With the address of a cluster its nodes are measured: the driver's own machine may be a head without GPUs."""
    asked = []
    monkeypatch.setattr("workbench.probe.probe", lambda *_, address, **__: asked.append(address) or dear(7))
    required(dear(None), executor=executor, address="head:6379")
    assert asked == [where]


def test_a_dear_study_says_that_its_baseline_is_not_watched(dear, asked, store, few_steps):
    """Without a band of its first epoch nobody notices a baseline that goes wrong."""
    with_band(store, gate.training(asked, "deformable"))
    passed(asked, store)
    assert required(dear(101)) == [
        "The baseline's first epoch is not watched: no band of it is stored (docs/budget.md)"
    ]


# A baseline whose first epoch leaves the band


@pytest.fixture
def toy_band(toy_plan, store, monkeypatch):
    """Keep a band of the toy baseline's first epoch, whose loss is 1, and watch closely."""
    monkeypatch.setattr("workbench.budget.WATCH_SECONDS", 0.02)

    def make(low, high):
        spec = toy_plan.specs[toy_plan.trials[0].trial_id]
        with_band(store, spec, first_epoch=[low, high])

    return make


def run(plan, store, trainer, **options):
    """Run a plan inline; return exit code, report and what was said."""
    out, err = io.StringIO(), io.StringIO()
    options = {"executor": "inline", "tracking_uri": NOWHERE, "trainer": trainer, **options}
    return run_study(plan, store, Options(**options), out=out, err=err), out.getvalue(), err.getvalue()


def test_a_baseline_outside_its_band_pauses_the_study(toy_plan, store, toy_trainer, toy_band):
    """The running trial writes a checkpoint, none begins, none is left out; the same again; --without-gate goes on."""
    toy_band(2.0, 3.0)
    slow = toy_trainer(steps=40, before_step=lambda _: time.sleep(0.02))
    code, _, err = run(toy_plan, store, slow)
    assert code == LIMIT_REACHED
    assert "Paused: the first epoch of the baseline plain, seed 0, has a mean loss of 1, outside the band 2 to 3" in err
    assert "go on knowingly with --without-gate" in err
    states = [store.state(trial.trial_id) for trial in toy_plan.trials]
    assert states == ["interrupted", *["pending"] * 3]
    assert 2 <= store.record(toy_plan.trials[0].trial_id).step < 40

    code, _, _ = run(toy_plan, store, slow)
    assert code == LIMIT_REACHED
    assert [store.state(trial.trial_id) for trial in toy_plan.trials] == states

    code, report, _ = run(toy_plan, store, toy_trainer(steps=40), without_gate=True)
    assert code == 0
    told = " ".join(report.split())
    assert "Run without a gate since" in told
    assert "the first epoch of the baseline plain, seed 0, has a mean loss of 1, outside the band 2 to 3" in told


def test_a_baseline_inside_its_band_goes_on(toy_plan, store, toy_trainer, toy_band):
    """The check says nothing where the loss is as it should be; the other variant may lie where it likes."""
    toy_band(0.5, 1.5)
    assert run(toy_plan, store, toy_trainer())[0] == 0
    check = bands.first_epoch_watch(store, toy_plan)
    assert check is not None
    assert check() is None
    study = replace(toy_plan.study, baseline="sharp")
    assert bands.first_epoch_watch(store, replace(toy_plan, study=study)) is None  # no band of the other


def test_a_baseline_that_diverges_in_its_first_epoch_pauses_the_study(toy_plan, store, toy_trainer, toy_band):
    """A loss that is not finite has left every band."""
    toy_band(0.5, 1.5)
    run(toy_plan, store, toy_trainer(steps=1, outcome="diverged"))
    check = bands.first_epoch_watch(store, toy_plan)
    assert check is not None
    assert "has a mean loss of nan, outside the band" in check()


# The command


def test_doctor_tells_and_ends_with_1_until_the_gate_is_passed(asked, study, folder, tmp_path, capsys, few_steps):
    """First there is no band; `--record-band` makes one; then the score decides. Bad input ends with 2."""
    options = ["doctor", "--profile", "tiny", "--study", str(study), "--data", str(folder)]
    options += ["--runs", str(tmp_path / "runs")]
    checked = [*options, "--checkpoint", str(asked.checkpoint)]
    assert cli.main(checked) == 1
    assert "NOT PASSED loss: no band stored" in capsys.readouterr().out
    assert cli.main([*options, "--record-band", "steps"]) == 0
    assert "in windows of 2 steps, " in capsys.readouterr().out
    assert cli.main([*checked, "--json"]) == 1  # the folder has other pictures than COCO
    found = json.loads(capsys.readouterr().out)
    assert [(check["name"], check["passed"]) for check in found["checks"]] == [("published AP", False), ("loss", True)]
    assert cli.main(options) == 2
    assert "name it with --checkpoint" in capsys.readouterr().err


def test_published_scores_are_fractions_with_a_source():
    """Every recipe of which official files can be read has one with a ResNet-50."""
    from core.official import DEFORMABLE_RECIPES, DETR_RECIPES

    assert {recipe for recipe, depth in PUBLISHED if depth == 50} == {*DEFORMABLE_RECIPES, *DETR_RECIPES}
    assert all(0.3 < row.ap < 0.5 and "README" in row.source for row in PUBLISHED.values())


def test_evaluate_takes_what_a_gate_gives_it(folder, tmp_path):
    """The options that a gate hands over are all that `evaluate` reads."""
    ours = trained(config_of(folder), tmp_path / "ours", steps=1)
    metrics = gate.scored(Asked(profile="", checkpoint=ours, data=folder), None, lambda _: None)
    assert metrics["num_pictures"] == PICTURES


def test_a_gate_keeps_its_folder_apart_from_studies(asked, store, few_steps):
    """The store lists no study of it."""
    passed(asked, store)
    assert Store(store.root).studies() == ()
