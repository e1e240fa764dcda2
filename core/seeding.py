"""One seed, many independent named streams: a toggle that draws more numbers shifts nobody else's.

The only place that seeds torch's global generators.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key(seed: int, *names: str | int) -> int:
    """Return 63 bits that depend on the seed and on every name."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") >> 1


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return a numpy generator of its own for this seed and these names."""
    return np.random.default_rng(key(seed, *names))


def torch_stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator of its own for this seed and these names."""
    return torch.Generator(device).manual_seed(key(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seed torch's global generators within the block, for code that accepts no generator; restore them after."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():  # else nothing on a GPU has drawn or is about to
        generators.extend(torch.cuda.default_generators)
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(key(seed, *names))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
