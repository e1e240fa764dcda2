"""The compiled form of deformable attention computes the numbers of the PyTorch form.

Tolerances are shares of the largest number of a tensor: 1e-5 in fp32 and 1e-12 in fp64.
"""

import sys
from pathlib import Path

import pytest
import torch
from kernels import SHAPES, around_in_torch, around_references, at_locations, needs_compiler, with_gradients
from torch.utils.checkpoint import checkpoint

from core.model import sampling
from core.model.sampling import sample_and_sum, sample_and_sum_in_torch, sample_around


@pytest.fixture
def compiled(anew, monkeypatch):
    """Insist on the compiled form, and see that nothing but it has computed."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "cpp")
    monkeypatch.setattr(sampling, "used", set())
    yield
    assert sampling.used == {"cpp"}


def _assert_near(found, expected, share):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=share * float(other.abs().max()))


@needs_compiler
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 24, 32, 64, 128])
def test_compiled_form_equals_the_pytorch_form(compiled, dim, dtype, share):
    """Output and all gradients agree, whatever the width of a head."""
    inputs = at_locations(dim=dim, dtype=dtype)
    expected = with_gradients(sample_and_sum_in_torch, *inputs)
    _assert_near(with_gradients(sample_and_sum, *inputs), expected, share)


@needs_compiler
@pytest.mark.parametrize("points", [1, 3, 4])
@pytest.mark.parametrize("queries", [1, 16, 100, 300])
def test_any_number_of_queries_and_points_will_do(compiled, queries, points):
    """Few samples a cell, many (the values of a head are then copied first), and parts of a block: all agree."""
    inputs = at_locations(queries=queries, points=points, dtype=torch.float64)
    expected = with_gradients(sample_and_sum_in_torch, *inputs)
    _assert_near(with_gradients(sample_and_sum, *inputs), expected, 1e-12)


@needs_compiler
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("queries", [5, 200])
@pytest.mark.parametrize("size", [2, 4])
def test_sampling_around_references_equals_the_pytorch_form(compiled, size, queries, dtype, share):
    """Softmax, offsets from points and boxes and all gradients agree, those of the references included."""
    inputs = around_references(size, queries=queries, dtype=dtype)
    expected = with_gradients(around_in_torch, *inputs)
    _assert_near(with_gradients(sample_around, *inputs), expected, share)


@needs_compiler
def test_softmax_stands_great_differences(compiled):
    """Logits far apart give weights 1 and 0, and the gradients that belong to them."""
    value, reference, offsets, logits = around_references(4)
    inputs = value, reference, offsets, logits * 100
    _assert_near(with_gradients(sample_around, *inputs), with_gradients(around_in_torch, *inputs), 1e-5)


@needs_compiler
@pytest.mark.parametrize("queries", [3, 40])
def test_gradients_equal_numerical_ones(compiled, queries):
    """In fp64 gradcheck passes for values, locations and weights."""
    shapes = ((3, 2), (1, 2))
    inputs = at_locations(batch=1, heads=1, dim=4, points=1, queries=queries, dtype=torch.float64, shapes=shapes)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda v, at, w: sample_and_sum(v, shapes, at, w), inputs)


@needs_compiler
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_around_references_equal_numerical_ones(compiled, size):
    """In fp64 gradcheck passes for values, references, offsets and logits."""
    inputs = [
        tensor.requires_grad_()
        for tensor in around_references(size, batch=1, heads=2, dim=4, queries=3, dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(lambda v, r, o, w: sample_around(v, SHAPES, r, o, w), inputs)


@needs_compiler
@pytest.mark.parametrize("queries", [300, 20])
def test_results_do_not_depend_on_threads_or_luck(compiled, queries):
    """Two runs, with one thread and with two, agree to the last bit."""
    inputs = around_references(4, batch=3, heads=4, points=8, queries=queries * (1 if queries > 100 else 8))
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(with_gradients(sample_around, *inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs the libgomp that torch brings on Linux")
def test_threads_are_those_of_torch(compiled):
    """The compiled form finds torch's pool of threads, and brings no OpenMP library of its own."""
    sample_and_sum(*at_locations()[:1], SHAPES, *at_locations()[1:])
    assert sampling._kernel().has_threads
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if "omp.so" in line}
    assert len(loaded) <= 1


@needs_compiler
def test_borders_and_far_away_equal_the_pytorch_form(compiled):
    """On cell centres, between cells, on and beyond the level's border, and anywhere outside, both forms agree."""
    places = torch.tensor([-1e30, -40.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.5, 1.0, 3.5, 4.0, 4.25, 4.5, 5.0, 1e30])
    x = ((places.double() + 0.5) / 5).clamp(-1e30, 1e30)
    grid = torch.cartesian_prod(x, x)[None, :, None, None, None]
    value = torch.randn(1, 25, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = value, grid, torch.ones(grid.shape[:-1], dtype=torch.float64)
    found, expected = (
        with_gradients(form, *inputs, shapes=((5, 5),)) for form in (sample_and_sum, sample_and_sum_in_torch)
    )
    _assert_near(found[:2] + found[3:], expected[:2] + expected[3:], 1e-12)
    inside = ((places + 0.5) % 1 != 0.5) & (places.abs() < 1e3)  # elsewhere the slope jumps
    smooth = torch.cartesian_prod(inside, inside).all(-1)
    _assert_near([found[2][:, smooth]], [expected[2][:, smooth]], 1e-12)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("queries", [4, 200])
def test_a_location_that_is_not_finite_shows(compiled, bad, queries):
    """Its output and its own gradients are NaN, as training must notice; all other numbers are as they would be."""
    value, locations, weights = at_locations(queries=queries)
    spoilt = locations.clone()
    spoilt[1, 2, 1, 0, 0, 0] = bad
    found, expected = (with_gradients(sample_and_sum, value, at, weights) for at in (spoilt, locations))
    head = (1, 2, slice(16, 32))
    assert found[0][head].isnan().all()
    assert found[3][1, 2, 1, 0, 0].isnan()
    assert found[2][1, 2, 1, 0, 0].isnan().any()
    assert found[1].isfinite().all()
    rest = torch.ones_like(found[0], dtype=torch.bool)
    rest[head] = False
    assert torch.equal(found[0][rest], expected[0][rest])
    assert sample_and_sum_in_torch(value, SHAPES, spoilt, weights)[head].isnan().all()


@needs_compiler
@pytest.mark.parametrize("changes", [{"queries": 0}, {"batch": 0}])
def test_nothing_asked_gives_nothing(compiled, changes):
    """Without queries or pictures the output is empty and the values get gradient zero."""
    inputs = around_references(4, **changes)
    out, *gradients = with_gradients(sample_around, *inputs)
    assert out.shape == (*inputs[1].shape[:2], 32)
    assert [one.shape for one in gradients] == [one.shape for one in inputs]
    assert not gradients[0].any()


@needs_compiler
def test_inputs_may_lie_anyhow_in_memory(compiled):
    """Views that are not contiguous give the numbers of their copies."""
    inputs = around_references(4)
    views = [
        torch.stack([tensor, tensor + 1], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs
    ]
    assert not any(view.is_contiguous() for view in views)
    found, expected = with_gradients(sample_around, *views), with_gradients(sample_around, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_compiler
@pytest.mark.parametrize("dim", [4, 8, 16, 32])
@pytest.mark.parametrize("queries", [3, 200])
def test_bf16_values_are_summed_in_fp32(compiled, dim, queries):
    """As in the PyTorch form, values in bf16 count as their fp32 equals; only their gradient is rounded to bf16."""
    value, *others = around_references(2, dim=dim, queries=queries)
    value = value.bfloat16()
    found = with_gradients(sample_around, value, *others)
    expected = with_gradients(sample_around, value.float(), *others)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(found[2:], expected[2:], strict=True))


@needs_compiler
def test_offsets_in_bf16_count_as_fp32(compiled):
    """Under autocast the linear layers give bf16; the references' precision holds."""
    value, reference, offsets, logits = around_references(4)
    offsets, logits = offsets.bfloat16(), logits.bfloat16()
    found = sample_around(value.bfloat16(), SHAPES, reference, offsets, logits)
    expected = around_in_torch(value.bfloat16(), SHAPES, reference, offsets.float(), logits.float())
    _assert_near([found], [expected], 1e-5)


@needs_compiler
def test_recomputing_in_the_backward_pass_changes_nothing(compiled):
    """Activation checkpointing gives the same gradients, also where the kernel is first used within it."""
    inputs = around_references(4)
    direct = with_gradients(sample_around, *inputs)
    sampling._kernel.cache_clear()
    again = with_gradients(lambda *given: checkpoint(sample_around, *given, use_reentrant=False), *inputs)
    assert all(torch.equal(one, other) for one, other in zip(again, direct, strict=True))


@needs_compiler
def test_a_second_derivative_is_refused(compiled):
    """The compiled form says that it has none, instead of giving a wrong one."""
    value, locations, weights = (tensor.requires_grad_() for tensor in at_locations())
    out = sample_and_sum(value, SHAPES, locations, weights)
    (slope,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dim": 6}, "heads of 6"),
        ({"dtype": torch.float16}, "fp16"),
    ],
)
def test_what_the_compiled_form_does_not_take_runs_in_pytorch(anew, monkeypatch, change, why):
    """Other widths and dtypes run in the PyTorch form, even where the compiled one is insisted on."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "cpp")
    monkeypatch.setattr(sampling, "used", set())
    value, locations, weights = at_locations(**change)
    found = sample_and_sum(value, SHAPES, locations, weights)
    torch.testing.assert_close(found, sample_and_sum_in_torch(value, SHAPES, locations, weights))
    assert sampling.used == {"torch"}, why


@needs_compiler
def test_wrong_shapes_are_refused_as_ever(anew):
    """Levels that do not fit the values never reach the compiled form, which would read beyond them."""
    value, locations, weights = at_locations()
    with pytest.raises(RuntimeError):
        sample_and_sum(value, ((7, 5), (3, 2), (9, 9)), locations, weights)


def test_torch_compile_traces_the_pytorch_form(anew):
    """A model that is compiled as a whole keeps working: there the PyTorch form is what is compiled."""
    inputs = at_locations(batch=1, queries=3)
    traced = torch.compile(lambda v, at, w: sample_and_sum(v, SHAPES, at, w), backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*inputs), sample_and_sum_in_torch(inputs[0], SHAPES, *inputs[1:]))
