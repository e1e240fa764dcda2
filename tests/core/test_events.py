"""Events and their JSON form, also as earlier versions wrote it."""

import json

import pytest

from core.events import EpochFinished, StepsTaken, from_json, to_json

NEW = ("data_share", "skipped_steps")
SHARED = {
    "step": 6,
    "losses": {"total": 2.5},
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "pictures_per_s": 90.0,
    "seconds": 1.5,
    "data_share": 0.25,
    "skipped_steps": 1,
}
EVENTS = [StepsTaken(epoch=0.5, **SHARED), EpochFinished(epoch=1, peak_memory_bytes=2**29, metrics={}, **SHARED)]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_survive_json(event):
    """What is written is read back equal."""
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_of_earlier_versions_are_read(event):
    """A record from before the share of waiting was measured says that it is unknown, and that no step was skipped."""
    plain = {key: value for key, value in to_json(event).items() if key not in NEW}
    old = from_json(plain)
    assert (old.data_share, old.skipped_steps) == (None, 0)
    assert old.grad_norm == event.grad_norm
