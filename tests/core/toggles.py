"""Every toggle of a configuration, generated from its fields, and what a short training shows of one."""

import copy
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import ValidationError
from torch import nn

from core.config import (
    Custom,
    ExperimentConfig,
    FasterRCNN,
    LearnedQueries,
    ResNet,
    SelectedQueries,
    SmallResNet,
    Timm,
)
from core.data.batching import training_batch
from core.data.splits import open_data
from core.evaluation.score import without_overlaps
from core.parts import OPERATIONAL, Part, members
from core.recipes import RECIPES
from core.seeding import torch_stream
from core.trainer import Trainer

CPU = torch.device("cpu")

# What makes a recipe small: the same keys for all, as far as they have them.
SMALL_MODEL = {
    "hidden_dim": 32,
    "num_heads": 4,
    "ffn_dim": 48,
    "dropout": 0.0,
    "backbone": {"kind": "small_resnet", "width": 4},
    "fpn_dim": 16,
    "head_dim": 16,
    "proposals": 20,
    "anchor_scale": 0.2,
}
SMALL_REST = {
    "data": {"kind": "shapes", "side": 64, "num_train": 8, "num_val": 4, "augmentation": "flip"},
    "training": {  # two steps, the second at a lower rate
        "epochs": 1,
        "batch_size": 4,
        "lr": 2e-3,
        "lr_backbone": 2e-3,
        "schedule": {"kind": "step", "at": 0.5},
        "ema_decay": 0.5,
    },
    "evaluation": {"top_k": 30},
}
# The small form of parts that are large by default.
CHEAP: dict[type[Part], Part] = {
    ResNet: ResNet(depth=18, frozen_stages=0, frozen_batch_norm=False),
    Timm: Timm(name="mobilenetv3_small_050", frozen_batch_norm=False),
    LearnedQueries: LearnedQueries(num_queries=6),
    SelectedQueries: SelectedQueries(num_queries=4),
    FasterRCNN: FasterRCNN(backbone=SmallResNet(width=4), fpn_dim=16, head_dim=16, proposals=20, anchor_scale=0.2),
}

Change = tuple[tuple[str, ...], typing.Any]


def small(recipe: str) -> ExperimentConfig:
    """Return a recipe at a size that trains in a blink: narrow, two layers, six queries, tiny pictures."""
    plain = RECIPES[recipe].model_dump(mode="json")
    model = plain["model"]
    model |= {key: value for key, value in SMALL_MODEL.items() if key in model}
    if model["backbone"].get("dilation") is None and "dc5" in recipe:
        model["backbone"] = {**model["backbone"], "dilation": True}
    for part in ("encoder", "decoder"):
        if part in model:
            model[part]["num_layers"] = 2 if part == "encoder" else 3  # look-forward-twice needs three to differ
            if model[part]["attention"]["kind"] == "deformable":
                model[part]["attention"]["num_points"] = 2
    if "queries" in model:
        model["queries"]["num_queries"] = 6
    if (model.get("denoising") or {}).get("kind") == "cdn":
        model["denoising"]["num_queries"] = 12
    if model.get("encoder_supervision"):
        model["encoder_supervision"]["anchor_scale"] = 0.1
    plain["data"] = SMALL_REST["data"]
    for part in ("training", "evaluation"):
        plain[part] |= SMALL_REST[part]
    return ExperimentConfig.model_validate(plain)


def _changed(recipe: str, model: dict, decoder: dict | None = None) -> ExperimentConfig:
    plain = small(recipe).model_dump(mode="json")
    plain["model"] |= model
    plain["model"]["decoder"] |= decoder or {}
    return ExperimentConfig.model_validate(plain)


SUPERVISED = {"labels": "class_aware", "anchor_scale": 0.1}
BASES: dict[str, ExperimentConfig] = {
    **{name: small(name) for name in ("deformable", "deformable_two_stage", "detr", "dino", "faster_rcnn")},
    # Not published: what makes the remaining toggles legal.
    "anchors": _changed(
        "deformable",
        {
            "queries": {"kind": "learned", "reference": "box", "num_queries": 6, "anchor_size": 0.2},
            "query_position": "sine_of_reference",
            "refinement": {"residual_base": "detached", "sampling_reference": "detached"},
            "encoder_supervision": {**SUPERVISED, "layers": "all_shared"},
        },
        {"weights": "shared"},
    ),
    "tokens": _changed(
        "deformable", {"queries": {"kind": "tokens"}, "encoder_supervision": SUPERVISED}, {"num_layers": 0}
    ),
    "detr_supervised": _changed("detr", {"encoder_supervision": {**SUPERVISED, "anchor_scale": 0.3}}),
}


def get(config: Part, path: tuple[str, ...]) -> typing.Any:
    """Return the value at a path of field names."""
    value: typing.Any = config
    for name in path:
        value = getattr(value, name)
    return value


def put(config: ExperimentConfig, *changes: Change) -> ExperimentConfig:
    """Return the configuration with the values at some paths changed, validated.

    Raises:
        ValidationError: if it is not legal.
    """
    plain = config.model_dump(mode="json")
    for path, value in changes:
        node = plain
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value.model_dump(mode="json") if isinstance(value, Part) else value
    return ExperimentConfig.model_validate(plain)


def fields(part: Part, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], typing.Any]]:
    """Yield the path and annotation of every field, depth first, of the parts that are there."""
    for name, field in type(part).model_fields.items():
        if name == "kind":
            continue
        yield (*prefix, name), field.annotation
        value = getattr(part, name)
        if isinstance(value, Part):
            yield from fields(value, (*prefix, name))


def is_operational(config: ExperimentConfig, path: tuple[str, ...]) -> bool:
    """Whether a field says how a trial is run, not what it computes."""
    return type(get(config, path[:-1])).model_fields[path[-1]].json_schema_extra == OPERATIONAL


def alternatives(annotation: typing.Any, value: typing.Any) -> list[typing.Any]:
    """Return other values of a field: every other choice and kind, and one other number."""
    parts = [part for part in members(annotation) if part is not Custom]
    if parts:
        others = [CHEAP.get(part) or part() for part in parts if not isinstance(value, part)]
        return others + ([None] if _may_be_none(annotation) and value is not None else [])
    if isinstance(value, bool):
        return [not value]
    choices = [choice for choice in _choices(annotation) if choice != value]
    if choices:
        return choices
    if value is None:
        return [_example(annotation)] if _example(annotation) is not None else []
    if isinstance(value, int):
        return [2 * value or 2]
    if isinstance(value, float):
        return [value / 8 or 0.1]
    if isinstance(value, tuple):
        return [value[1:]] if len(value) > 1 else [(16, *value)]
    return []


def toggles(config: ExperimentConfig) -> Iterator[Change]:
    """Yield every single change of a configuration."""
    for path, annotation in fields(config):
        for value in alternatives(annotation, get(config, path)):
            yield path, value


def name_of(change: Change) -> str:
    """Return `path=value` in short."""
    path, value = change
    return (
        f"{'.'.join(path)}={getattr(value, 'kind', None) or type(value).__name__ if isinstance(value, Part) else value}"
    )


def _unwrapped(annotation: typing.Any) -> Iterator[typing.Any]:
    """Yield the types of a union, without their annotations."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _unwrapped(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _unwrapped(argument)
    else:
        yield annotation


def _choices(annotation: typing.Any) -> list[typing.Any]:
    for one in _unwrapped(annotation):
        if typing.get_origin(one) is typing.Literal:
            return list(typing.get_args(one))
    return []


def _may_be_none(annotation: typing.Any) -> bool:
    return type(None) in _unwrapped(annotation)


def _example(annotation: typing.Any) -> typing.Any:
    """Return a value for a number that is null."""
    kinds = set(_unwrapped(annotation))
    return 16 if int in kinds else 0.5 if float in kinds else None


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What two steps of training and a scoring show."""

    batch: tuple[torch.Tensor, ...]  # the first pictures, their boxes and labels
    start: dict[str, torch.Tensor]  # the weights before the first step
    parameters: frozenset[str]  # the trainable ones
    reached: frozenset[str]  # parameters with a gradient that is not zero everywhere
    losses: tuple[float, ...]
    end: dict[str, torch.Tensor]  # the weights after the last step
    detections: tuple[torch.Tensor, ...]

    def same_training(self, other: "Observed") -> bool:
        """Whether both end at the same weights, bit for bit."""
        return self.end.keys() == other.end.keys() and all(torch.equal(v, other.end[n]) for n, v in self.end.items())

    def same_detections(self, other: "Observed") -> bool:
        """Whether both detect the same, bit for bit."""
        return len(self.detections) == len(other.detections) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(self.detections, other.detections, strict=True)
        )


@lru_cache(maxsize=16)
def _data(config):
    return open_data(config, root=None, cache=None)


def observe(config: ExperimentConfig, *, steps: int = 2) -> Observed:
    """Train `steps` steps with seed 0 and detect on the scored pictures."""
    data = _data(config.data)
    trainer = Trainer(config, seed=0, data=data, device=CPU)
    start = {name: value.clone() for name, value in trainer.detector.state_dict().items()}
    batch = training_batch(data, config, seed=0, step=0)
    reached = _reached(trainer.detector, batch)
    losses = tuple(trainer.step()[0]["total"] for _ in range(min(steps, trainer.total_steps)))
    detector = trainer.detector
    if config.evaluation.parameters == "averaged" and trainer.averaged is not None:
        detector = trainer.averaged.model
    detector.eval()
    return Observed(
        batch=(batch.images, *(target.boxes for target in batch.targets), *(target.labels for target in batch.targets)),
        start=start,
        parameters=frozenset(name for name, p in trainer.detector.named_parameters() if p.requires_grad),
        reached=reached,
        losses=losses,
        end={name: value.clone() for name, value in trainer.detector.state_dict().items()},
        detections=_detections(detector, config, data),
    )


def _reached(detector: nn.Module, batch) -> frozenset[str]:
    """Return the parameters that the loss of a batch reaches, with nothing that would hide some.

    That is a last layer at zero, or a block that is dropped by chance (in evaluation mode none is).
    """
    detector = copy.deepcopy(detector).eval()
    generator = torch_stream(0, "no last layer at zero")
    for module in detector.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1, generator=generator)
    terms = detector.loss(batch, torch_stream(0, "loss", 0))
    torch.stack([term.weight * term.value for term in terms]).sum().backward()
    return frozenset(name for name, p in detector.named_parameters() if p.grad is not None and p.grad.any())


@torch.no_grad()
def _detections(detector: nn.Module, config: ExperimentConfig, data) -> tuple[torch.Tensor, ...]:
    from core.data.batching import scoring_batches

    found: list[torch.Tensor] = []
    for batch in scoring_batches(data.scored, range(len(data.scored)), batch_size=config.evaluation.batch_size):
        for one in detector.detect(batch, top_k=300):
            kept = one if config.evaluation.nms_iou is None else without_overlaps(one, iou=config.evaluation.nms_iou)
            kept = kept.best(config.evaluation.top_k)
            found += [kept.scores, kept.labels, kept.boxes_xyxy_px]
    return tuple(found)


def refusal(config: ExperimentConfig, *changes: Change) -> str | None:
    """Return why a change is not legal, or None."""
    try:
        put(config, *changes)
    except ValidationError as error:
        return "; ".join(item["msg"] for item in error.errors())
    return None
