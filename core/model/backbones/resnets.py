"""Residual networks: a narrow one for the laptop, and torchvision's."""

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody knows
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from core.model.backbone import Backbone, freeze_through, load_torchvision, true_strides
from core.model.folding import fold_norms


class SmallResNet(Backbone):
    """Four stages of one basic block each after a stride-2 stem; `width` x 1, 2, 3, 4 channels at strides 4 to 32.

    `dilation`: the last stage keeps the resolution of the one before, and both of its 3x3 convolutions are dilated.
    """

    def __init__(self, *, width: int, strides: tuple[int, ...], dilation: bool = False) -> None:
        widths = {4 * 2**stage: width * (stage + 1) for stage in range(4)}
        layers: dict[str, nn.Module] = {"stem": _conv_norm_relu(3, width, stride=2)}
        previous = width
        for stride, channels in widths.items():
            if stride > max(strides):
                break
            layers[f"stride{stride}"] = _BasicBlock(previous, channels, dilated=dilation and stride == 32)
            previous = channels
        names = {f"stride{stride}": str(stride) for stride in strides}
        body = IntermediateLayerGetter(nn.ModuleDict(layers), names)
        fold_norms(body)
        super().__init__(
            body, channels=tuple(widths[s] for s in strides), strides=true_strides(strides, dilation=dilation)
        )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a projected shortcut; the first has stride 2, or both are dilated by 2 instead."""

    def __init__(self, channels_in: int, channels_out: int, *, dilated: bool) -> None:
        super().__init__()
        self.stride, dilation = (1, 2) if dilated else (2, 1)
        self.first = _conv_norm_relu(channels_in, channels_out, stride=self.stride, dilation=dilation)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        # A strided 1x1 convolution of few channels in channels-last corrupts memory in torch 2.14's CPU backward.
        # Pooling over single cells is the slice of every second one, in a quarter of the time of its backward.
        shortcut = self.shortcut(F.avg_pool2d(x, 1, self.stride) if self.stride > 1 else x)
        return self.norm(self.second(self.first(x))).add_(self.shortcut_norm(shortcut)).relu_()


def _conv_norm_relu(channels_in: int, channels_out: int, *, stride: int, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class ResNet(Backbone):
    """A torchvision ResNet. Frozen batch norm keeps statistics, scale and shift fixed, as DETR does.

    `dilation`: DETR's DC5, in which the last stage has stride 1 and, but for its first block, dilation 2. No weight
    changes its shape, so those of the undilated network load.
    """

    def __init__(
        self,
        *,
        depth: int,
        frozen_batch_norm: bool,
        frozen_stages: int,
        weights: str | None,
        strides: tuple[int, ...],
        dilation: bool = False,
    ) -> None:
        norm = FrozenBatchNorm2d if frozen_batch_norm else nn.BatchNorm2d
        resnet = torchvision.models.get_model(
            f"resnet{depth}",
            weights=None,
            norm_layer=norm,
            replace_stride_with_dilation=[False, False, dilation],
        )
        layers = {f"layer{stride.bit_length() - 2}": str(stride) for stride in strides}  # stride 4 is layer1
        body = IntermediateLayerGetter(resnet, layers)
        fold_norms(body)
        expansion = 4 if depth >= 50 else 1
        super().__init__(
            body,
            channels=tuple(16 * s * expansion for s in strides),
            strides=true_strides(strides, dilation=dilation),
        )
        self.depth = depth
        self.weights = weights
        stages = [name for name in ("bn1", "layer1", "layer2", "layer3", "layer4")[:frozen_stages] if name in body]
        if stages:
            freeze_through(body, stages[-1])

    def load_pretrained(self) -> None:
        """Load torchvision's ImageNet weights (v1, as DETR) or a state-dict file in torchvision's names."""
        if self.weights is not None:
            load_torchvision(self.body, self.weights, architecture=f"resnet{self.depth}")
