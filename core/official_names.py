"""The published tensor names of facebookresearch/detr and fundamentalvision/Deformable-DETR, from our own.

Each of our tensors has one official name, or several where the official code stores it more than once. So what a file
must hold follows from our model; the published key lists, written down without this table, are in the tests.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from core.config import ModelConfig

Renaming = tuple[tuple[str, str], ...]

# Ours to official, the first pattern that matches whole. {layers} is the number of decoder layers.
COMMON: Renaming = (
    (r"backbone\.body\.(.+)", r"backbone.0.body.\1"),
    (r"encoder\.layers\.(\d+)\.attention\.(.+)", r"transformer.encoder.layers.\1.self_attn.\2"),
    (r"encoder\.layers\.(\d+)\.norm\.(.+)", r"transformer.encoder.layers.\1.norm1.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.norm\.(.+)", r"transformer.encoder.layers.\1.norm2.\2"),
    (r"decoder\.layers\.(\d+)\.feed_forward\.norm\.(.+)", r"transformer.decoder.layers.\1.norm3.\2"),
    (r"(encoder|decoder)\.layers\.(\d+)\.feed_forward\.(.+)", r"transformer.\1.layers.\2.\3"),
    (r"decoder\.layers\.(\d+)\.self_attention\.(.+)", r"transformer.decoder.layers.\1.self_attn.\2"),
)
DETR: Renaming = (
    *COMMON,
    (r"neck\.projections\.0\.0\.(.+)", r"input_proj.\1"),
    (r"decoder\.layers\.(\d+)\.cross_attention\.(.+)", r"transformer.decoder.layers.\1.multihead_attn.\2"),
    (r"decoder\.layers\.(\d+)\.norm_self\.(.+)", r"transformer.decoder.layers.\1.norm1.\2"),
    (r"decoder\.layers\.(\d+)\.norm_cross\.(.+)", r"transformer.decoder.layers.\1.norm2.\2"),
    (r"decoder\.norm\.(.+)", r"transformer.decoder.norm.\1"),
    (r"decoder\.box_head\.mlps\.0\.hidden\.layers\.(\d)\.(.+)", r"bbox_embed.layers.\1.\2"),
    (r"decoder\.box_head\.mlps\.0\.last\.(.+)", r"bbox_embed.layers.2.\1"),
    (r"class_heads\.0\.(.+)", r"class_embed.\1"),
    (r"query_sources\.0\.position\.weight", r"query_embed.weight"),
)
# The decoder's norms are named in another order than DETR's: norm2 follows self-attention, norm1 cross-attention.
DEFORMABLE: Renaming = (
    *COMMON,
    (r"neck\.projections\.(.+)", r"input_proj.\1"),
    (r"encoder\.position\.level_embed", r"transformer.level_embed"),
    (r"decoder\.layers\.(\d+)\.cross_attention\.(.+)", r"transformer.decoder.layers.\1.cross_attn.\2"),
    (r"decoder\.layers\.(\d+)\.norm_self\.(.+)", r"transformer.decoder.layers.\1.norm2.\2"),
    (r"decoder\.layers\.(\d+)\.norm_cross\.(.+)", r"transformer.decoder.layers.\1.norm1.\2"),
    (r"decoder\.box_head\.mlps\.(\d+)\.hidden\.layers\.(\d)\.(.+)", r"bbox_embed.\1.layers.\2.\3"),
    (r"decoder\.box_head\.mlps\.(\d+)\.last\.(.+)", r"bbox_embed.\1.layers.2.\2"),
    (r"class_heads\.(\d+)\.(.+)", r"class_embed.\1.\2"),
    (r"encoder_heads\.heads\.0\.box_mlp\.hidden\.layers\.(\d)\.(.+)", r"bbox_embed.{layers}.layers.\1.\2"),
    (r"encoder_heads\.heads\.0\.box_mlp\.last\.(.+)", r"bbox_embed.{layers}.layers.2.\1"),
    (r"encoder_heads\.heads\.0\.class_head\.(.+)", r"class_embed.{layers}.\1"),
    (r"encoder_heads\.heads\.0\.project\.(.+)", r"transformer.enc_output.\1"),
    (r"encoder_heads\.heads\.0\.norm\.(.+)", r"transformer.enc_output_norm.\1"),
    (r"query_sources\.0\.projection\.(.+)", r"transformer.pos_trans.\1"),
    (r"query_sources\.0\.norm\.(.+)", r"transformer.pos_trans_norm.\1"),
    (r"query_sources\.0\.reference_points\.(.+)", r"transformer.reference_points.\1"),
    (r"query_sources\.0\.(position|content)\.weight", r"query_embed.weight"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """What an official tensor holds: our tensors `parts` side by side (along dimension 1), in all `shape`."""

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    shape: tuple[int, ...]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return our tensors by name."""
        if len(self.parts) == 1:
            return {self.parts[0]: tensor}
        return dict(zip(self.parts, tensor.split(self.widths, dim=1), strict=True))


def official_layout(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Slot]:
    """Return what every official name holds, for the state dict of our model; values may be on the meta device.

    Raises:
        KeyError: if one of our tensors has no official name.
    """
    found: dict[str, list[str]] = {}
    for ours in sorted(state, key=lambda name: name.endswith("content.weight")):  # positions are the first half
        for name in official_names(ours, config):
            found.setdefault(name, []).append(ours)
    return {name: _slot([(part, tuple(state[part].shape)) for part in parts]) for name, parts in found.items()}


def official_names(ours: str, config: ModelConfig) -> tuple[str, ...]:
    """Return the official names of one of our tensors: the first, then those of its copies."""
    layers = config.decoder.num_layers
    table = DETR if config.encoder.attention.kind == "dense" else DEFORMABLE
    for pattern, template in table:
        if match := re.fullmatch(pattern, ours):
            name = match.expand(template).replace("{layers}", str(layers))
            break
    else:
        raise KeyError(ours)
    head = re.fullmatch(r"(class|bbox)_embed\.(\d+)\.(.+)", name)
    if head is None:
        return (name,)
    kind, place, rest = head.groups()
    if config.heads == "shared":
        return tuple(f"{kind}_embed.{layer}.{rest}" for layer in range(layers))
    two_stage = config.queries.kind == "selected"
    copied = kind == "bbox" or two_stage  # the heads that the official decoder uses are stored in it once more
    return (name, f"transformer.decoder.{kind}_embed.{place}.{rest}") if copied else (name,)


def _slot(parts: list[tuple[str, tuple[int, ...]]]) -> Slot:
    names, shapes = zip(*parts, strict=True)
    if len(parts) == 1:
        return Slot(parts=names, widths=(), shape=shapes[0])
    widths = tuple(shape[1] for shape in shapes)
    return Slot(parts=names, widths=widths, shape=(shapes[0][0], sum(widths)))
