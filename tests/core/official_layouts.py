"""The published tensor names and shapes of the official models, written from their layout and not from our mapping.

As instantiated from facebookresearch/detr (29901c5) and fundamentalvision/Deformable-DETR (11169a6). Batch norm is
frozen there, so its four buffers are stored and nothing counts batches.
"""

import argparse
import math
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from core import detector, official

DIM, HEADS, POINTS, LAYERS, CLASSES = 256, 8, 4, 6, 91
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def detr(depth=50):
    """458 tensors with ResNet-50; DC5 has the same."""
    shapes = resnet(depth) | {"input_proj.weight": (DIM, 2048, 1, 1), "input_proj.bias": (DIM,)}
    shapes |= {"query_embed.weight": (100, DIM)} | linear("class_embed", CLASSES + 1, DIM) | box_head("bbox_embed")
    for layer in range(LAYERS):
        encoder, decoder = f"transformer.encoder.layers.{layer}", f"transformer.decoder.layers.{layer}"
        shapes |= dense(f"{encoder}.self_attn") | feed_forward(encoder, 2048) | norms(encoder, "norm1", "norm2")
        shapes |= dense(f"{decoder}.self_attn") | dense(f"{decoder}.multihead_attn")
        shapes |= feed_forward(decoder, 2048) | norms(decoder, "norm1", "norm2", "norm3")
    return shapes | norms("transformer.decoder", "norm")


def deformable(depth=50, *, levels=4, refine=False, two_stage=False):
    """561 tensors with ResNet-50, 549 at a single scale (DC5 has the same), 597 refined, 630 in two stages."""
    shapes = resnet(depth) | {"transformer.level_embed": (levels, DIM)}
    inputs = [(512, 1), (1024, 1), (2048, 1), (2048, 3)] if levels == 4 else [(2048, 1)]
    for level, (channels, kernel) in enumerate(inputs):
        shapes |= {
            f"input_proj.{level}.0.weight": (DIM, channels, kernel, kernel),
            f"input_proj.{level}.0.bias": (DIM,),
        }
        shapes |= norms(f"input_proj.{level}", "1")
    for layer in range(LAYERS):
        encoder, decoder = f"transformer.encoder.layers.{layer}", f"transformer.decoder.layers.{layer}"
        shapes |= sampling(f"{encoder}.self_attn", levels) | feed_forward(encoder, 1024)
        shapes |= norms(encoder, "norm1", "norm2")
        shapes |= sampling(f"{decoder}.cross_attn", levels) | dense(f"{decoder}.self_attn")
        shapes |= feed_forward(decoder, 1024) | norms(decoder, "norm1", "norm2", "norm3")
    for head in range(LAYERS + two_stage):
        shapes |= linear(f"class_embed.{head}", CLASSES, DIM) | box_head(f"bbox_embed.{head}")
        if refine:
            shapes |= box_head(f"transformer.decoder.bbox_embed.{head}")
        if two_stage:
            shapes |= linear(f"transformer.decoder.class_embed.{head}", CLASSES, DIM)
    if two_stage:
        shapes |= linear("transformer.enc_output", DIM, DIM) | norms("transformer", "enc_output_norm")
        shapes |= linear("transformer.pos_trans", 2 * DIM, 2 * DIM) | norms(
            "transformer", "pos_trans_norm", dim=2 * DIM
        )
    else:
        shapes |= {"query_embed.weight": (300, 2 * DIM)} | linear("transformer.reference_points", 2, DIM)
    return shapes


def resnet(depth):
    """A torchvision ResNet without its classifier, with frozen batch norm."""
    root = "backbone.0.body"
    shapes = {f"{root}.conv1.weight": (64, 3, 7, 7)} | batch_norm(f"{root}.bn1", 64)
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f"{root}.layer{stage + 1}.{block}"
            shapes |= {f"{name}.conv1.weight": (width, channels, 1, 1), f"{name}.conv2.weight": (width, width, 3, 3)}
            shapes |= {f"{name}.conv3.weight": (4 * width, width, 1, 1)}
            for norm, size in (("bn1", width), ("bn2", width), ("bn3", 4 * width)):
                shapes |= batch_norm(f"{name}.{norm}", size)
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * width, channels, 1, 1)}
                shapes |= batch_norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
    return shapes


def batch_norm(name, size):
    """Four buffers."""
    return {f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}


def linear(name, rows, columns):
    """Weight and bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norms(name, *norm_names, dim=DIM):
    """Weight and bias of normalisations."""
    return {f"{name}.{norm}.{part}": (dim,) for norm in norm_names for part in ("weight", "bias")}


def feed_forward(name, hidden):
    """Two linear maps."""
    return linear(f"{name}.linear1", hidden, DIM) | linear(f"{name}.linear2", DIM, hidden)


def box_head(name):
    """A perceptron of three layers."""
    return (
        linear(f"{name}.layers.0", DIM, DIM) | linear(f"{name}.layers.1", DIM, DIM) | linear(f"{name}.layers.2", 4, DIM)
    )


def dense(name):
    """Torch's MultiheadAttention."""
    inputs = {f"{name}.in_proj_weight": (3 * DIM, DIM), f"{name}.in_proj_bias": (3 * DIM,)}
    return inputs | linear(f"{name}.out_proj", DIM, DIM)


def sampling(name, levels):
    """Deformable attention."""
    samples = HEADS * levels * POINTS
    maps = linear(f"{name}.sampling_offsets", 2 * samples, DIM) | linear(f"{name}.attention_weights", samples, DIM)
    return maps | linear(f"{name}.value_proj", DIM, DIM) | linear(f"{name}.output_proj", DIM, DIM)


def filled(shapes, *, seed=0):
    """Draw random values of a scale at which the output depends on the picture; copies of a tensor share their values.

    Without refinement (no copies in the decoder) all layers share one head.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = "transformer.decoder.bbox_embed.0.layers.0.weight" not in shapes and "class_embed.0.weight" in shapes
    state = {}
    for name, shape in shapes.items():
        original = name.removeprefix("transformer.decoder.") if "_embed." in name else name
        if shared and original.split(".")[0] in ("class_embed", "bbox_embed"):
            head, _, rest = original.split(".", 2)
            original = f"{head}.0.{rest}"
        if original in state:
            state[name] = state[original]
        else:
            state[name] = torch.randn(shape, generator=generator)
            if name in ("query_embed.weight", "transformer.level_embed"):
                pass  # embeddings are standard normal
            elif len(shape) > 1:
                state[name] *= math.sqrt(2 / math.prod(shape[1:]))
            else:
                state[name] *= 0.02
                state[name] += name.endswith(("weight", "running_var"))  # norms and variances are near one
                state[name] *= 0.2 if name.endswith("bn3.weight") else 1.0  # so that residual blocks add little
    return state


@cache
def _shapes_only(config, num_classes):
    with torch.device("meta"):
        return detector.build_detector(config, num_classes=num_classes, seed=0)


def _built(config, *, num_classes, seed):
    if torch.get_default_device().type == "meta":
        return _shapes_only(config, num_classes)
    return detector.build_detector(config, num_classes=num_classes, seed=seed)


@contextmanager
def quick_builds():
    """Build the models that files are compared with once each, and draw no starting weights, which files replace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "build_detector", _built)
        patch.setattr("core.model.build.initialise", lambda *_, **__: None)
        for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "uniform_", "normal_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        yield


def training_file(state):
    """Wrap a state dict as the official training scripts do: with the optimiser's state and their options."""
    args = argparse.Namespace(lr=1e-4, backbone="resnet50", masks=False, frozen_weights=None, device="cuda")
    return {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 49, "args": args}
