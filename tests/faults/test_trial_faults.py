"""Faults inside a trial: in slots as a driver uses them, without Ray."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

from faults import Fault, Seen, cases
from toys import Poison, ToyTrainer, executed, run_toy, toy_plan

from workbench import attempts, failures, retrying, slots
from workbench.store import Store
from workbench.study import Plan

STEPS = 12
BASELINE = ("plain",)


def seen_of(plan: Plan, store: Store, code: int | None) -> Seen:
    """Return exit code, states, attempts and failures of a plan's trials, those of seed 0 of the baseline first."""
    tried = [attempts.read(store.trial_dir(trial.trial_id)) for trial in plan.trials]
    return {
        "exit": code,
        "states": [store.state(trial.trial_id) for trial in plan.trials],
        "attempts": [len(some) for some in tried],
        "failures": [attempt.failure for attempt in tried[0]],
        "steps": len(executed(store.trial_dir(plan.trials[0].trial_id))),
    }


def weights(plan: Plan, store: Store) -> list[str | None]:
    """Return the hash of each trial's last weights."""
    return [(store.result(trial.trial_id) or {}).get("weights_hash") for trial in plan.trials]


def struck_once(place: Path, kind: str, **trainer: object) -> Seen:
    """Run with a trainer that fails once at step 7 of seed 0, and one that does not; compare their weights."""
    poison = Poison(kind=kind, step=7, seed=0, marker=place / "struck")
    plan = toy_plan(place, variants=BASELINE)
    store, calm = Store(place / "runs"), Store(place / "calm")
    code, _, _ = run_toy(plan, store, ToyTrainer(steps=STEPS, poisons=(poison,), **trainer))
    run_toy(plan, calm, ToyTrainer(steps=STEPS, **trainer))
    return seen_of(plan, store, code) | {"same weights": weights(plan, store) == weights(plan, calm)}


@contextmanager
def without_retries(protected: bool) -> Iterator[None]:  # noqa: FBT001 - as in `Fault`
    """Take away, unless protected, that what may pass is tried again."""
    if protected:
        yield
        return
    with mock.patch.object(retrying, "may_pass", return_value=False):
        yield


def _raised_once(place: Path, *, protected: bool) -> Seen:
    with without_retries(protected):
        return struck_once(place, "raise")


def _killed_once(place: Path, *, protected: bool) -> Seen:
    with without_retries(protected):
        return struck_once(place, "kill")


def _verify_resumed(failure: str):
    def verify(seen: Seen) -> None:
        assert (seen["exit"], seen["states"]) == (0, ["finished", "finished"])
        assert (seen["attempts"], seen["failures"]) == ([2, 1], [failure, None])
        assert seen["same weights"]
        assert seen["steps"] <= STEPS + 4  # one checkpoint interval

    return verify


def _pair_after_retry(place: Path, *, protected: bool) -> Seen:
    """The control forgets where the checkpoint was and goes on from the wrong state."""
    plan, store, calm = toy_plan(place), Store(place / "runs"), Store(place / "calm")
    poison = Poison(kind="kill", step=7, seed=0, marker=place / "struck")
    run_toy(plan, calm, ToyTrainer(steps=STEPS))
    code, _, _ = run_toy(plan, store, ToyTrainer(steps=STEPS, poisons=(poison,), forgetful=not protected))
    return seen_of(plan, store, code) | {"same weights": weights(plan, store) == weights(plan, calm)}


def _verify_pair(seen: Seen) -> None:
    assert (seen["exit"], set(seen["states"]), sorted(seen["attempts"])) == (0, {"finished"}, [1, 1, 1, 2])
    assert seen["same weights"]


def _always_failing(place: Path, *, protected: bool) -> Seen:
    """The control lets what a trial raises reach the driver."""
    plan, store = toy_plan(place), Store(place / "runs")
    trainer = ToyTrainer(steps=STEPS, poisons=(Poison(kind="raise", step=7, seed=1),))
    escaping = nullcontext() if protected else mock.patch("workbench.trial.write_error", side_effect=ValueError)
    code, err = None, ""
    with escaping, nullcontext() if protected else suppress(ValueError):
        code, _, err = run_toy(plan, store, trainer, inline=True)
    verdicts = store.results_for(plan).verdicts
    return seen_of(plan, store, code) | {"pairs": [item.n_pairs for item in verdicts], "named": "poisoned" in err}


def _verify_always_failing(seen: Seen) -> None:
    assert seen["exit"] == 1
    assert seen["states"] == ["finished", "finished", "failed", "failed"]
    assert seen["attempts"] == [1, 1, 2, 2]  # it came back the same, so it was not tried a third time
    assert (seen["pairs"], seen["named"]) == ([1], True)


def _left_early(place: Path, *, protected: bool) -> Seen:
    plan, store = toy_plan(place, variants=BASELINE), Store(place / "runs")
    trainer = ToyTrainer(steps=STEPS, poisons=(Poison(kind="exit", step=7, seed=0),))
    caught = failures.classify if protected else lambda _: "worker_lost"
    with mock.patch("workbench.trial.classify", caught):
        code, _, err = run_toy(plan, store, trainer, inline=True)
    return seen_of(plan, store, code) | {"named": "exited" in err}


def _verify_left_early(seen: Seen) -> None:
    assert (seen["exit"], seen["states"], seen["attempts"]) == (1, ["failed", "finished"], [1, 1])
    assert (seen["failures"], seen["named"]) == (["exited"], True)


def _diverging(place: Path, *, protected: bool) -> Seen:
    plan, store = toy_plan(place), Store(place / "runs")
    poison = Poison(kind="nan" if protected else "raise", step=6, seed=1)  # the control: an error, not an outcome
    code, out, _ = run_toy(plan, store, ToyTrainer(steps=STEPS, poisons=(poison,)), inline=True)
    return seen_of(plan, store, code) | {"reported": "diverged" in out}


def _verify_diverging(seen: Seen) -> None:
    assert (seen["exit"], seen["reported"]) == (0, True)
    assert seen["states"] == ["finished", "finished", "diverged", "diverged"]
    assert set(seen["attempts"]) == {1}


def _memory(kind: str):
    def scenario(place: Path, *, protected: bool) -> Seen:
        plan, store = toy_plan(place, variants=BASELINE), Store(place / "runs")
        trainer = ToyTrainer(steps=STEPS, poisons=(Poison(kind=kind, step=7, seed=0),))
        classify = failures.classify if protected else lambda _: "io"
        with mock.patch("workbench.trial.classify", classify):
            code, _, err = run_toy(plan, store, trainer, inline=True)
        return seen_of(plan, store, code) | {"named": "out_of_memory" in err}

    return scenario


def _verify_memory(seen: Seen) -> None:
    assert (seen["exit"], seen["states"], seen["attempts"]) == (1, ["failed", "finished"], [1, 1])
    assert (seen["failures"], seen["named"]) == (["out_of_memory"], True)


def _killed_for_memory(place: Path, *, protected: bool) -> Seen:
    """The kernel kills the process and counts it in the container's memory.events."""
    plan, store = toy_plan(place, variants=BASELINE), Store(place / "runs")
    counts = iter(range(100))
    trainer = ToyTrainer(steps=STEPS, poisons=(Poison(kind="kill", step=7, seed=0),))
    with mock.patch.object(slots, "_killed_for_memory", (lambda: next(counts)) if protected else lambda: 0):
        code, _, err = run_toy(plan, store, trainer)
    return seen_of(plan, store, code) | {"named": "out_of_memory" in err}


def _hanging(place: Path, *, protected: bool) -> Seen:
    """A step never ends. The control waits longer than the test does."""
    poison = Poison(kind="hang", step=7, seed=0, marker=place / "struck")
    plan = toy_plan(place, variants=BASELINE)
    stall = 1.0 if protected else 3600.0
    plan = replace(plan, study=replace(plan.study, execution=replace(plan.study.execution, stall_seconds=stall)))
    store = Store(place / "runs")
    code, _, _ = run_toy(plan, store, ToyTrainer(steps=STEPS, poisons=(poison,)), patience=60.0 if protected else 12.0)
    error = store.trial_dir(plan.trials[0].trial_id) / "error.before_attempt_2.json"
    return seen_of(plan, store, code) | {"where": error.exists() and "time.sleep" in error.read_text()}


def _verify_hanging(seen: Seen) -> None:
    assert (seen["exit"], seen["states"], seen["attempts"]) == (0, ["finished", "finished"], [2, 1])
    assert (seen["failures"], seen["where"]) == (["stalled", None], True)


test_fault, test_control = cases(
    Fault(
        number="F1",
        title="an exception, once",
        expected="second attempt from the checkpoint, reason on record, weights as if nothing had been",
        scenario=_raised_once,
        verify=_verify_resumed("error"),
    ),
    Fault(
        number="F2",
        title="kill -9 of a trial's process",
        expected="as F1",
        scenario=_killed_once,
        verify=_verify_resumed("worker_lost"),
    ),
    Fault(
        number="F28",
        title="a pair of which one trial was killed and tried again",
        expected="both sides of each pair end with the weights of an undisturbed run",
        scenario=_pair_after_retry,
        verify=_verify_pair,
    ),
    Fault(
        number="F3",
        title="a trial that always fails",
        expected="exit 1, the others done, fewer pairs told",
        scenario=_always_failing,
        verify=_verify_always_failing,
    ),
    Fault(
        number="F4",
        title="sys.exit(0) in user code",
        expected="failed (exited), not tried again",
        scenario=_left_early,
        verify=_verify_left_early,
    ),
    Fault(
        number="F5",
        title="loss not finite",
        expected="outcome diverged, one attempt, named in the report",
        scenario=_diverging,
        verify=_verify_diverging,
    ),
    Fault(
        number="F17",
        title="the host's memory runs out",
        expected="failed (out_of_memory), not tried again",
        scenario=_memory("oom"),
        verify=_verify_memory,
    ),
    Fault(
        number="F17b",
        title="the kernel kills a trial because memory runs out",
        expected="as F17",
        scenario=_killed_for_memory,
        verify=_verify_memory,
    ),
    Fault(
        number="F18",
        title="a device's memory runs out",
        expected="failed (out_of_memory), not tried again",
        scenario=_memory("cuda_oom"),
        verify=_verify_memory,
    ),
    Fault(
        number="F24",
        title="a step that never ends",
        expected="ended after the stall time, where it hung on record, second attempt",
        scenario=_hanging,
        verify=_verify_hanging,
    ),
)
