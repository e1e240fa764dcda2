"""Bilinear sampling and weighted sum: the core of deformable attention, in a PyTorch form and a compiled one.

The PyTorch form is the reference, and takes everything. The compiled one (`deformable.cpp`) computes the same on CPUs,
up to the order of sums, several times faster and in a fraction of the memory.
"""

import ctypes
from functools import cache, lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from core.model import kernel
from core.model.kernel import Kernel, KernelProblem

_NAMES = {getattr(torch, name): name for name in kernel.DTYPES}
_COMPUTED_IN = {getattr(torch, value): getattr(torch, other) for value, other in kernel.DTYPES.items()}
_LARGEST = 2**31 - 1  # offsets of values have 31 bits
# Samples a cell from which copying a head's values side by side pays: with 5 it cost a tenth, with 16 on a
# COCO picture it halved the time, on a small one it changed nothing.
_PACKING = 8

used: set[str] = set()
"""Names of the forms that computed something in this process: `torch`, `cpp`."""


def sample_and_sum(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample `value` bilinearly at `locations`, zero outside, and sum with `weights`; the locations' precision holds.

    A location that is not finite makes its output NaN. The compiled form has no second derivatives.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (H, W) of each level.
        locations: (B, Q, M, L, P, 2), (x, y) in [0, 1] of the padded level; cell centres lie at (i + 0.5) / size.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D).

    Raises:
        ValueError: WORKBENCH_KERNEL is none of its values.
        KernelProblem: WORKBENCH_KERNEL=cpp, and the compiled form cannot be had.
    """
    compiled = _compiled(value, spatial_shapes, locations, weights)
    if compiled is None:
        return sample_and_sum_in_torch(value, spatial_shapes, locations, weights)
    return _Compiled.apply(value, locations, weights, None, spatial_shapes, compiled)  # type: ignore[no-any-return]


def sample_around(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Sample as `sample_and_sum`, at `offsets` from `reference`, with the softmax of `logits` over levels and points.

    Making locations and weights apart would cost more time than sampling does (docs/benchmarks.md).

    Args:
        value: (B, S, M, D).
        spatial_shapes: (H, W) of each level.
        reference: (B, Q, L, 2 or 4), in [0, 1] of the padded levels.
        offsets: (B, Q, M, L, P, 2), as in `locations_around`.
        logits: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D) in the higher precision of references and offsets; errors as of `sample_and_sum`.
    """
    precision = torch.promote_types(reference.dtype, offsets.dtype)
    reference, offsets, logits = reference.to(precision), offsets.to(precision), logits.to(precision)
    compiled = _compiled(value, spatial_shapes, offsets, logits, reference)
    if compiled is not None:
        return _Compiled.apply(value, offsets, logits, reference, spatial_shapes, compiled)  # type: ignore[no-any-return]
    locations = locations_around(reference, offsets, spatial_shapes)
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    return sample_and_sum_in_torch(value, spatial_shapes, locations, weights)


def locations_around(reference: Tensor, offsets: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Around a point, offsets count in cells of each level; around a box, P of them reach half its side."""
    anchor = reference[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    if reference.shape[-1] == 2:
        return anchor + offsets * _cell_sides(spatial_shapes, anchor.device, anchor.dtype)
    return anchor[..., :2] + offsets / offsets.shape[-2] * anchor[..., 2:] * 0.5


@lru_cache(maxsize=8)
def _cell_sides(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (w, h) of a cell of each level, (L, 1, 2), as a share of the level."""
    with torch.inference_mode(mode=False):  # they serve training, too
        return torch.tensor([[[1 / width, 1 / height]] for height, width in spatial_shapes], device=device, dtype=dtype)


def sample_and_sum_in_torch(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """Compute `sample_and_sum` with PyTorch's operators alone, on any device."""
    batch, _, num_heads, dim = value.shape
    num_queries = locations.shape[1]
    maps = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
    levels = maps.split([height * width for height, width in spatial_shapes], dim=-1)
    sampled = [
        F.grid_sample(
            level.unflatten(-1, shape), grids[:, :, i], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        for i, (level, shape) in enumerate(zip(levels, spatial_shapes, strict=True))
    ]
    columns = torch.cat(sampled, dim=-1)  # (B*M, D, Q, L*P)
    factors = weights.transpose(1, 2).reshape(batch * num_heads, 1, num_queries, -1)
    summed = (columns * factors).sum(-1)  # (B*M, D, Q)
    return summed.view(batch, num_heads * dim, num_queries).transpose(1, 2)


def _compiled(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    places: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
) -> Kernel | None:
    """Return the compiled form if it takes these inputs; whatever is wrong with them, the PyTorch form will tell."""
    if torch.compiler.is_compiling():
        return None
    inputs = (value, places, weights) if reference is None else (value, places, weights, reference)
    compiled = _kernel() if _fits(inputs, spatial_shapes) else None
    used.add("torch" if compiled is None else "cpp")
    return compiled


def _fits(inputs: tuple[Tensor, ...], spatial_shapes: tuple[tuple[int, int], ...]) -> bool:
    value, places, weights, *reference = inputs
    computed_in = _COMPUTED_IN.get(value.dtype)
    if not all(tensor.is_cpu for tensor in inputs) or any(tensor.dtype != computed_in for tensor in inputs[1:]):
        return False
    if value.ndim != 4 or places.ndim != 6:
        return False
    batch, tokens, heads, dim = value.shape
    expected = (batch, places.shape[1], heads, len(spatial_shapes), places.shape[4], 2)
    return (
        places.shape == expected
        and weights.shape == expected[:-1]
        and all(anchor.shape in {(batch, expected[1], expected[3], size) for size in (2, 4)} for anchor in reference)
        and dim % 4 == 0
        and sum(height * width for height, width in spatial_shapes) == tokens
        and all(height > 0 and width > 0 for height, width in spatial_shapes)
        and tokens * heads * dim <= _LARGEST
    )


@cache
def _kernel() -> Kernel | None:
    return kernel.choose(_check)


def _check(compiled: Kernel) -> None:
    """Compare both forms, forward and backward, on a few numbers: another compiler is another program.

    Raises:
        KernelProblem: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (2, 1))
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        saved_tensors_hooks(_as_it_is, _as_it_is),  # the first call may be within a checkpoint, which counts tensors
    ):
        for dim in (4, 32):
            value = torch.randn(2, 17, 2, dim, generator=generator)
            offsets = torch.randn(2, 9, 2, 2, 2, 2, generator=generator)
            logits = torch.randn(2, 9, 2, 2, 2, generator=generator)
            reference = torch.rand(2, 9, 2, 4, generator=generator)
            inputs = [tensor.requires_grad_() for tensor in (value, offsets, logits, reference)]
            locations = locations_around(reference, offsets, shapes)
            weights = logits.flatten(-2).softmax(-1).view(logits.shape)
            forms = (
                _Compiled.apply(*inputs, shapes, compiled),
                sample_and_sum_in_torch(value, shapes, locations, weights),
            )
            slope = torch.randn(forms[0].shape, generator=generator)
            # (Of a sum, as a gradient that starts from a slope has torch import sympy: a quarter of a second.)
            found, expected = ((form, *torch.autograd.grad((form * slope).sum(), inputs)) for form in forms)
            for one, other in zip(found, expected, strict=True):
                if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
                    raise KernelProblem("the compiled kernel computes other numbers: name another compiler in CXX")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Compiled(torch.autograd.Function):
    """The compiled form, as a differentiable function."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        value: Tensor,
        places: Tensor,
        weights: Tensor,
        reference: Tensor | None,
        spatial_shapes: tuple[tuple[int, int], ...],
        compiled: Kernel,
    ) -> Tensor:
        value, places, weights = value.contiguous(), places.contiguous(), weights.contiguous()
        reference = None if reference is None else reference.contiguous()
        batch, tokens, heads, dim = value.shape
        _, queries, _, levels, points, _ = places.shape
        packed = queries * levels * points >= _PACKING * tokens
        numbers = 0 if reference is None else reference.shape[-1]
        sizes = (ctypes.c_int64 * (9 + 2 * levels))(
            batch, tokens, heads, dim, queries, levels, points, numbers, packed, *chain.from_iterable(spatial_shapes)
        )
        out = places.new_empty(batch, queries, heads * dim)
        _call(compiled.forward[_NAMES[value.dtype]], sizes, value, places, weights, reference, out)
        ctx.save_for_backward(value, places, weights, reference)
        ctx.sizes, ctx.packed, ctx.compiled = sizes, packed, compiled
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, places, weights, reference = ctx.saved_tensors
        make = torch.empty if ctx.packed else torch.zeros
        grad_value = make(value.shape, dtype=places.dtype)
        grad_places, grad_weights = torch.empty_like(places), torch.empty_like(weights)
        grad_reference = None
        if ctx.needs_input_grad[3]:
            batch, queries, heads, levels = places.shape[:4]
            grad_reference = places.new_empty(batch, heads, queries, levels, reference.shape[-1])
        inputs, gradients = (value, places, weights, reference), (grad_value, grad_places, grad_weights, grad_reference)
        _call(ctx.compiled.backward[_NAMES[value.dtype]], ctx.sizes, *inputs, grad.contiguous(), *gradients)
        if grad_reference is not None:
            grad_reference = grad_reference.sum(1)
        return grad_value.to(value.dtype), grad_places, grad_weights, grad_reference, None, None


def _call(function: Any, sizes: Any, *tensors: Tensor | None) -> None:
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    if function(sizes, torch.get_num_threads(), *addresses) != 0:
        raise MemoryError("no memory for deformable attention")
