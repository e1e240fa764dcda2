"""A convolution that does the work of the batch norm after it."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from core.model.folding import fold_norms


def _body(norm, *, kernel=3):
    """A convolution, its norm, and a ReLU in place, as they stand in a residual network."""
    generator = torch.Generator().manual_seed(1)
    conv = nn.Conv2d(4, 6, kernel, padding=kernel // 2, bias=False)
    body = nn.Sequential(OrderedDict(conv1=conv, bn1=norm(6), relu=nn.ReLU(inplace=True)))
    with torch.no_grad():
        for name, value in sorted(body.state_dict().items()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator).abs() + ("var" in name))
    return body


def _pair(norm, **changes):
    """Return the body as it was, and folded."""
    plain = _body(norm, **changes)
    folded = copy.deepcopy(plain)
    fold_norms(folded)
    return plain, folded


IMAGES = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_frozen_norm_is_folded_while_training(kernel):
    """Outputs and the gradient of the convolution are those of both in turn."""
    plain, folded = _pair(FrozenBatchNorm2d, kernel=kernel)
    maps = plain.conv1(IMAGES)
    assert folded.bn1(maps) is maps
    outputs = [body(IMAGES) for body in (plain, folded)]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad((output * IMAGES.mean()).square().sum(), body.conv1.weight)[0]
        for output, body in zip(outputs, (plain, folded), strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0.1


def test_batch_norm_is_folded_where_nothing_trains_alone():
    """In evaluation without gradients; in training its statistics move and its weights learn, as ever."""
    plain, folded = _pair(nn.BatchNorm2d)
    for body in (plain, folded):
        body.train()(IMAGES).sum().backward()
    torch.testing.assert_close(folded.bn1.running_mean, plain.bn1.running_mean)
    torch.testing.assert_close(folded.bn1.weight.grad, plain.bn1.weight.grad)
    torch.testing.assert_close(folded.eval()(IMAGES), plain.eval()(IMAGES))
    maps = plain.conv1(IMAGES)
    assert folded.bn1(maps) is not maps
    with torch.no_grad():
        assert folded.bn1(maps) is maps
        torch.testing.assert_close(folded(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_names_stay_and_a_copy_is_folded_with_its_own_norm(norm):
    """A checkpoint of either loads into the other; the averaged copy of a model has statistics of its own."""
    plain, folded = _pair(norm)
    assert list(folded.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(folded)
    with torch.no_grad():
        twin.bn1.bias.add_(1.0)
        before = folded.eval()(IMAGES)
        assert (twin.eval()(IMAGES) - before).abs().max() > 0.5
        folded.load_state_dict(twin.state_dict())
        torch.testing.assert_close(folded(IMAGES), twin(IMAGES))


def test_what_does_not_stand_together_is_left_alone():
    """A norm before its convolution, and a convolution with a bias, stay as they are."""
    body = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1))
    kinds = [type(module) for module in body]
    fold_norms(body)
    assert [type(module) for module in body] == kinds
