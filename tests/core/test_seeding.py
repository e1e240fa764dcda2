"""Named random streams."""

import numpy as np
import pytest
import torch

from core.seeding import key, numpy_stream, seeded, torch_stream


def test_streams_depend_on_seed_and_every_name():
    """The same names give the same numbers; another seed or name gives others."""
    keys = {key(0, "a", 1), key(1, "a", 1), key(0, "a", 2), key(0, "b", 1), key(0, "a"), key(0, "a", 1, "x")}
    assert len(keys) == 6
    assert np.array_equal(numpy_stream(3, "order", 1).permutation(50), numpy_stream(3, "order", 1).permutation(50))
    first, second = (torch.rand(5, generator=torch_stream(3, "loss", 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_seeded_block_restores_the_generators():
    """Inside, numbers depend on the names alone; outside, nothing has happened."""
    before = torch.get_rng_state()
    with seeded(1, "init", "x"):
        first = torch.rand(3)
    with seeded(1, "init", "x"):
        second = torch.rand(3)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_generators_are_restored_after_an_error_too():
    """What is raised in a seeded block leaves nothing behind."""
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shape"), seeded(1, "x"):
        torch.rand(3).view(2)
    assert torch.equal(before, torch.get_rng_state())
