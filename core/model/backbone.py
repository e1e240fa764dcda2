"""What all backbones share: from uint8 pictures to feature maps of the strides asked for, finest first.

Each normalises the pictures as its weights ask, and sets padding to 0 after that, as DETR does.
The backbones themselves are in `core.model.backbones`.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from core.checkpoint import CheckpointProblem, read_safely
from core.model.folding import is_pointwise
from core.model.initialise import reset_parameters
from core.model.linear import PointwiseConv
from core.paths import is_file
from core.types import may_be_padded

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class WeightsProblem(ValueError):  # noqa: N818 - named as users read it
    """Pretrained weights that are missing or do not fit: says which file, and what to do."""


class Backbone(nn.Module):
    """Shared by all: normalisation, memory format, and He initialisation of convolutions.

    `channels` are those of the maps returned and `strides` their true strides in pixels, finest first: a dilated last
    stage, though called 32 in a config, has 16.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        for module in body.modules():
            if type(module) is nn.Conv2d and is_pointwise(module):
                module.__class__ = PointwiseConv
        self.body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.channels = channels
        self.strides = strides
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, padding_mask: Tensor) -> tuple[Tensor, ...]:
        """Map `images` (B, 3, H, W) uint8 and `padding_mask` (B, H, W) to L maps (B, channels_l, H_l, W_l)."""
        x = (images - self.mean).div_(self.std)
        if may_be_padded(padding_mask):
            x = x.masked_fill_(padding_mask[:, None], 0.0)
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


def true_strides(strides: tuple[int, ...], *, dilation: bool) -> tuple[int, ...]:
    """Return the strides that the stages called `strides` have: 16 for 32 where the last stage is dilated."""
    return tuple(16 if stride == 32 and dilation else stride for stride in strides)


def load_torchvision(body: nn.Module, weights: str, *, architecture: str, new: tuple[str, ...] = ()) -> None:
    """Load torchvision's ImageNet weights (`torchvision`) or a state-dict file in torchvision's names into `body`.

    Tensors that `body` lacks, such as the classifier's, are left aside; those of `body` whose names start with one of
    `new` are no part of the file.

    Raises:
        WeightsProblem: if the file is missing, lacks a tensor, or has one of another shape.
    """
    state = _torchvision_weights(architecture) if weights == "torchvision" else read_state_dict(Path(weights))
    wanted = {key: value for key, value in body.state_dict().items() if not key.startswith(new)}
    missing = sorted(key for key in wanted if key not in state and not key.endswith("num_batches_tracked"))
    if missing:
        raise WeightsProblem(f"{weights}: {len(missing)} tensors of {architecture} are missing, first {missing[0]}")
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            raise WeightsProblem(
                f"{weights}: {key} has shape {list(state[key].shape)}, {architecture} needs {list(value.shape)}; "
                "name a file of this architecture in model.backbone.weights"
            )
    body.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code in the file.

    Raises:
        WeightsProblem: if there is no such file, or it cannot be read safely.
    """
    if not is_file(path):
        raise WeightsProblem(
            f"{path}: no such weights file; set model.backbone.weights to an existing state dict, or to null"
        )
    try:
        state = read_safely(path)
    except CheckpointProblem as problem:
        raise WeightsProblem(str(problem)) from problem
    return state.get("model", state)


def _torchvision_weights(architecture: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(architecture)["IMAGENET1K_V1"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if cached.is_file():
        return read_state_dict(cached)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise WeightsProblem(
            f"{cached}: not found, and downloading {weights.url} failed ({error}). "
            "Put the file there, or set model.backbone.weights to a state-dict file."
        ) from error


def freeze(module: nn.Module) -> None:
    """Let no parameter in `module` train."""
    for parameter in module.parameters():
        parameter.requires_grad = False


def freeze_through(body: nn.Module, last: str) -> None:
    """Freeze every module up to the one named `last`, with all in it; modules are listed in the order of their use."""
    modules = list(body.named_modules())
    inside = [index for index, (name, _) in enumerate(modules) if name == last or name.startswith(f"{last}.")]
    for _, module in modules[: inside[-1] + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
