"""Linear maps through oneDNN equal torch's own."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from core.model import linear as fast
from core.model.linear import FastLinear, PointwiseConv, linear, pointwise

SIZES = {"above the threshold": 120, "below": 20}  # rows of 150 x 150 products


def _inputs(rows, *, transposed=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, 150, generator=generator)
    x = x.transpose(0, 1) if transposed else x
    weight, bias = torch.randn(150, 150, generator=generator), torch.randn(150, generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def _with_gradients(function, inputs):
    """Return the output and the gradients of all inputs that need one."""
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    output = function(*inputs)
    factors = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return output, *torch.autograd.grad((output * factors).sum(), leaves)


@pytest.mark.parametrize("available", [True, False], ids=["oneDNN", "without it"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_the_map_and_its_gradients_equal_torch(rows, transposed, available, monkeypatch):
    """Also of strided inputs, and where this torch has no oneDNN."""
    monkeypatch.setattr(fast, "AVAILABLE", available and fast.AVAILABLE)
    inputs = _inputs(rows, transposed=transposed)
    for found, expected in zip(_with_gradients(linear, inputs), _with_gradients(F.linear, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    """Frozen weights and inputs cost nothing, and a map may have no bias."""
    x, weight, bias = _inputs(120)
    inputs = {"x": (x.detach(), weight, bias), "weight": (x, weight.detach(), bias), "bias": (x, weight, None)}[frozen]
    for found, expected in zip(_with_gradients(linear, inputs), _with_gradients(F.linear, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3)


def test_modules_equal_torch_without_gradients():
    """`FastLinear` and `PointwiseConv` are torch's modules in all but speed."""
    x = _inputs(120)[0].detach()
    module = FastLinear(150, 90)
    conv = PointwiseConv(150, 90, 1)
    image = x.view(2, 150, 4, 30)
    with torch.no_grad():
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(conv(image), F.conv2d(image, conv.weight, conv.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "side"), [(3, 50), (64, 30), (7, 3)])
def test_a_pointwise_convolution_and_its_gradients_equal_torch(channels, side, memory_format):
    """With few channels and many, large and small, in both memory formats; outputs can be changed in place."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, channels, side, side, generator=generator).contiguous(memory_format=memory_format)
    weight = torch.randn(130, channels, 1, 1, generator=generator).requires_grad_()
    inputs = (x.requires_grad_(), weight, torch.randn(130, generator=generator).requires_grad_())
    found = _with_gradients(lambda *each: pointwise(*each).relu_(), inputs)
    expected = _with_gradients(lambda *each: F.conv2d(*each).relu(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_other_precisions_are_left_to_torch():
    """Autocast lowers the map as always, and float64 stays float64."""
    x, weight, bias = _inputs(120)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
