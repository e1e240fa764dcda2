"""What a run may spend: wall time for further looks, and GPU-hours of all attempts. A second is a GPU-hour here."""

import os
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from costly import ON_GPUS, costing, hold_gpus, run

from workbench import attempts, budget, durable, gate
from workbench.attempts import Attempt
from workbench.budget import Budget, Meter, gpu_seconds, watching
from workbench.costs import Machine
from workbench.errors import LIMIT_REACHED
from workbench.processes import Process
from workbench.stopping import StopRequest

GONE = Process(host=Process.current().host, boot="an earlier one", pid=1, started=1)


def stamp(seconds):
    """Return a time as attempts have it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def attempt(number, *, began=1000.0, outcome="finished", seconds=0.0):
    """Return an attempt of a process that is no more."""
    return Attempt(
        number=number, worker=GONE, driver=None, began_at=stamp(began), outcome=outcome, seconds=seconds, cpu_seconds=0
    )


def tried(store, trial_id, *of):
    """Write attempts into a trial's folder."""
    for one in of:
        folder = store.trial_dir(trial_id) / "attempts"
        plain = {"worker": vars_of(one.worker), "driver": None, "began_at": one.began_at, "outcome": one.outcome}
        durable.write_json(
            folder / f"{one.number:04d}.json", {**plain, "seconds": one.seconds, "cpu_seconds": one.cpu_seconds}
        )


def vars_of(process):
    """Return a process as JSON values."""
    return {"host": process.host, "boot": process.boot, "pid": process.pid, "started": process.started}


@pytest.fixture
def on_gpus(monkeypatch):
    """Let every trial hold GPUs, and ask for no gate."""
    hold_gpus(monkeypatch)
    monkeypatch.setattr(gate, "require", lambda *_, **__: None)


@pytest.fixture
def stop(tmp_path):
    """Return a stop request that tells nobody."""
    return StopRequest(tmp_path / "stop", announce=lambda _: None)


@pytest.fixture
def limited(toy_plan, store, stop, on_gpus):
    """Return a maker of budgets with a cap of GPU-hours."""

    def make(cap, *, plan=toy_plan):
        return Budget(plan, store, machine=ON_GPUS, gpu_hours=cap, stop=stop, say=lambda _: None)

    return make


def test_every_attempt_counts_however_it_ended(monkeypatch):
    """Finished, failed and interrupted ones by their seconds; one without an end up to the time given."""
    monkeypatch.setattr(budget, "gpus_of", lambda one: 2.0 if one.number > 1 else 0.5)
    of = [
        attempt(1, seconds=100, outcome="interrupted"),
        attempt(2, seconds=10, outcome="failed"),
        attempt(3, seconds=5),
        attempt(4, began=2000.0, outcome=None),
    ]
    assert gpu_seconds(of, until=2030.0) == 50 + 20 + 10 + 60
    assert gpu_seconds(of, until=1900.0) == 50 + 20 + 10
    assert gpu_seconds(of, until=2030.0, since=1500.0) == 60


def test_attempts_on_a_cpu_hold_no_gpu():
    """What the records of a CPU say is no GPU time."""
    assert gpu_seconds([attempt(1, seconds=100)], until=0.0) == 0


def test_a_dead_attempt_ends_with_its_last_sign(toy_plan, store, on_gpus):
    """A worker that was killed has no end on record; it counts until it last wrote anything."""
    trial_id = toy_plan.trials[0].trial_id
    tried(store, trial_id, attempt(1, began=1000.0, outcome=None))
    folder = store.trial_dir(trial_id)
    os.utime(folder / "attempts" / "0001.json", (1001, 1001))
    (folder / "events.jsonl").touch()
    os.utime(folder / "events.jsonl", (1025, 1025))
    assert Meter(store, toy_plan).gpu_hours() == pytest.approx(25)


def test_a_running_attempt_counts_until_now(toy_plan, store, on_gpus):
    """What trials that run have spent is spent."""
    folder = store.trial_dir(toy_plan.trials[0].trial_id)
    folder.mkdir(parents=True)
    begun = attempts.begin(folder, driver=None)
    meter = Meter(store, toy_plan)
    first = meter.gpu_hours()
    time.sleep(0.1)
    assert meter.gpu_hours() >= first + 0.1
    attempts.end(folder, begun, outcome="failed", seconds=7.0, cpu_seconds=0.0)
    assert meter.gpu_hours() == 7


def test_other_plans_of_the_study_count_and_other_studies_before_it_do_not(toy_plan, store, on_gpus):
    """An edited study has spent what its earlier plans did; a trial that was there before cost it nothing."""
    first, second = (trial.trial_id for trial in toy_plan.trials[:2])
    tried(store, first, attempt(1, began=1000.0, seconds=50.0))
    store.register(toy_plan, source="")
    later = time.time() + 1
    tried(store, second, attempt(1, began=later, seconds=3.0))
    edited = replace(toy_plan, plan_hash="edited", trials=toy_plan.trials[2:], specs={})
    assert Meter(store, edited).gpu_hours() == 3
    tried(store, first, attempt(1, began=1000.0, seconds=50.0), attempt(2, began=later, seconds=4.0))
    assert Meter(store, edited).gpu_hours() == 7


def test_trials_start_while_they_are_expected_to_end_before_the_cap(toy_plan, store, limited, stop):
    """Of four trials of 10 GPU-hours, 25 pay two; when 12 are spent one more; when 16 are, none, and the run stops."""
    costing(store, toy_plan, 10.0)
    trials = toy_plan.trials
    plans = limited(25.0)
    assert plans.affordable(trials) == trials[:2]
    tried(store, trials[0].trial_id, attempt(1, seconds=12.0, outcome="interrupted"))
    assert plans.affordable(trials[1:]) == trials[1:2]
    assert stop.reason is None
    tried(store, trials[0].trial_id, attempt(1, seconds=16.0, outcome="interrupted"))
    assert plans.affordable(trials[1:]) == ()
    assert stop.reason.startswith(
        "16 of 25 GPU-hours are spent, all attempts counted, and the next trial needs about 10: no further trial is "
        "started. Raise it with --gpu-hours"
    )
    assert limited(None).affordable(trials) == trials


def test_what_those_at_work_still_need_is_set_aside(toy_plan, store, limited, stop):
    """Of 25 GPU-hours two trials of 10 leave nothing for a third, which waits: a stop would end the two as well."""
    first, second, third, _ = toy_plan.trials
    assert limited(25.0).affordable((second, third), at_work=(first,)) == (second,)  # of unknown cost, two at once
    costing(store, toy_plan, 10.0)
    assert limited(25.0).affordable((second, third), at_work=(first,)) == (second,)
    assert limited(25.0).affordable((third,), at_work=(first, second)) == ()
    assert stop.reason is None
    assert limited(25.0).affordable((third,)) == (third,)


def test_trials_of_unknown_cost_start_a_few_at_a_time(toy_plan, store, limited, stop):
    """As many as run at once, so that they say what the rest will cost; none once the cap is passed."""
    assert limited(5.0).affordable(toy_plan.trials) == toy_plan.trials[:2]
    tried(store, toy_plan.trials[0].trial_id, attempt(1, seconds=6.0, outcome="failed"))
    assert limited(5.0).affordable(toy_plan.trials) == ()
    assert "6 of 5 GPU-hours are spent" in stop.reason


def test_a_look_fits_by_what_its_trials_are_expected_to_take(two_looks_of_ten, store, stop):
    """20 trials of 30 s in two slots and the start take 310 s; 100 s were spent. A look that is known always fits."""
    costing(store, two_looks_of_ten, 30.0)
    plans = Budget(
        two_looks_of_ten,
        store,
        machine=Machine(device="cpu", at_once=2),
        gpu_hours=None,
        stop=stop,
        say=lambda _: None,
    )
    assert plans.refuses_look(1, spent=100.0, budget_seconds=None) is None
    assert plans.refuses_look(1, spent=100.0, budget_seconds=411.0) is None
    assert plans.refuses_look(1, spent=100.0, budget_seconds=409.0) == (
        "The next look needs about 5 min 10 s, and 5 min 09 s of the budget are left: raise --budget to go on"
    )


def test_a_look_that_the_cap_cannot_pay_for_is_not_begun(two_looks_of_ten, store, limited):
    """20 trials of 10 GPU-hours: half a look decides nothing. What failed and was preempted is gone from the cap."""
    costing(store, two_looks_of_ten, 10.0)
    assert limited(200.0, plan=two_looks_of_ten).refuses_look(1, spent=0.0, budget_seconds=None) is None
    first, second = (trial.trial_id for trial in two_looks_of_ten.trials[:2])
    tried(store, first, attempt(1, seconds=4.0, outcome="failed"), attempt(2, seconds=3.0, outcome="interrupted"))
    tried(store, second, attempt(1, seconds=2.0, outcome="failed"))
    plans = limited(208.0, plan=two_looks_of_ten)
    assert plans.refuses_look(1, spent=0.0, budget_seconds=None) == (
        "The next look needs about 200 GPU-hours, and 9 of 208 GPU-hours are spent, all attempts counted. "
        "Raise it with --gpu-hours or execution.gpu_hours to go on"
    )
    assert limited(209.0, plan=two_looks_of_ten).refuses_look(1, spent=0.0, budget_seconds=None) is None


@pytest.fixture
def two_looks_of_ten(toy_plan):
    """Return the toy plan with ten seeds at its look."""
    trials = tuple(
        replace(trial, seed=seed, trial_id=f"{trial.variant}-{seed}")
        for seed in range(10)
        for trial in toy_plan.trials[:2]
    )
    spec = toy_plan.specs[toy_plan.trials[0].trial_id]
    look = replace(toy_plan.study.looks[0], seeds=10)
    study = replace(toy_plan.study, looks=(look,), seeds=tuple(range(10)))
    specs = {trial.trial_id: replace(spec, trial_id=trial.trial_id) for trial in trials}
    return replace(toy_plan, study=study, trials=trials, specs=specs)


def test_a_run_stops_at_its_cap_and_goes_on_when_it_is_raised(toy_plan, store, toy_trainer, on_gpus):
    """The running trial writes a checkpoint, no other begins, the exit code and the line say so; a raise goes on."""
    slow = toy_trainer(steps=40, before_step=lambda _: time.sleep(0.02))
    code, _, err = run(toy_plan, store, slow, gpu_hours=0.3)
    assert code == LIMIT_REACHED
    assert [store.state(trial.trial_id) for trial in toy_plan.trials] == ["interrupted", *["pending"] * 3]
    record = store.record(toy_plan.trials[0].trial_id)
    assert 0 < record.step < 40
    assert "of 0.3 GPU-hours are spent, all attempts counted: the limit is reached. Raise it with --gpu-hours" in err
    assert "To go on, with what is said: python -m workbench" in err

    code, _, err = run(toy_plan, store, slow, gpu_hours=0.05)  # what an attempt says of itself may be a little less
    assert code == LIMIT_REACHED
    assert [store.record(trial.trial_id).attempts for trial in toy_plan.trials] == [1, 0, 0, 0]
    assert "no further trial is started" in err

    code, _, _ = run(toy_plan, store, toy_trainer(steps=40), gpu_hours=60.0)
    assert code == 0
    assert [store.record(trial.trial_id).attempts for trial in toy_plan.trials] == [2, 1, 1, 1]


def test_the_cap_of_the_study_file_holds(toy_study, store, toy_trainer, on_gpus):
    """`execution.gpu_hours` is the limit where the command names none."""
    from workbench.plan import make_plan
    from workbench.study_file import Selection, load_study

    toy_study.write_text(toy_study.read_text() + "execution: {gpu_hours: 0.001}\n")
    plan = make_plan(load_study(toy_study, Selection(profile="smoke")))
    slow = toy_trainer(steps=40, before_step=lambda _: time.sleep(0.02))
    assert run(plan, store, slow)[0] == LIMIT_REACHED


def test_a_run_without_gpus_has_no_cap(toy_plan, store, toy_trainer):
    """On a CPU there are no GPU-hours to count, so the cap never ends a run."""
    assert run(toy_plan, store, toy_trainer(), gpu_hours=1e-9)[0] == 0


def test_a_limit_that_cannot_be_watched_stops_the_run(stop, monkeypatch):
    """A check that raises is a reason to stop: a limit that nobody watches is none."""
    monkeypatch.setattr(budget, "WATCH_SECONDS", 0.01)

    def broken():
        raise OSError("the folder is gone")

    with watching((broken,), stop):
        deadline = time.monotonic() + 5
        while not stop.requested() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stop.reason == "the limits of this run cannot be watched (OSError: the folder is gone)"
    assert stop.path.exists()


def test_the_first_reason_to_stop_counts(stop):
    """A second limit, or one after a signal, changes nothing."""
    stop.limit("first")
    stop.limit("second")
    assert stop.reason == "first"
