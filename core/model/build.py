"""The composition root: the only place where a toggle's value picks a class. Parts never see a config."""

from functools import partial
from typing import Literal

from torch import nn

from core import config as c
from core.custom import build_custom
from core.model.attention import DeformableAttention, SelfAttention
from core.model.backbone import Backbone, ResNet, SmallResNet, Timm
from core.model.decoder import Decoder, DecoderLayer
from core.model.detr import DETR
from core.model.encoder import Encoder, EncoderLayer
from core.model.initialise import initialise
from core.model.layers import FeedForward
from core.model.neck import Neck
from core.model.position import LevelPosition, SineQueryPosition, StaticQueryPosition
from core.model.queries import ClassHead, EncoderHeads, LearnedBoxes, LearnedPoints, SelectedFromEncoder
from core.model.refinement import BoxHead
from core.seeding import seeded


def build_model(config: c.ModelConfig, *, num_classes: int, seed: int) -> DETR:
    """Build the model on the CPU with weights from `seed`, then load pretrained ones where the config names them."""
    with seeded(seed, "construction"):  # what constructors draw is replaced below
        backbone = _backbone(config)
        model = DETR(
            backbone=backbone,
            neck=Neck(channels=backbone.channels, dim=config.hidden_dim, num_levels=config.num_levels),
            encoder=_encoder(config),
            encoder_heads=_encoder_heads(config, num_classes),
            query_sources=[_queries(config)],
            decoder=_decoder(config),
            class_heads=nn.ModuleList(ClassHead(config.hidden_dim, num_classes) for _ in range(_num_heads(config))),
        )
    initialise(model, seed=seed)
    backbone.load_pretrained()
    return model


def _backbone(config: c.ModelConfig) -> Backbone:
    match config.backbone:
        case c.SmallResNet(width=width):
            return SmallResNet(width=width, strides=config.strides)
        case c.ResNet() as part:
            return ResNet(
                depth=part.depth,
                frozen_batch_norm=part.frozen_batch_norm,
                frozen_stages=part.frozen_stages,
                weights=part.weights,
                strides=config.strides,
            )
        case c.Timm() as part:
            return Timm(
                name=part.name,
                frozen_batch_norm=part.frozen_batch_norm,
                frozen_stages=part.frozen_stages,
                weights=part.weights,
                strides=config.strides,
            )
        case other:
            raise NotImplementedError(other.kind)


def _encoder(config: c.ModelConfig) -> Encoder:
    position = LevelPosition(
        dim=config.hidden_dim,
        num_levels=config.num_levels,
        temperature=config.position.temperature,
        offset=config.position.offset,
        level_embed=config.position.level_embed,
    )
    layers = [
        EncoderLayer(
            attention=_encoder_attention(config),
            feed_forward=_feed_forward(config),
            dim=config.hidden_dim,
            dropout=config.dropout,
        )
        for _ in range(config.encoder.num_layers)
    ]
    return Encoder(position=position, layers=layers)


def _encoder_heads(config: c.ModelConfig, num_classes: int) -> EncoderHeads | None:
    if config.encoder_supervision is None:
        return None
    return EncoderHeads(
        dim=config.hidden_dim,
        num_classes=num_classes,
        anchor_scale=config.encoder_supervision.anchor_scale,
        class_agnostic=config.encoder_supervision.labels == "binary",
    )


def _queries(config: c.ModelConfig) -> nn.Module:
    static = config.query_position == "static"
    match config.queries:
        case c.LearnedQueries(reference="point", num_queries=num_queries):
            return LearnedPoints(num_queries=num_queries, dim=config.hidden_dim)
        case c.LearnedQueries(num_queries=num_queries, anchor_size=anchor_size):
            return LearnedBoxes(
                num_queries=num_queries, dim=config.hidden_dim, anchor_size=anchor_size, static_position=static
            )
        case c.SelectedQueries(num_queries=num_queries):
            return SelectedFromEncoder(
                num_queries=num_queries,
                dim=config.hidden_dim,
                temperature=config.position.temperature,
                static_position=static,
            )
        case other:
            raise NotImplementedError(other.kind)


def _decoder(config: c.ModelConfig) -> Decoder:
    layers = [
        DecoderLayer(
            self_attention=SelfAttention(dim=config.hidden_dim, num_heads=config.num_heads, dropout=config.dropout),
            cross_attention=_decoder_attention(config),
            feed_forward=_feed_forward(config),
            dim=config.hidden_dim,
            dropout=config.dropout,
        )
        for _ in range(config.decoder.num_layers)
    ]
    build_head = BoxHead if isinstance(config.box_head, c.MLPBoxHead) else partial(build_custom, config.box_head)
    box_head = build_head(
        dim=config.hidden_dim,
        num_heads=_num_heads(config),
        residual_base=config.refinement.residual_base,
        sampling_reference=config.refinement.sampling_reference,
        predicts_size=_predicts_size(config),
    )
    sine = config.query_position == "sine_of_reference"
    query_position = SineQueryPosition(dim=config.hidden_dim) if sine else StaticQueryPosition()
    return Decoder(layers=layers, box_head=box_head, query_position=query_position)


def _predicts_size(config: c.ModelConfig) -> Literal["nowhere", "first", "everywhere"]:
    if config.has_box_references:
        return "nowhere"
    return "everywhere" if config.refinement.residual_base == "initial" else "first"


def _num_heads(config: c.ModelConfig) -> int:
    return 1 if config.heads == "shared" else config.decoder.num_layers


def _encoder_attention(config: c.ModelConfig) -> DeformableAttention:
    match config.encoder.attention:
        case c.DeformableSelf(num_points=num_points):
            return _deformable(config, num_points)
        case other:
            raise NotImplementedError(other.kind)


def _decoder_attention(config: c.ModelConfig) -> DeformableAttention:
    match config.decoder.attention:
        case c.Deformable(num_points=num_points):
            return _deformable(config, num_points)
        case other:
            raise NotImplementedError(other.kind)


def _deformable(config: c.ModelConfig, num_points: int) -> DeformableAttention:
    return DeformableAttention(
        dim=config.hidden_dim, num_heads=config.num_heads, num_levels=config.num_levels, num_points=num_points
    )


def _feed_forward(config: c.ModelConfig) -> FeedForward:
    return FeedForward(dim=config.hidden_dim, hidden=config.ffn_dim, dropout=config.dropout)
