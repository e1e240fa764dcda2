"""Backbones: strides and channels, what is frozen, pretrained weights."""

import pytest
import torch
from pydantic import ValidationError
from torchvision.models import resnet18, swin_v2_t
from torchvision.ops import StochasticDepth

from core import config as c
from core.config import ModelConfig
from core.model.backbone import WeightsProblem
from core.model.backbones.resnets import ResNet, SmallResNet
from core.model.backbones.swin_v2 import SwinV2
from core.model.backbones.timm_extractor import Timm
from core.model.initialise import initialise

NOTHING_PADDED = torch.zeros(2, 64, 96, dtype=torch.bool)


def _images(seed=0):
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _resnet(**changes):
    return ResNet(
        **{
            "depth": 18,
            "frozen_batch_norm": True,
            "frozen_stages": 2,
            "weights": None,
            "strides": (8, 16, 32),
            **changes,
        }
    )


def _swin(**changes):
    return SwinV2(**{"size": "tiny", "frozen_stages": 0, "weights": None, "strides": (4, 8, 16, 32), **changes})


def _timm(**changes):
    defaults = {"name": "tf_efficientnet_lite0", "frozen_batch_norm": True, "frozen_stages": 3, "weights": None}
    return Timm(**{**defaults, "strides": (8, 16, 32), **changes})


def _named(name, **changes):
    return _timm(**{"name": name, "frozen_stages": 0, **changes})


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        pytest.param(lambda: SmallResNet(width=16, strides=(8, 16, 32)), (32, 48, 64), id="small"),
        pytest.param(lambda: SmallResNet(width=8, strides=(4, 16)), (8, 24), id="small, two strides"),
        pytest.param(_resnet, (128, 256, 512), id="resnet18"),
        pytest.param(lambda: _resnet(depth=50, strides=(4, 32)), (256, 2048), id="resnet50, two strides"),
        pytest.param(_timm, (40, 112, 320), id="efficientnet_lite0"),
        pytest.param(_swin, (96, 192, 384, 768), id="swin_v2_t"),
        pytest.param(lambda: _swin(strides=(8, 16)), (192, 384), id="swin_v2_t, two strides"),
        pytest.param(lambda: _named("convnext_atto"), (80, 160, 320), id="convnext"),
        pytest.param(lambda: _named("mobilenetv3_small_050"), (16, 24, 288), id="mobilenetv3"),
        pytest.param(lambda: _named("vit_tiny_patch16_224", strides=(16,)), (192,), id="vit"),
        pytest.param(lambda: _named("swin_tiny_patch4_window7_224", strides=(8, 32)), (192, 768), id="channels last"),
    ],
)
def test_maps_have_the_strides_and_channels_that_are_told(build, channels):
    """Each map is smaller than the picture by its stride, with the channels that the backbone declares."""
    backbone = build().eval()
    maps = backbone(_images(), NOTHING_PADDED)
    assert backbone.channels == channels == tuple(level.shape[1] for level in maps)
    scales = [64 // level.shape[2] for level in maps]
    assert scales == sorted(scales)
    assert scales == list(backbone.strides)
    assert all(level.shape[3] * scale == 96 for level, scale in zip(maps, scales, strict=True))


@pytest.mark.parametrize(
    ("build", "last"),
    [
        pytest.param(lambda dilation: SmallResNet(width=8, strides=(16, 32), dilation=dilation), 32, id="small"),
        pytest.param(lambda dilation: _resnet(depth=50, strides=(16, 32), dilation=dilation), 2048, id="resnet50"),
        pytest.param(lambda dilation: _timm(strides=(16, 32), dilation=dilation), 320, id="efficientnet_lite0"),
        pytest.param(lambda dilation: _named("resnet18", strides=(16, 32), dilation=dilation), 512, id="timm resnet18"),
    ],
)
def test_a_dilated_last_stage_keeps_its_resolution_and_its_weights(build, last):
    """The stage called 32 has stride 16 and looks further; the undilated network's weights load without a leftover."""
    plain, dilated = build(dilation=False).eval(), build(dilation=True).eval()
    initialise(plain, seed=0)
    dilated.load_state_dict(plain.state_dict())
    assert (plain.strides, dilated.strides) == ((16, 32), (16, 16))
    images = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 96, 160, dtype=torch.bool)
    (same, coarse), (also, fine) = plain(images, mask), dilated(images, mask)
    torch.testing.assert_close(same, also)
    assert coarse.shape == (1, last, 3, 5)
    assert fine.shape == (1, last, 6, 10)
    spread = any(m.dilation == (2, 2) for m in dilated.modules() if isinstance(m, torch.nn.Conv2d))
    assert spread
    assert not any(m.dilation == (2, 2) for m in plain.modules() if isinstance(m, torch.nn.Conv2d))


def test_a_stage_that_is_not_there_cannot_be_dilated():
    """Dilation without the last stage would change nothing, so the config is refused with the remedy."""
    with pytest.raises(ValidationError, match=r"add 32 to strides \[8, 16\] or set it to false"):
        ModelConfig(backbone=c.SmallResNet(dilation=True), strides=(8, 16))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: SmallResNet(width=8, strides=(8, 16, 32)), id="small"),
        pytest.param(_resnet, id="resnet18"),
        pytest.param(_swin, id="swin_v2_t"),
        pytest.param(lambda: _named("convnext_atto"), id="convnext: layer scales"),
        pytest.param(lambda: _named("vit_tiny_patch16_224", strides=(16,)), id="vit: position embedding"),
    ],
)
def test_starting_weights_depend_on_the_seed_alone(build):
    """Nothing that a constructor drew is left, and every tensor that is drawn differs from seed to seed."""

    def start(state, seed):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            backbone = build()
            initialise(backbone, seed=seed)
        return backbone.state_dict()

    first, again, other = start(1, 0), start(2, 0), start(1, 5)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    drawn = {name for name, value in first.items() if value.is_floating_point() and value.unique().numel() > 1}
    fixed = {name for name in drawn if "relative_coords" in name}  # a table of distances
    assert len(drawn - fixed) > 10
    assert [name for name in drawn - fixed if torch.equal(first[name], other[name])] == []


def test_swin_starts_as_torchvisions():
    """Linear maps of spread .02 with zero bias, position perceptrons included; every attention is scaled by 10."""
    backbone = _swin()
    initialise(backbone, seed=0)
    linear = {n: m for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)}
    assert any("cpb_mlp" in name for name in linear)
    assert all(module.weight.std().item() == pytest.approx(0.02, rel=0.15) for module in linear.values())
    assert not any(module.bias.any() for module in linear.values() if module.bias is not None)
    scales = [value for name, value in backbone.named_parameters() if name.endswith("logit_scale")]
    assert len(scales) == 12
    assert all(torch.allclose(value.exp(), torch.full_like(value, 10.0)) for value in scales)


@pytest.mark.parametrize(("height", "width"), [(33, 70), (64, 96), (101, 40)])
def test_swin_takes_any_size(height, width):
    """Pictures that neither patches nor windows divide give maps of ceil(side / stride), finite and of unit scale."""
    backbone = _swin().eval()
    initialise(backbone, seed=0)
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    maps = backbone(images, torch.zeros(1, height, width, dtype=torch.bool))
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]
    assert all(level.std().item() == pytest.approx(1.0, abs=0.1) for level in maps)


def test_frozen_swin_stages_are_counted_from_the_patch_embedding():
    """Three frozen stages are the embedding and two stages with their merging, without stochastic depth."""
    backbone = _swin(frozen_stages=3)
    trained = {name.split(".")[2] for name, p in backbone.named_parameters() if "features" in name and p.requires_grad}
    assert trained == {"4", "5", "6", "7"}
    frozen = {name for name, p in _swin(frozen_stages=1).named_parameters() if not p.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"0"}
    rates = {name.split(".")[2]: m.p for name, m in backbone.named_modules() if isinstance(m, StochasticDepth)}
    assert rates["1"] == rates["3"] == 0.0 < rates["5"] < rates["7"] == pytest.approx(0.2)
    initialise(backbone, seed=0)
    sum(level.square().mean() for level in backbone.train()(_images(), NOTHING_PADDED)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


def test_swin_reads_torchvisions_names(tmp_path):
    """A weights file gives every stage its tensors; the norms of the maps are new and stay at one and zero."""
    source = swin_v2_t()
    torch.save(source.state_dict(), tmp_path / "swin.pt")
    backbone = _swin(weights=str(tmp_path / "swin.pt"), strides=(8, 16))
    initialise(backbone, seed=0)
    backbone.load_pretrained()
    loaded = backbone.body.state_dict()
    kept = {name for name in loaded if name.startswith("features.")}
    assert all(torch.equal(loaded[name], source.state_dict()[name]) for name in kept)
    assert {name: value.unique().tolist() for name, value in loaded.items() if name not in kept} == {
        **{f"norms.{level}.weight": [1.0] for level in (0, 1)},
        **{f"norms.{level}.bias": [0.0] for level in (0, 1)},
    }
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "part.pt")
    with pytest.raises(WeightsProblem, match="tensors of swin_v2_t are missing, first features"):
        _swin(weights=str(tmp_path / "part.pt")).load_pretrained()


def test_a_tensor_of_another_shape_is_named(tmp_path):
    """A file of another architecture is refused with the first tensor that differs and both shapes."""
    torch.save({**resnet18().state_dict(), "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "grey.pt")
    with pytest.raises(WeightsProblem, match=r"conv1.weight has shape \[64, 1, 7, 7\], resnet18 needs \[64, 3, 7, 7\]"):
        _resnet(weights=str(tmp_path / "grey.pt")).load_pretrained()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet81", {}, "timm has no such model; did you mean resnet18"),
        ("vit_tiny_patch16_224", {}, "has strides .16, 16.* not all of .8, 16, 32.: change model.strides"),
        ("mixer_s32_224", {"strides": (32,)}, "cannot be a backbone: on a picture of 64 x 96 it fails"),
        ("swin_tiny_patch4_window7_224", {"dilation": True}, "cannot be dilated: set model.backbone.dilation to false"),
        ("dla34", {"dilation": True}, "cannot be dilated"),
        ("resnet18", {"frozen_stages": 9}, "has 5 stages, so 9 cannot be frozen"),
    ],
)
def test_timm_models_that_cannot_serve_are_refused_in_words(name, changes, message):
    """When it is built, not in the middle of a training, and with what to change."""
    with pytest.raises(ValueError, match=message):
        _named(name, **changes)


def test_a_timm_model_for_whole_strides_says_so():
    """One that needs sides divisible by 32 names them and the remedy when it meets others."""
    backbone = _named("dla34")
    backbone(_images(), NOTHING_PADDED)
    with pytest.raises(ValueError, match=r"dla34 takes pictures whose sides are multiples of 32, not 65 x 96"):
        backbone(torch.zeros(1, 3, 65, 96, dtype=torch.uint8), torch.zeros(1, 65, 96, dtype=torch.bool))


def test_frozen_stages_do_not_train():
    """Two frozen stages are the stem and layer1; frozen batch norm has no parameters at all."""
    backbone = _resnet()
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert not any("bn" in name for name, _ in backbone.named_parameters())


def test_frozen_timm_stages_are_counted_from_the_input():
    """Three frozen stages of EfficientNet-Lite are the stem and blocks 0 to 2; the last stages train."""
    backbone = _timm()
    trained = {name.split(".")[2] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"3", "4", "5", "6"}
    convnext = _named("convnext_atto", frozen_stages=2)  # timm names its stages with dots, the extractor without
    trained = {name.split(".")[1] for name, p in convnext.named_parameters() if p.requires_grad}
    assert trained == {"stages_2", "stages_3"}


def test_padding_is_zero_after_normalisation():
    """What lies under the padding mask does not matter."""
    backbone = SmallResNet(width=8, strides=(8,)).eval()
    mask = NOTHING_PADDED.clone()
    mask[:, :, 64:] = True
    images = _images()
    changed = images.clone()
    changed[..., 64:] = 255
    assert torch.equal(backbone(images, mask)[0], backbone(changed, mask)[0])


def test_a_state_dict_in_torchvision_names_is_loaded(tmp_path):
    """A weights file gives the backbone exactly its tensors; the classifier in it is left aside."""
    path = tmp_path / "resnet18.pt"
    source = resnet18()
    torch.save(source.state_dict(), path)
    backbone = _resnet(weights=str(path))
    backbone.load_pretrained()
    loaded = backbone.body.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such weights file"),
        ({"conv1.weight": torch.zeros(1)}, "tensors of resnet18 are missing, first bn1.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, content, message):
    """A missing or incomplete file is named, with what to do."""
    path = tmp_path / "weights.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsProblem, match=message):
        _resnet(weights=str(path)).load_pretrained()


def test_the_wheel_brings_imagenet_weights():
    """The packaged EfficientNet-Lite0 weights fit, and freezing batch norm keeps their statistics."""
    backbone = _timm(weights="package")
    before = backbone.body.state_dict()["conv_stem.weight"].clone()
    backbone.load_pretrained()
    after = backbone.body.state_dict()
    assert not torch.equal(before, after["conv_stem.weight"])
    assert after["bn1.running_var"].max() > 1.5  # a fresh batch norm has 1
    maps = backbone.train()(_images(), NOTHING_PADDED)
    assert all(torch.isfinite(level).all() for level in maps)
    assert torch.equal(after["bn1.running_mean"], backbone.body.state_dict()["bn1.running_mean"])


@pytest.mark.parametrize("width", [4, 6, 8])
def test_gradients_of_few_channels_equal_those_of_the_plain_memory_format(width):
    """Channels-last changes no gradient, also with few channels (a strided 1x1 convolution there corrupted memory)."""
    backbone = SmallResNet(width=width, strides=(8, 16, 32))
    initialise(backbone, seed=0)  # fixed: now and then rounding moves an activation across the kink of the ReLU
    gradients = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        backbone.zero_grad()
        backbone.body.to(memory_format=memory_format)
        x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)).contiguous(
            memory_format=memory_format
        )
        sum(level.square().sum() for level in backbone.body(x).values()).backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3 * float(second.abs().max()))
