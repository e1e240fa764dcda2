"""Inputs of deformable attention, its PyTorch form with softmax and offsets, and whether the other can be built."""

import pytest
import torch

from core.model import kernel
from core.model.sampling import locations_around, sample_and_sum_in_torch

SHAPES = ((7, 5), (3, 2), (1, 1))


def _has_compiler():
    try:
        kernel._compiler()
    except kernel.KernelProblem:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler (c++, g++ or clang++)")


def at_locations(*, batch=2, queries=19, heads=2, dim=16, points=2, dtype=torch.float32, spread=1.6, shapes=SHAPES):
    """Values, locations of which some lie outside, and weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in shapes)
    size = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, dim, generator=generator, dtype=dtype)
    locations = (torch.rand(*size, 2, generator=generator, dtype=dtype) - 0.5) * spread + 0.5
    return value, locations, torch.rand(size, generator=generator, dtype=dtype)


def around_references(reference_size, *, dtype=torch.float32, **changes):
    """Values, references, offsets in cells, and logits."""
    value, locations, weights = at_locations(dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(1)
    levels = locations.shape[3]
    reference = torch.rand(*locations.shape[:2], levels, reference_size, generator=generator, dtype=dtype)
    return value, reference, (locations - 0.5) * 4, weights * 6 - 3


def with_gradients(function, value, *others, shapes=SHAPES):
    """Return the output and the gradient of each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, *others)]
    out = function(inputs[0], shapes, *inputs[1:])
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return (out.detach(), *torch.autograd.grad(out, inputs, slope))


def around_in_torch(value, shapes, reference, offsets, logits):
    """Do what `sample_around` does, in the PyTorch form."""
    locations = locations_around(reference, offsets, shapes)
    return sample_and_sum_in_torch(value, shapes, locations, logits.flatten(-2).softmax(-1).view(logits.shape))
