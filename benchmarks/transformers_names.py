"""The tensor names of Hugging Face transformers' DETR and Deformable DETR, as ours: to compare with them.

Each table gives theirs and ours, in this order; what has no rule must be equal already.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

COMMON: list[tuple[str, str]] = [
    (r"model\.backbone\.model\.(.*)", r"backbone.body.\1"),
    (r"(.*)\.mlp\.fc(\d)\.(.*)", r"\1.feed_forward.linear\2.\3"),
    (r"model\.encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.*)", r"encoder.layers.\1.norm.\2"),
    (r"model\.(\w+)\.layers\.(\d+)\.final_layer_norm\.(.*)", r"\1.layers.\2.feed_forward.norm.\3"),
    (r"model\.encoder\.layers\.(\d+)\.self_attn\.(.*)", r"encoder.layers.\1.attention.\2"),
    (r"model\.decoder\.layers\.(\d+)\.self_attn\.(.*)", r"decoder.layers.\1.self_attention.\2"),
    (r"model\.decoder\.layers\.(\d+)\.encoder_attn\.(.*)", r"decoder.layers.\1.cross_attention.\2"),
    (r"model\.decoder\.layers\.(\d+)\.self_attn_layer_norm\.(.*)", r"decoder.layers.\1.norm_self.\2"),
    (r"model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.(.*)", r"decoder.layers.\1.norm_cross.\2"),
    (r"model\.(encoder|decoder)\.(.*)", r"\1.\2"),
    (r"(.*)\.o_proj\.(.*)", r"\1.out_proj.\2"),
]
PLAIN: list[tuple[str, str]] = [
    (r"model\.input_projection\.(.*)", r"neck.projections.0.0.\1"),
    (r"model\.query_position_embeddings\.weight", r"query_sources.0.position.weight"),
    (r"decoder\.layernorm\.(.*)", r"decoder.norm.\1"),
    (r"class_labels_classifier\.(.*)", r"class_heads.0.\1"),
    (r"bbox_predictor\.layers\.([01])\.(.*)", r"decoder.box_head.mlps.0.hidden.layers.\1.\2"),
    (r"bbox_predictor\.layers\.2\.(.*)", r"decoder.box_head.mlps.0.last.\1"),
]
DEFORMABLE: list[tuple[str, str]] = [
    (r"model\.level_embed", r"encoder.position.level_embed"),
    (r"model\.input_proj\.(.*)", r"neck.projections.\1"),
    (r"model\.reference_points\.(.*)", r"query_sources.0.reference_points.\1"),
    (r"model\.enc_output\.(.*)", r"encoder_heads.heads.0.project.\1"),
    (r"model\.enc_output_norm\.(.*)", r"encoder_heads.heads.0.norm.\1"),
    (r"model\.pos_trans\.(.*)", r"query_sources.0.projection.\1"),
    (r"model\.pos_trans_norm\.(.*)", r"query_sources.0.norm.\1"),
    (r"class_embed\.6\.(.*)", r"encoder_heads.heads.0.class_head.\1"),
    (r"bbox_embed\.6\.layers\.([01])\.(.*)", r"encoder_heads.heads.0.box_mlp.hidden.layers.\1.\2"),
    (r"bbox_embed\.6\.layers\.2\.(.*)", r"encoder_heads.heads.0.box_mlp.last.\1"),
    (r"class_embed\.(\d)\.(.*)", r"class_heads.\1.\2"),
    (r"bbox_embed\.(\d)\.layers\.([01])\.(.*)", r"decoder.box_head.mlps.\1.hidden.layers.\2.\3"),
    (r"bbox_embed\.(\d)\.layers\.2\.(.*)", r"decoder.box_head.mlps.\1.last.\2"),
]
ONE_HEAD = re.compile(r"(class_heads|.*mlps)\.[1-9]\.")  # the same head under a name a layer


def from_transformers(theirs: Mapping[str, Tensor], *, plain: bool, one_head: bool) -> dict[str, Tensor]:
    """Rename a state dict of transformers.

    Args:
        theirs: of `DetrForObjectDetection` or `DeformableDetrForObjectDetection`.
        plain: whether it is of the former.
        one_head: whether all decoder layers share their heads.
    """
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, value in theirs.items():
        name = full_name
        if re.match(r"model\.decoder\.(class|bbox)_embed", name) or name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in [*COMMON, *(PLAIN if plain else DEFORMABLE)]:
            name = re.sub(f"^{pattern}$", replacement, name)
        split = re.match(r"(.*)\.([qkv])_proj\.(weight|bias)$", name)
        if split:  # torch keeps one projection of queries, keys and values
            parts.setdefault(f"{split[1]}.in_proj_{split[3]}", {})[split[2]] = value
        elif not (one_head and ONE_HEAD.match(name)):
            state[name] = value
    both = state.pop("model.query_position_embeddings.weight", None)
    if both is not None:  # of Deformable DETR; plain DETR's has been renamed
        state["query_sources.0.position.weight"], state["query_sources.0.content.weight"] = both.chunk(2, dim=1)
    return state | {name: torch.cat([part[letter] for letter in "qkv"]) for name, part in parts.items()}
