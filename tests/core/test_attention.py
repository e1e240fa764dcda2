"""Deformable attention against the formula of its paper."""

import math

import pytest
import torch

from core.model.attention import DeformableAttention, SelfAttention, sample_and_sum

SHAPES = ((5, 4), (3, 2))


def _inputs(*, num_points=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, tokens, 3, 4, generator=generator, dtype=dtype)
    locations = torch.rand(2, 6, 3, len(SHAPES), num_points, 2, generator=generator, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(2, 6, 3, len(SHAPES), num_points, generator=generator, dtype=dtype)
    return value, locations, weights


def _oracle(value, locations, weights):
    """Sum weight times bilinear value, one query, head, level and point at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                start = 0
                for level in range(levels):
                    height, width = SHAPES[level]
                    for p in range(points):
                        x = float(locations[b, q, m, level, p, 0]) * width - 0.5
                        y = float(locations[b, q, m, level, p, 1]) * height - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                                    token = start + row * width + column
                                    out[b, q, m] += weights[b, q, m, level, p] * share * value[b, token, m]
                    start += height * width
    return out.flatten(2)


def test_sampling_equals_a_loop_over_every_point():
    """The vectorised form equals the formula, also for points outside the picture."""
    value, locations, weights = _inputs()
    torch.testing.assert_close(sample_and_sum(value, SHAPES, locations, weights), _oracle(value, locations, weights))


def test_sampling_passes_gradcheck():
    """Gradients for values, locations and weights equal numerical ones in float64."""
    inputs = [tensor.requires_grad_() for tensor in _inputs(num_points=1)]
    assert torch.autograd.gradcheck(lambda v, at, w: sample_and_sum(v, SHAPES, at, w), inputs)


def _attention():
    module = DeformableAttention(dim=16, num_heads=4, num_levels=2, num_points=3)
    module.reset_parameters()
    return module


def test_offsets_start_on_squares_around_the_reference():
    """Each head starts in its own direction, point p at p + 1 cells, the same on every level; weights are equal."""
    module = _attention()
    offsets = module.sampling_offsets.bias.view(4, 2, 3, 2)
    assert module.sampling_offsets.weight.abs().max() == 0
    torch.testing.assert_close(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    torch.testing.assert_close(offsets[1, 0, 0], torch.tensor([0.0, 1.0]))
    assert module.attention_weights.weight.abs().max() == 0


@pytest.mark.parametrize("size", [2, 4])
def test_padding_has_no_influence(size):
    """What lies in masked tokens changes nothing."""
    module = _attention()
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(1, 26, 16, generator=generator)
    query = torch.randn(1, 5, 16, generator=generator)
    reference = torch.rand(1, 5, 2, size, generator=generator)
    padding = torch.zeros(1, 26, dtype=torch.bool)
    padding[:, 3::4] = True
    changed = torch.where(padding[..., None], memory + 100, memory)
    torch.testing.assert_close(
        module(query, reference, memory, padding, SHAPES), module(query, reference, changed, padding, SHAPES)
    )


def test_box_references_scale_the_offsets():
    """With a box, an offset of P reaches half the box's side from its centre."""
    module = _attention()
    reference = torch.tensor([[[[0.5, 0.5, 0.2, 0.4]] * 2]])[:, :, None, :, None]
    offsets = torch.full((1, 1, 4, 2, 3, 2), 3.0)
    located = module._locations(reference, offsets, SHAPES)
    torch.testing.assert_close(located[0, 0, 0, 0, 0], torch.tensor([0.6, 0.7]))


def test_blocked_queries_are_not_seen():
    """A query that may not be attended to does not influence the others."""
    module = SelfAttention(dim=8, num_heads=2, dropout=0.0)
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    blocked = torch.zeros(4, 4, dtype=torch.bool)
    blocked[:3, 3] = True
    changed = x.clone()
    changed[:, 3] += 5
    position = torch.zeros_like(x)
    torch.testing.assert_close(module(x, position, blocked)[:, :3], module(changed, position, blocked)[:, :3])
