"""The same Deformable DETR or DETR from here and from Hugging Face transformers, each ready to take a step.

Alike: weights, pictures and boxes, what trains, dropout, the losses and their weights, AdamW (fused) and clipping. Each
does as its users have it: ours is this program's trainer, theirs a plain loop around their model and loss function.
"""

import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from shapes import DetectorShape
from torch import nn
from transformers_names import from_transformers

from core.config import ExperimentConfig
from core.detector import DetrDetector
from core.recipes import RECIPES
from core.seeding import seeded, torch_stream
from core.trainer import Trainer
from core.types import Batch, Target

NUM_CLASSES = 91
BOXES = 8  # a picture
RATE, CLIP_NORM = 1e-5, 0.1
FROZEN = ("conv1", "bn1", "layer1")
CPU = torch.device("cpu")

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """`train` takes an optimiser step and returns its loss; `infer` detects in the pictures of a batch."""

    train: Callable[[], float]
    infer: Callable[[], object]


def preload() -> None:
    """Load what both need, so that the libraries' memory is not counted as the detectors'."""
    _build(DetectorShape(resnet=18, dim=32, ffn=32, heads=4, layers=2, queries=2, batch=1, height=32, width=32))


def batch_of(shape: DetectorShape) -> Batch:
    """Draw pictures and boxes."""
    generator = torch_stream(0, "benchmark")
    size = (shape.batch, 3, shape.height, shape.width)
    return Batch(
        images=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        padding_mask=torch.zeros(shape.batch, shape.height, shape.width, dtype=torch.bool),
        targets=tuple(
            Target(
                labels=torch.randint(0, NUM_CLASSES, (BOXES,), generator=generator),
                boxes=torch.rand(BOXES, 4, generator=generator) * 0.4 + 0.1,
                annotation_ids=torch.arange(BOXES),
                picture_id=index,
                original_size=(shape.height, shape.width),
            )
            for index in range(shape.batch)
        ),
    )


def config_of(shape: DetectorShape, *, plain: bool, precision: Precision, dropout: float) -> ExperimentConfig:
    """Return the recipe at that shape, with the weights of transformers' losses and matching."""
    recipe = RECIPES["detr" if plain else "deformable"]
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_dim": shape.dim,
            "ffn_dim": shape.ffn,
            "num_heads": shape.heads,
            "dropout": dropout,
            "backbone": {"kind": "resnet", "depth": shape.resnet, "frozen_stages": 2},
        },
        "loss": {"weight_class": 1.0},
        "training": {
            "precision": precision,
            "batch_size": shape.batch,
            "threads": torch.get_num_threads(),
            "lr": RATE,
            "lr_backbone": RATE,
            "lr_sampling_factor": 1.0,
            "clip_norm": CLIP_NORM,
        },
    }
    whole = recipe.model_dump()
    for part, values in changes.items():
        whole[part].update(values)
    whole["model"]["encoder"]["num_layers"] = whole["model"]["decoder"]["num_layers"] = shape.layers
    whole["model"]["queries"]["num_queries"] = shape.queries
    whole["loss"]["matcher"]["cost_class"] = 1.0
    return ExperimentConfig.model_validate(whole)


def ours(shape: DetectorShape, *, plain: bool, precision: Precision, dropout: float) -> Steps:
    """Build this program's detector with the weights of transformers', and its trainer."""
    config = config_of(shape, plain=plain, precision=precision, dropout=dropout)
    source: Any = SimpleNamespace(train=range(10**6), class_names=[str(number) for number in range(NUM_CLASSES)])
    trainer = Trainer(config, seed=0, data=source, device=CPU)
    detector = trainer.detector
    assert isinstance(detector, DetrDetector)
    state = from_transformers(_build(shape, plain=plain).state_dict(), plain=plain, one_head=True)
    detector.model.load_state_dict(state)
    for module in detector.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 32  # here they grow with the width: equal at 256 channels alone (docs/design.md)
    batch = batch_of(shape)
    trainer._batches = itertools.repeat((batch,))  # type: ignore[assignment]  # the same pictures at every step
    unknown = Batch(
        images=batch.images,
        padding_mask=batch.padding_mask,
        targets=tuple(_without_boxes(target) for target in batch.targets),
    ).to(CPU)

    def infer() -> object:
        detector.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return detector.detect(unknown, top_k=100)

    return Steps(train=lambda: trainer.step()[0]["total"], infer=infer)


def theirs(shape: DetectorShape, *, plain: bool, precision: Precision, dropout: float) -> Steps:
    """Build transformers' detector and a plain training loop."""
    import transformers

    model = _build(shape, plain=plain, dropout=dropout)
    for name, parameter in model.named_parameters():
        if any(f"model.{part}." in name for part in FROZEN):
            parameter.requires_grad = False
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=RATE, fused=True)
    batch = batch_of(shape)
    mean, std = (255 * torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    inputs = {"pixel_values": (batch.images - mean) / std, "pixel_mask": (~batch.padding_mask).long()}
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in batch.targets]
    sizes = [target.original_size for target in batch.targets]
    kind = transformers.DetrImageProcessor if plain else transformers.DeformableDetrImageProcessor
    processor = kind()
    lower = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": precision == "bf16"}

    def train() -> float:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**lower):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def infer() -> object:
        model.eval()
        with torch.autocast(**lower):
            found = model(**inputs)
        return processor.post_process_object_detection(found, threshold=0.0, target_sizes=sizes)

    return Steps(train=train, infer=infer)


def _without_boxes(target: Target) -> Target:
    """Return the target of a picture that nobody has annotated."""
    return Target(
        labels=target.labels[:0],
        boxes=target.boxes[:0],
        annotation_ids=target.annotation_ids[:0],
        picture_id=target.picture_id,
        original_size=target.original_size,
    )


def _build(shape: DetectorShape, *, plain: bool = False, dropout: float = 0.0) -> Any:
    """Build transformers' model with weights that are the same in every process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    kinds: tuple[Any, Any] = (
        (transformers.DetrConfig, transformers.DetrForObjectDetection)
        if plain
        else (transformers.DeformableDetrConfig, transformers.DeformableDetrForObjectDetection)
    )
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", shape.layers), ("ffn_dim", shape.ffn), ("attention_heads", shape.heads))
    }
    # As published, and here: dropout on attention weights and inside the feed-forward, too.
    dropouts = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout)
    with warnings.catch_warnings(), seeded(0, "benchmark"):
        warnings.simplefilter("ignore")
        config = kinds[0](
            use_timm_backbone=True,
            backbone=f"resnet{shape.resnet}",
            use_pretrained_backbone=False,
            num_labels=NUM_CLASSES,
            d_model=shape.dim,
            num_queries=shape.queries,
            auxiliary_loss=True,
            **sides,
            **dropouts,
        )
        model = kinds[1](config)
    for name, value in sorted(model.state_dict().items()):
        if value.dim() > 1 and ("class_embed" in name or "query" in name):
            value.normal_(std=0.1, generator=torch_stream(0, "benchmark", name))  # so that queries differ
    return model
