"""Bands of losses: recorded, shipped, and the baseline's first epoch, whose leaving its band pauses a study."""

import math
import time
from dataclasses import replace

import pytest
from costly import passed, recorded, run, with_band

from workbench import bands, gate
from workbench.errors import LIMIT_REACHED, StoreError, WorkbenchError
from workbench.gate import Asked


def test_a_band_of_a_broken_training_is_not_recorded(asked, store, few_steps, monkeypatch):
    """A loss that is not finite makes no band."""
    monkeypatch.setattr(bands, "losses", lambda *_, **__: bands.Losses(losses=(3.0, math.nan), steps_per_epoch=2))
    with pytest.raises(WorkbenchError, match="no band of stub: a loss was not finite"):
        recorded(asked, store)
    assert not bands.own_file(store).exists()


def test_a_recorded_band_holds_its_seeds_and_another_training_leaves_it(asked, store, few_steps):
    """All seeds lie inside; with a fifth of the box loss the same steps lie outside; the keys differ."""
    band = recorded(asked, store)
    spec = gate.training(asked, "deformable")
    assert bands.known(store, spec) == band
    assert band.first_epoch is not None
    for seed in range(bands.SEEDS):
        found = bands.in_windows(bands.losses(spec, seed=seed, device="cpu", cache=store.cache_dir).losses)
        assert all(low <= loss <= high for loss, (low, high) in zip(found, band.windows, strict=True))
    text = asked.study.read_text()
    asked.study.write_text(text.replace("question:", "set: {loss.weight_l1: 1.0}\nquestion:"))
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


def test_a_damaged_file_of_bands_is_told(asked, store, few_steps):
    """A band that cannot be read names its file; a file that is no JSON holds none."""
    with_band(store, gate.training(asked, "deformable"), windows=[3])
    with pytest.raises(StoreError, match=r"bands\.json: a band cannot be read"):
        passed(asked, store)
    bands.own_file(store).write_text("{")
    assert bands.known(store, gate.training(asked, "deformable")) is None


@pytest.fixture
def toy_band(toy_plan, store, monkeypatch):
    """Keep a band of the toy baseline's first epoch, whose loss is 1, and watch closely."""
    monkeypatch.setattr("workbench.budget.WATCH_SECONDS", 0.02)

    def make(low, high):
        spec = toy_plan.specs[toy_plan.trials[0].trial_id]
        with_band(store, spec, first_epoch=[low, high])

    return make


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
