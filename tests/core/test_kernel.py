"""The compiled form of deformable attention against the PyTorch form; and where and how it is built.

Tolerances are shares of the largest number of a tensor: 1e-5 in fp32 and 1e-12 in fp64.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from core.model import kernel, sampling
from core.model.sampling import (
    locations_around,
    sample_and_sum,
    sample_and_sum_in_torch,
    sample_around,
)

ROOT = Path(__file__).parents[2]
SHAPES = ((7, 5), (3, 2), (1, 1))
TOKENS = sum(h * w for h, w in SHAPES)


def _has_compiler():
    try:
        kernel._compiler()
    except kernel.KernelProblem:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler (c++, g++ or clang++)")


@pytest.fixture
def anew():
    """Choose the kernel again, before and after the test."""
    sampling._kernel.cache_clear()
    yield
    sampling._kernel.cache_clear()


@pytest.fixture
def compiled(anew, monkeypatch):
    """Insist on the compiled form, and see that nothing but it has computed."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "cpp")
    monkeypatch.setattr(sampling, "used", set())
    yield
    assert sampling.used == {"cpp"}


def _inputs(*, batch=2, queries=19, heads=2, dim=16, points=2, dtype=torch.float32, spread=1.6, shapes=SHAPES):
    """Values, locations of which some lie outside, and weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in shapes)
    size = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, dim, generator=generator, dtype=dtype)
    locations = (torch.rand(*size, 2, generator=generator, dtype=dtype) - 0.5) * spread + 0.5
    return value, locations, torch.rand(size, generator=generator, dtype=dtype)


def _around(reference_size, *, dtype=torch.float32, **changes):
    """Values, references, offsets in cells, and logits."""
    value, locations, weights = _inputs(dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(1)
    levels = locations.shape[3]
    reference = torch.rand(*locations.shape[:2], levels, reference_size, generator=generator, dtype=dtype)
    return value, reference, (locations - 0.5) * 4, weights * 6 - 3


def _with_gradients(function, value, *others, shapes=SHAPES):
    """Return the output and the gradient of each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, *others)]
    out = function(inputs[0], shapes, *inputs[1:])
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return (out.detach(), *torch.autograd.grad(out, inputs, slope))


def _around_in_torch(value, shapes, reference, offsets, logits):
    locations = locations_around(reference, offsets, shapes)
    return sample_and_sum_in_torch(value, shapes, locations, logits.flatten(-2).softmax(-1).view(logits.shape))


def _assert_near(found, expected, share):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=share * float(other.abs().max()))


@needs_compiler
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 24, 32, 64, 128])
def test_compiled_form_equals_the_pytorch_form(compiled, dim, dtype, share):
    """Output and all gradients agree, whatever the width of a head."""
    inputs = _inputs(dim=dim, dtype=dtype)
    expected = _with_gradients(sample_and_sum_in_torch, *inputs)
    _assert_near(_with_gradients(sample_and_sum, *inputs), expected, share)


@needs_compiler
@pytest.mark.parametrize("points", [1, 3, 4])
@pytest.mark.parametrize("queries", [1, 16, 100, 300])
def test_any_number_of_queries_and_points_will_do(compiled, queries, points):
    """Few samples a cell, many (the values of a head are then copied first), and parts of a block: all agree."""
    inputs = _inputs(queries=queries, points=points, dtype=torch.float64)
    expected = _with_gradients(sample_and_sum_in_torch, *inputs)
    _assert_near(_with_gradients(sample_and_sum, *inputs), expected, 1e-12)


@needs_compiler
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("queries", [5, 200])
@pytest.mark.parametrize("size", [2, 4])
def test_sampling_around_references_equals_the_pytorch_form(compiled, size, queries, dtype, share):
    """Softmax, offsets from points and boxes and all gradients agree, those of the references included."""
    inputs = _around(size, queries=queries, dtype=dtype)
    expected = _with_gradients(_around_in_torch, *inputs)
    _assert_near(_with_gradients(sample_around, *inputs), expected, share)


@needs_compiler
def test_softmax_stands_great_differences(compiled):
    """Logits far apart give weights 1 and 0, and the gradients that belong to them."""
    value, reference, offsets, logits = _around(4)
    inputs = value, reference, offsets, logits * 100
    _assert_near(_with_gradients(sample_around, *inputs), _with_gradients(_around_in_torch, *inputs), 1e-5)


@needs_compiler
@pytest.mark.parametrize("queries", [3, 40])
def test_gradients_equal_numerical_ones(compiled, queries):
    """In fp64 gradcheck passes for values, locations and weights."""
    shapes = ((3, 2), (1, 2))
    inputs = _inputs(batch=1, heads=1, dim=4, points=1, queries=queries, dtype=torch.float64, shapes=shapes)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda v, at, w: sample_and_sum(v, shapes, at, w), inputs)


@needs_compiler
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_around_references_equal_numerical_ones(compiled, size):
    """In fp64 gradcheck passes for values, references, offsets and logits."""
    inputs = [
        tensor.requires_grad_() for tensor in _around(size, batch=1, heads=2, dim=4, queries=3, dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(lambda v, r, o, w: sample_around(v, SHAPES, r, o, w), inputs)


@needs_compiler
@pytest.mark.parametrize("queries", [300, 20])
def test_results_do_not_depend_on_threads_or_luck(compiled, queries):
    """Two runs, with one thread and with two, agree to the last bit."""
    inputs = _around(4, batch=3, heads=4, points=8, queries=queries * (1 if queries > 100 else 8))
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(_with_gradients(sample_around, *inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs the libgomp that torch brings on Linux")
def test_threads_are_those_of_torch(compiled):
    """The compiled form finds torch's pool of threads, and brings no OpenMP library of its own."""
    sample_and_sum(*_inputs()[:1], SHAPES, *_inputs()[1:])
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
        _with_gradients(form, *inputs, shapes=((5, 5),)) for form in (sample_and_sum, sample_and_sum_in_torch)
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
    value, locations, weights = _inputs(queries=queries)
    spoilt = locations.clone()
    spoilt[1, 2, 1, 0, 0, 0] = bad
    found, expected = (_with_gradients(sample_and_sum, value, at, weights) for at in (spoilt, locations))
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
    inputs = _around(4, **changes)
    out, *gradients = _with_gradients(sample_around, *inputs)
    assert out.shape == (*inputs[1].shape[:2], 32)
    assert [one.shape for one in gradients] == [one.shape for one in inputs]
    assert not gradients[0].any()


@needs_compiler
def test_inputs_may_lie_anyhow_in_memory(compiled):
    """Views that are not contiguous give the numbers of their copies."""
    inputs = _around(4)
    views = [
        torch.stack([tensor, tensor + 1], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs
    ]
    assert not any(view.is_contiguous() for view in views)
    found, expected = _with_gradients(sample_around, *views), _with_gradients(sample_around, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_compiler
@pytest.mark.parametrize("dim", [4, 8, 16, 32])
@pytest.mark.parametrize("queries", [3, 200])
def test_bf16_values_are_summed_in_fp32(compiled, dim, queries):
    """As in the PyTorch form, values in bf16 count as their fp32 equals; only their gradient is rounded to bf16."""
    value, *others = _around(2, dim=dim, queries=queries)
    value = value.bfloat16()
    found = _with_gradients(sample_around, value, *others)
    expected = _with_gradients(sample_around, value.float(), *others)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(found[2:], expected[2:], strict=True))


@needs_compiler
def test_offsets_in_bf16_count_as_fp32(compiled):
    """Under autocast the linear layers give bf16; the references' precision holds."""
    value, reference, offsets, logits = _around(4)
    offsets, logits = offsets.bfloat16(), logits.bfloat16()
    found = sample_around(value.bfloat16(), SHAPES, reference, offsets, logits)
    expected = _around_in_torch(value.bfloat16(), SHAPES, reference, offsets.float(), logits.float())
    _assert_near([found], [expected], 1e-5)


@needs_compiler
def test_recomputing_in_the_backward_pass_changes_nothing(compiled):
    """Activation checkpointing gives the same gradients, also where the kernel is first used within it."""
    inputs = _around(4)
    direct = _with_gradients(sample_around, *inputs)
    sampling._kernel.cache_clear()
    again = _with_gradients(lambda *given: checkpoint(sample_around, *given, use_reentrant=False), *inputs)
    assert all(torch.equal(one, other) for one, other in zip(again, direct, strict=True))


@needs_compiler
def test_a_second_derivative_is_refused(compiled):
    """The compiled form says that it has none, instead of giving a wrong one."""
    value, locations, weights = (tensor.requires_grad_() for tensor in _inputs())
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
    value, locations, weights = _inputs(**change)
    found = sample_and_sum(value, SHAPES, locations, weights)
    torch.testing.assert_close(found, sample_and_sum_in_torch(value, SHAPES, locations, weights))
    assert sampling.used == {"torch"}, why


@needs_compiler
def test_wrong_shapes_are_refused_as_ever(anew):
    """Levels that do not fit the values never reach the compiled form, which would read beyond them."""
    value, locations, weights = _inputs()
    with pytest.raises(RuntimeError):
        sample_and_sum(value, ((7, 5), (3, 2), (9, 9)), locations, weights)


def test_torch_compile_traces_the_pytorch_form(anew):
    """A model that is compiled as a whole keeps working: there the PyTorch form is what is compiled."""
    inputs = _inputs(batch=1, queries=3)
    traced = torch.compile(lambda v, at, w: sample_and_sum(v, SHAPES, at, w), backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*inputs), sample_and_sum_in_torch(inputs[0], SHAPES, *inputs[1:]))


def test_a_wrong_choice_is_an_error(anew, monkeypatch):
    """WORKBENCH_KERNEL has three values, and the error names them."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "fast")
    with pytest.raises(ValueError, match="WORKBENCH_KERNEL: found 'fast', allowed are auto, torch, cpp"):
        sample_and_sum(_inputs()[0], SHAPES, *_inputs()[1:])


def test_the_pytorch_form_can_be_chosen(anew, monkeypatch, capfd):
    """WORKBENCH_KERNEL=torch computes exactly the PyTorch form and says nothing."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "torch")
    monkeypatch.setattr(sampling, "used", set())
    inputs = _around(4)
    found, expected = _with_gradients(sample_around, *inputs), _with_gradients(_around_in_torch, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert sampling.used == {"torch"}
    assert capfd.readouterr() == ("", "")


def _compiler_that_fails(folder):
    script = folder / "broken-c++"
    script.write_text("#!/bin/sh\necho 'no room on the moon' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    return str(script)


PROBLEMS = {
    "none": ({"PATH": "", "CXX": ""}, "no C++ compiler: install one"),
    "misnamed": ({"CXX": "c+++"}, "CXX names 'c+++', which is not there"),
    "broken": ({"CXX": "{broken}"}, "fails: repair it, or name another in CXX"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_without_a_working_compiler_the_pytorch_form_runs_and_one_line_says_so(
    anew, monkeypatch, tmp_path, capfd, problem
):
    """Nothing fails; the line says what to do, and is printed once a process."""
    environment, message = PROBLEMS[problem]
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(broken=_compiler_that_fails(tmp_path)))
    inputs = _inputs()
    for _ in range(2):
        torch.testing.assert_close(
            sample_and_sum(inputs[0], SHAPES, *inputs[1:]), sample_and_sum_in_torch(inputs[0], SHAPES, *inputs[1:])
        )
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_insisting_shows_what_the_compiler_says(anew, monkeypatch, tmp_path):
    """WORKBENCH_KERNEL=cpp is an error where the compiled form cannot be built."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", _compiler_that_fails(tmp_path))
    with pytest.raises(kernel.KernelProblem, match=r"(?s)WORKBENCH_KERNEL=cpp: .*no room on the moon"):
        sample_and_sum(_inputs()[0], SHAPES, *_inputs()[1:])


def _quick_compiler(folder, *, change="s/^//"):
    """Return a compiler that does not optimise, of sources that `change` (a program of sed) has been applied to."""
    script = folder / "quick-c++"
    script.write_text(
        "#!/bin/sh\n"
        f"copy=$(mktemp -d '{folder}/copy-XXXXXX')\n"
        f"cp '{kernel.SOURCES[0]}' \"$copy\"\n"
        f"sed '{change}' '{kernel.SOURCES[1]}' > \"$copy/{kernel.SOURCES[1].name}\"\n"
        'for word do shift; case "$word" in *.cpp) word="$copy/${word##*/}";; esac; set -- "$@" "$word"; done\n'
        f'exec {" ".join(kernel._compiler())} "$@" -O0\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_a_kernel_that_computes_wrongly_is_not_used(anew, monkeypatch, tmp_path, capfd):
    """A compiler whose program gives other numbers is found out before anything is trained with it."""
    monkeypatch.setenv("CXX", _quick_compiler(tmp_path, change="s/- T(0.5)/- T(0.4)/"))
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sampling._kernel() is None
    assert "computes other numbers" in capfd.readouterr().err


_CHOOSE = "from core.model.kernel import choose; print(choose(lambda kernel: None) is not None)"


@needs_compiler
def test_processes_may_build_it_at_once(tmp_path):
    """Trials that start together all get it, and leave one whole library in the cache, which the next one loads."""
    folder = tmp_path / "cache"
    changes = {"XDG_CACHE_HOME": str(folder), "WORKBENCH_KERNEL": "cpp", "CXX": _quick_compiler(tmp_path)}

    def start():
        command, environment = [sys.executable, "-c", _CHOOSE], os.environ | changes
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    assert [process.communicate(timeout=100) for process in [start(), start()]] == [("True\n", "")] * 2
    (left,) = (folder / "detr-ablation-workbench" / "kernels").iterdir()
    written = left.stat().st_mtime_ns
    assert start().communicate(timeout=100) == ("True\n", "")
    assert left.stat().st_mtime_ns == written
    left.write_bytes(b"\x7fELF")
    assert start().communicate(timeout=100) == ("True\n", ""), "a library that is not whole is built anew"
    assert left.stat().st_size > 1000


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, capfd):
    """The kernel is then built for this process alone, and one line says so."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", _quick_compiler(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    assert kernel.choose(lambda _: None) is not None
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "compiled anew for each process" in said
