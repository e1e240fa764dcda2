"""Linear maps of single precision on a CPU through oneDNN.

Torch leaves them to MKL, which runs at half the speed on AMD's processors. Both compute the same sums, in another
order.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

LEAST_PRODUCTS = 2_000_000  # of a map; below, the shorter call of MKL wins
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FastLinear(nn.Linear):
    """Torch's linear map, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Map (..., C) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """A convolution whose kernel is one cell, as a linear map of each cell's channels."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Map (B, C, H, W) to (B, out_channels, H, W)."""
        return pointwise(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x` (..., C) times the transposed `weight` (D, C), plus `bias` (D,) or None: (..., D)."""
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    product = _Linear.apply(rows, weight, bias) if torch.is_grad_enabled() else _product(rows, weight, bias)
    return product.view(*x.shape[:-1], len(weight))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of `x` (B, C, H, W) with `weight` (D, C, 1, 1): (B, D, H, W).

    A kernel of one cell has nothing to dilate, but what is dilated torch gives to oneDNN.
    """
    return F.conv2d(x, weight, bias, dilation=2 if _suits(x, weight) else 1)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN is to compute this."""
    return (
        AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() * len(weight) >= LEAST_PRODUCTS
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The product of rows (N, C) and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        (gradient,) = gradients
        return (
            _product(gradient, weight.t()) if needs_x else None,
            _product(gradient.t(), x.t()) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )
