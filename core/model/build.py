"""The composition root: the only place where a toggle's value picks a class. Parts never see a config."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, assert_never

from torch import nn

from core import config as c
from core.custom import build_custom
from core.model.attention import (
    DeformableAttention,
    DenseAttention,
    Multihead,
    QuestionAttention,
    SelfAttention,
    WindowAttention,
)
from core.model.backbones.build import build_backbone
from core.model.decoder import Decoder, DecoderLayer
from core.model.denoising import ContrastiveDenoising, Denoising, MatchedExtra
from core.model.detr import DETR, ClassHeads
from core.model.encoder import Encoder, EncoderLayer
from core.model.initialise import initialise
from core.model.layers import ClassHead, FeedForward
from core.model.neck import Neck
from core.model.position import LevelPosition, SineQueryPosition, StaticQueryPosition
from core.model.proposals import EncoderHeads, TokenHead
from core.model.queries import (
    Anchors,
    FixedCentres,
    LearnedBoxes,
    LearnedPoints,
    LearnedQueries,
    RandomBoxes,
    SelectedFromEncoder,
)
from core.model.question import ConstantQuestion, LearnedQuestion
from core.model.refinement import BoxHead
from core.seeding import seeded

Activation = Literal["sigmoid", "softmax"]
AnyMultihead = TypeVar("AnyMultihead", bound=Multihead)


def build_model(
    config: c.ModelConfig,
    *,
    num_classes: int,
    seed: int,
    activation: Activation = "sigmoid",
    encoder_activation: Activation = "sigmoid",
    activation_checkpointing: bool = False,
) -> DETR:
    """Build the model on the CPU with weights from `seed`, then load pretrained ones where the config names them.

    Args:
        config: the toggles.
        num_classes: K.
        seed: of every starting weight.
        activation: of the decoder's logits; softmax has one more logit, "no object".
        encoder_activation: the same of the encoder's heads.
        activation_checkpointing: compute layers again in the backward pass instead of keeping what is in them.
    """
    with seeded(seed, "construction"):  # what constructors draw is replaced below
        backbone = build_backbone(config.backbone, strides=config.strides)
        decoding = config.decoder.num_layers > 0
        model = DETR(
            backbone=backbone,
            neck=Neck(
                channels=backbone.channels,
                dim=config.hidden_dim,
                extra_levels=config.extra_levels,
                norm=config.neck_norm == "group",
            ),
            encoder=_encoder(config, checkpointing=activation_checkpointing),
            question=_question(config),
            encoder_heads=_encoder_heads(config, num_classes, encoder_activation),
            query_sources=_query_sources(config, num_classes) if decoding else [],
            decoder=_decoder(config, checkpointing=activation_checkpointing) if decoding else None,
            class_heads=_class_heads(config, num_classes, activation) if decoding else None,
        )
    initialise(model, seed=seed)
    backbone.load_pretrained()
    return model


def _encoder(config: c.ModelConfig, *, checkpointing: bool) -> Encoder:
    position = LevelPosition(
        dim=config.hidden_dim,
        num_levels=config.num_levels,
        temperature=config.position.temperature,
        offset=config.position.offset,
        level_embed=config.position.level_embed,
    )
    reads = config.encoder.question != "none"
    layers = [
        EncoderLayer(
            attention=_encoder_attention(config),
            question=_multihead(QuestionAttention, config) if reads else None,
            feed_forward=_feed_forward(config),
            dim=config.hidden_dim,
            dropout=config.dropout,
        )
        for _ in range(config.encoder.num_layers)
    ]
    supervision = config.encoder_supervision
    return Encoder(
        position=position,
        layers=layers,
        local=supervision is not None and supervision.local,
        activation_checkpointing=checkpointing,
    )


def _encoder_attention(config: c.ModelConfig) -> nn.Module:
    match config.encoder.attention:
        case c.DeformableSelf() as part:
            return DeformableAttention(
                dim=config.hidden_dim,
                num_heads=config.num_heads,
                num_levels=config.num_levels,
                num_points=part.num_points,
                own_level=part.levels == "own",
            )
        case c.Dense():
            return _multihead(DenseAttention, config)
        case c.Window(radius=radius):
            return WindowAttention(dim=config.hidden_dim, num_heads=config.num_heads, radius=radius)
        case c.Custom() as part:
            return _custom_attention(part, config)
        case other:
            assert_never(other)


def _question(config: c.ModelConfig) -> nn.Module | None:
    match config.encoder.question, config.queries:
        case "queries", _:
            return LearnedQuestion()
        case "constant", c.LearnedQueries(num_queries=num_queries):
            return ConstantQuestion(num_words=num_queries, dim=config.hidden_dim)
        case _:
            return None


def _encoder_heads(config: c.ModelConfig, num_classes: int, activation: Activation) -> EncoderHeads | None:
    supervision = config.encoder_supervision
    if supervision is None:
        return None
    heads = [
        TokenHead(
            dim=config.hidden_dim,
            num_logits=_num_logits(num_classes, activation),
            activation=activation,
            class_agnostic=supervision.labels == "binary",
            prior=_has_prior(config, activation),
        )
        for _ in range(config.encoder.num_layers if supervision.layers == "all_separate" else 1)
    ]
    return EncoderHeads(
        heads=heads,
        every_layer=supervision.layers != "last",
        anchor_scale=supervision.anchor_scale,
        learned_scale=supervision.learned_anchor_scale,
    )


def _query_sources(config: c.ModelConfig, num_classes: int) -> list[nn.Module]:
    extra = _denoising(config, num_classes)
    return [_queries(config)] + ([] if extra is None else [extra])


def _queries(config: c.ModelConfig) -> nn.Module:
    dim, static = config.hidden_dim, config.query_position == "static"
    match config.queries:
        case c.LearnedQueries() as part:
            return _learned_queries(part, dim=dim, static=static)
        case c.SelectedQueries() as part:
            return SelectedFromEncoder(
                num_queries=part.num_queries,
                dim=dim,
                temperature=config.position.box_temperature,
                content=part.content,
                static_position=static,
            )
        case c.TokenQueries():
            raise ValueError("tokens are queries only without a decoder: set model.decoder.num_layers to 0")
        case c.Custom() as part:
            return build_custom(part, dim=dim, static_position=static)
        case other:
            assert_never(other)


def _learned_queries(part: c.LearnedQueries, *, dim: int, static: bool) -> nn.Module:
    zero_content = part.content == "zeros"
    match part.reference:
        case "none":
            return LearnedQueries(num_queries=part.num_queries, dim=dim, zero_content=zero_content)
        case "point":
            return LearnedPoints(num_queries=part.num_queries, dim=dim, zero_content=zero_content)
        case "box":
            kinds: dict[str, Callable[[int, float], nn.Module]] = {
                "learned": Anchors,
                "fixed_centres": FixedCentres,
                "random": RandomBoxes,
            }
            return LearnedBoxes(
                num_queries=part.num_queries,
                dim=dim,
                zero_content=zero_content,
                static_position=static,
                anchors=kinds[part.anchors](part.num_queries, part.anchor_size),
            )
        case other:
            assert_never(other)


def _denoising(config: c.ModelConfig, num_classes: int) -> nn.Module | None:
    dim = config.hidden_dim
    match config.denoising:
        case None:
            return None
        case c.DN() as part:
            return Denoising(
                dim=dim,
                num_classes=num_classes,
                groups=part.groups,
                label_noise=part.label_noise,
                box_noise=part.box_noise,
            )
        case c.ContrastiveDN() as part:
            return ContrastiveDenoising(
                dim=dim,
                num_classes=num_classes,
                num_queries=part.num_queries,
                label_noise=part.label_noise,
                box_noise=part.box_noise,
            )
        case c.MatchedExtra(groups=groups):
            return MatchedExtra(dim=dim, groups=groups)
        case c.Custom() as part:
            return build_custom(part, dim=dim, num_classes=num_classes)
        case other:
            assert_never(other)


def _decoder(config: c.ModelConfig, *, checkpointing: bool) -> Decoder:
    dim, decoder = config.hidden_dim, config.decoder
    layers = [
        DecoderLayer(
            self_attention=_multihead(SelfAttention, config) if decoder.self_attention else None,
            cross_attention=_decoder_attention(config),
            feed_forward=_feed_forward(config),
            dim=dim,
            dropout=config.dropout,
        )
        for _ in range(1 if decoder.weights == "shared" else decoder.num_layers)
    ]
    sine = config.query_position == "sine_of_reference"
    return Decoder(
        layers=layers,
        num_steps=decoder.num_layers,
        norm=None if decoder.norm == "none" else nn.LayerNorm(dim),
        norm_carried=decoder.norm == "both",
        box_head=_box_head(config),
        query_position=SineQueryPosition(dim=dim, temperature=config.position.box_temperature)
        if sine
        else StaticQueryPosition(),
        activation_checkpointing=checkpointing,
    )


def _decoder_attention(config: c.ModelConfig) -> nn.Module:
    match config.decoder.attention:
        case c.Deformable(num_points=num_points):
            return DeformableAttention(
                dim=config.hidden_dim, num_heads=config.num_heads, num_levels=config.num_levels, num_points=num_points
            )
        case c.Dense():
            return _multihead(DenseAttention, config)
        case c.Custom() as part:
            return _custom_attention(part, config)
        case other:
            assert_never(other)


def _box_head(config: c.ModelConfig) -> nn.Module:
    match config.box_head:
        case c.MLPBoxHead():
            build = BoxHead
        case c.Custom() as part:
            build = partial(build_custom, part)
        case other:
            assert_never(other)
    refinement = config.refinement
    return build(
        dim=config.hidden_dim,
        num_heads=_num_heads(config),
        residual_base=refinement.residual_base,
        sampling_reference=refinement.sampling_reference,
        recomputed=refinement.boxes == "recomputed",
        predicts_size=_predicts_size(config),
        zero_start=config.head_init == "prior",
    )


def _predicts_size(config: c.ModelConfig) -> Literal["nowhere", "first", "everywhere"]:
    if config.has_box_references:
        return "nowhere"
    return "everywhere" if config.refinement.residual_base == "initial" else "first"


def _class_heads(config: c.ModelConfig, num_classes: int, activation: Activation) -> ClassHeads:
    heads: list[nn.Module] = [
        ClassHead(config.hidden_dim, _num_logits(num_classes, activation), prior=_has_prior(config, activation))
        for _ in range(_num_heads(config))
    ]
    return ClassHeads(heads, activation=activation)


def _has_prior(config: c.ModelConfig, activation: Activation) -> bool:
    """Whether classes start rare: a softmax over all of them has nothing to be rare against."""
    return config.head_init == "prior" and activation == "sigmoid"


def _num_logits(num_classes: int, activation: Activation) -> int:
    return num_classes + (activation == "softmax")


def _num_heads(config: c.ModelConfig) -> int:
    return 1 if config.heads == "shared" else config.decoder.num_layers


def _multihead(kind: type[AnyMultihead], config: c.ModelConfig) -> AnyMultihead:
    return kind(dim=config.hidden_dim, num_heads=config.num_heads, dropout=config.dropout)


def _custom_attention(part: c.Custom, config: c.ModelConfig) -> nn.Module:
    return build_custom(
        part,
        dim=config.hidden_dim,
        num_heads=config.num_heads,
        num_levels=config.num_levels,
        dropout=config.dropout,
    )


def _feed_forward(config: c.ModelConfig) -> FeedForward:
    return FeedForward(dim=config.hidden_dim, hidden=config.ffn_dim, dropout=config.dropout)
