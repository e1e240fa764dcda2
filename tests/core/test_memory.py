"""What a process keeps and gives back."""

import gc
import resource
import sys
import weakref

import pytest
import torch

from core.memory import keep_freed_memory, reset_peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as on Linux")
def test_freed_memory_serves_the_next_step():
    """A block of 20 MB that is freed and asked for again comes from what the process holds, not page by page."""
    keep_freed_memory()
    for _ in range(3):
        torch.ones(5_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(5_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500  # from the system: 4,883 each


class _Cycle:
    def __init__(self):
        self.own = self


def test_what_a_trial_leaves_in_a_cycle_is_freed_before_the_next():
    """Also where the collector was told to pass it over."""
    left = _Cycle()
    gone = weakref.ref(left)
    gc.freeze()
    del left
    reset_peak_memory(torch.device("cpu"))
    assert gone() is None
