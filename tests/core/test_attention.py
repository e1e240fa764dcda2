"""Deformable attention against the formula of its paper."""

import math
from dataclasses import replace

import pytest
import torch

from core.model.attention import (
    DeformableAttention,
    DenseAttention,
    SelfAttention,
    WindowAttention,
)
from core.model.sampling import locations_around, sample_and_sum
from core.types import Memory

SHAPES = ((5, 4), (3, 2))
TOKENS = sum(h * w for h, w in SHAPES)


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


def _attention(**changes):
    module = DeformableAttention(**{"dim": 16, "num_heads": 4, "num_levels": 2, "num_points": 3, **changes})
    module.reset_parameters()
    return module


def _memory(*, padded=(), batch=1, shapes=SHAPES):
    """Random tokens with random positions; `padded` are the tokens that are padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = sum(h * w for h, w in shapes)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[:, list(padded)] = True
    return Memory(
        tokens=torch.randn(batch, tokens, 16, generator=generator),
        position=torch.randn(batch, tokens, 16, generator=generator),
        padding_mask=padding,
        spatial_shapes=shapes,
        valid_ratios=torch.ones(batch, len(shapes), 2),
        layers=(),
    )


KINDS = {
    "deformable": _attention,
    "own_level": lambda: _attention(own_level=True),
    "dense": lambda: DenseAttention(dim=16, num_heads=4, dropout=0.0),
    "window": lambda: WindowAttention(dim=16, num_heads=4, radius=1),
}


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
@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence(kind, size):
    """What lies in padded tokens changes nothing for the others, whatever the attention."""
    module = KINDS[kind]()
    memory = _memory(padded=range(3, TOKENS, 4))
    changed = replace(memory, tokens=torch.where(memory.padding_mask[..., None], memory.tokens + 100, memory.tokens))
    reference = torch.rand(1, TOKENS, size, generator=torch.Generator().manual_seed(2))
    content = torch.randn(1, TOKENS, 16, generator=torch.Generator().manual_seed(3))
    outputs = [module(content, memory.position, reference, seen) for seen in (memory, changed)]
    torch.testing.assert_close(*outputs)


def test_own_level_equals_single_level_attention_on_each_level():
    """Without attention across levels, each level behaves as if it were the only one."""
    memory = _memory(batch=2)
    module = _attention(own_level=True)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.2, generator=torch.Generator().manual_seed(4))
    reference = torch.rand(2, TOKENS, 2, generator=torch.Generator().manual_seed(2))
    whole = module(memory.tokens, memory.position, reference, memory)
    single = _attention(num_levels=1)
    single.load_state_dict(module.state_dict())
    start = 0
    for level, (height, width) in enumerate(SHAPES):
        part = slice(start, start + height * width)
        alone = replace(
            memory,
            tokens=memory.tokens[:, part],
            position=memory.position[:, part],
            padding_mask=memory.padding_mask[:, part],
            spatial_shapes=(SHAPES[level],),
            valid_ratios=memory.valid_ratios[:, level : level + 1],
        )
        expected = single(alone.tokens, alone.position, reference[:, part], alone)
        torch.testing.assert_close(whole[:, part], expected)
        start = part.stop


def test_dense_attention_equals_its_formula():
    """Softmax of scaled products over all tokens that are not padding; positions join queries and keys, not values."""
    module = KINDS["dense"]()
    memory = _memory(padded=(0, 25))
    content = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
    position = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    weights, biases = module.in_proj_weight.split(16), module.in_proj_bias.split(16)
    inputs = (content + position, memory.tokens + memory.position, memory.tokens)
    query, key, value = (
        torch.nn.functional.linear(x, w, b).unflatten(-1, (4, 4)).transpose(1, 2)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    scores = (query @ key.transpose(-1, -2)) / 2
    scores[..., [0, 25]] = -torch.inf
    expected = module.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(content, position, None, memory), expected)


@pytest.mark.parametrize("radius", [1, 2])
def test_window_attention_equals_masked_dense_attention(radius):
    """A token sees the cells at most `radius` rows and columns away on its own level, and nothing else."""
    module = WindowAttention(dim=16, num_heads=4, radius=radius)
    memory = _memory(padded=(1, 22))
    cells = [(level, row, column) for level, (h, w) in enumerate(SHAPES) for row in range(h) for column in range(w)]
    near = torch.tensor(
        [[a[0] == b[0] and abs(a[1] - b[1]) <= radius and abs(a[2] - b[2]) <= radius for b in cells] for a in cells]
    )
    near[:, [1, 22]] = False
    query, key, value = (
        projection(x).unflatten(-1, (4, 4)).transpose(1, 2)
        for projection, x in (
            (module.query_proj, memory.tokens + memory.position),
            (module.key_proj, memory.tokens + memory.position),
            (module.value_proj, memory.tokens),
        )
    )
    scores = ((query @ key.transpose(-1, -2)) / 2).masked_fill(~near, -torch.inf)
    expected = module.output_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    actual = module(memory.tokens, memory.position, None, memory)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_box_references_scale_the_offsets():
    """With a box, an offset of P reaches half the box's side from its centre."""
    reference = torch.tensor([[[[0.5, 0.5, 0.2, 0.4]] * 2]])
    offsets = torch.full((1, 1, 4, 2, 3, 2), 3.0)
    located = locations_around(reference, offsets, SHAPES)
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
