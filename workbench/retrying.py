"""When a trial is tried again, and whether the others may begin: decided from the records alone, on any machine."""

import time
from pathlib import Path
from typing import Literal

from workbench import attempts, lease
from workbench.failures import may_pass
from workbench.processes import Process
from workbench.store import Store

LONGEST_PAUSE_SECONDS = 60.0
_POLL_SECONDS = 0.1


def own_attempts(store: Store, trial_id: str, driver: Process) -> list[attempts.Attempt]:
    """Return the attempts at a trial that a driver has made, oldest first."""
    return [attempt for attempt in attempts.read(store.trial_dir(trial_id)) if attempt.driver == driver]


def at_work(store: Store, trial_id: str, driver: Process) -> bool:
    """Tell whether a process that a driver has asked for works on a trial now."""
    own = own_attempts(store, trial_id, driver)
    return bool(own) and own[-1].running(store.trial_dir(trial_id))


def given_up(store: Store, trial_id: str, driver: Process, *, retries: int) -> bool:
    """Tell whether a trial has failed under this driver and is not to be tried again."""
    own = own_attempts(store, trial_id, driver)
    if not own or own[-1].outcome != "failed":
        return False
    earlier, error = store.errors(trial_id)
    return len(own) > retries or error is None or not may_pass(error, earlier if len(own) > 1 else None)


def try_again(store: Store, trial_id: str, driver: Process, *, retries: int, stop: Path) -> bool:
    """Say whether a trial that has just been tried is to be tried again now, after a pause that grows."""
    own = own_attempts(store, trial_id, driver)
    if not own or own[-1].outcome != "failed" or given_up(store, trial_id, driver, retries=retries):
        return False
    until = time.monotonic() + min(LONGEST_PAUSE_SECONDS, 2.0 ** (len(own) - 1))
    while time.monotonic() < until:
        if stop.exists():
            return False
        time.sleep(_POLL_SECONDS)
    return True


def canary_says(store: Store, trial_id: str, driver: Process, *, retries: int) -> Literal["wait", "go", "stop"]:
    """Say whether the other trials may begin, by what the first one has come to under this driver."""
    folder = store.trial_dir(trial_id)
    tried = attempts.read(folder)
    if not tried:
        return "wait"
    last = tried[-1]
    own = [attempt for attempt in tried if attempt.driver == driver]
    stepped = any(lease.pulses(attempts.beat_file(folder, attempt.number)) for attempt in own)
    elsewhere = last.driver != driver and last.running(folder)
    if stepped or elsewhere or last.outcome in ("finished", "diverged"):
        return "go"
    return "stop" if given_up(store, trial_id, driver, retries=retries) else "wait"
