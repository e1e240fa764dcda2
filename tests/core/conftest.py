"""What the tests of the compiled kernel share."""

import pytest

from core.model import sampling


@pytest.fixture
def anew():
    """Choose the kernel again, before and after the test."""
    sampling._kernel.cache_clear()
    yield
    sampling._kernel.cache_clear()
