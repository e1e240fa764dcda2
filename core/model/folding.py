"""A convolution and the batch norm after it as one convolution, where the norm is an affine map of each channel.

Frozen batch norm always is one, others where nothing trains: in evaluation mode without gradients. The weights stay as
they are, under their names; what is folded is made anew in every forward pass, and the gradient passes through it.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows
from torchvision.ops import FrozenBatchNorm2d

from core.model.linear import pointwise

AnyNorm = FrozenBatchNorm2d | nn.BatchNorm2d


class _FoldedConv(nn.Conv2d):
    """A convolution that does its norm's work where it can; the norm after it then does nothing."""

    norms: tuple[AnyNorm, ...]  # one, in a tuple: it belongs to the module around both

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        (norm,) = self.norms
        if not _is_affine(norm):
            return self._convolved(input, self.weight, self.bias)
        scale, shift = _affine(norm)
        return self._convolved(input, self.weight * scale[:, None, None, None], shift)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_pointwise(self):
            return pointwise(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _FoldedFrozenNorm(FrozenBatchNorm2d):
    """Frozen batch norm whose work the convolution before it has done."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _FoldedNorm(nn.BatchNorm2d):
    """Batch norm whose work the convolution before it has done, where nothing trains."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return input if _is_affine(self) else super().forward(input)


def fold_norms(body: nn.Module) -> None:
    """Join each bias-free convolution and the norm that is registered right after it, in place.

    For bodies alone in which such a norm is also applied right after, and to nothing else.
    """
    for parent in body.modules():
        for conv, norm in pairwise(parent.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and type(norm) in (FrozenBatchNorm2d, nn.BatchNorm2d):
                conv.__class__ = _FoldedConv
                conv.norms = (norm,)  # type: ignore[assignment]  # checked above
                if isinstance(norm, FrozenBatchNorm2d):
                    norm.__class__ = _FoldedFrozenNorm
                else:
                    norm.__class__ = _FoldedNorm


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is a linear map of each cell's channels."""
    return {*conv.kernel_size, *conv.stride, conv.groups} == {1} and set(conv.padding) == {0}


def _is_affine(norm: AnyNorm) -> bool:
    return isinstance(norm, FrozenBatchNorm2d) or not (norm.training or torch.is_grad_enabled())


def _affine(norm: AnyNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift of each channel."""
    weight, bias, mean, variance = (getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var"))
    scale = weight * (variance + norm.eps).rsqrt()
    return scale, bias - mean * scale
