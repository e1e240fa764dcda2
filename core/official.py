"""Reading official DETR and Deformable DETR checkpoints.

A file fits a recipe where every official name is there with its shape, copies are equal, and nothing is left over:
there is no partial loading. Some recipes have the same tensors (DC5 changes strides only), so a file may fit several.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import CheckpointProblem, read_safely
from core.config import ExperimentConfig, ModelConfig
from core.detector import DetrDetector, build_detector
from core.official_names import official_layout
from core.recipes import RECIPES

DETR_RECIPES = ("detr", "detr_dc5")
DEFORMABLE_RECIPES = (
    "deformable",
    "deformable_single_scale",
    "deformable_single_scale_dc5",
    "deformable_refine",
    "deformable_two_stage",
)
PUBLISHED_CLASSES = 91  # COCO's largest category id, and one more for id 0; label i means category i
MOST_NAMED = 10  # problems that a message lists

_PREFIXES = ("module.", "detr.")  # of DistributedDataParallel, and of a detector inside a panoptic model
_IGNORED = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")
_OF_DEFORMABLE = re.compile(r"\.sampling_offsets\.|^(class|bbox)_embed\.\d|^input_proj\.\d\.\d")
_OF_DETR = re.compile(
    r"\.multihead_attn\.|^class_embed\.(weight|bias)$|^bbox_embed\.layers\.|^input_proj\.(weight|bias)$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Official:
    """An official checkpoint in our modules, in evaluation mode on the CPU. Label i means the category of id i."""

    recipe: str
    config: ExperimentConfig
    num_classes: int
    detector: DetrDetector


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """How a file fits one recipe: our tensors, and the problems, one line each."""

    recipe: str
    config: ExperimentConfig
    num_classes: int
    tensors: dict[str, Tensor]
    problems: list[str]


def read_official(path: Path, recipe: str | None = None) -> Official:
    """Read an official file, as `recipe` or as the only one that it fits.

    Raises:
        CheckpointProblem: if the file cannot be read safely, fits no recipe or not the one named (each tensor that is
            missing, left over or of another shape is named), or fits several.
    """
    return load_official(read_safely(path), path=path, recipe=recipe)


def load_official(content: Mapping[str, Any], *, path: Path, recipe: str | None) -> Official:
    """Load what `read_safely` found in `path`; see `read_official`."""
    state = _state_dict(content)
    known = (*DETR_RECIPES, *DEFORMABLE_RECIPES)
    if recipe is not None and recipe not in known:
        raise CheckpointProblem(f"{path}: no official files of recipe {recipe} are known; choose of {', '.join(known)}")
    fit = _only([_fitted(state, name) for name in _family(state, path)], path) if recipe is None else None
    if fit is None:
        assert recipe is not None
        fit = _fitted(state, recipe)
        if fit.problems:
            raise CheckpointProblem(f"{path}: does not fit recipe {recipe}: {_listed(fit.problems)}")
    detector = build_detector(fit.config, num_classes=fit.num_classes, seed=0)
    assert isinstance(detector, DetrDetector)  # as all official recipes
    detector.model.load_state_dict(fit.tensors)
    return Official(recipe=fit.recipe, config=fit.config, num_classes=fit.num_classes, detector=detector.eval())


def _state_dict(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors by name, without prefixes and what profilers and batch norm count."""
    nested = content.get("model", content)
    found: dict[str, Any] = {}
    for name, value in (nested if isinstance(nested, Mapping) else content).items():
        short = str(name)
        for prefix in _PREFIXES:
            short = short.removeprefix(prefix)
        if not _IGNORED.search(short):
            found[short] = value
    return found


def _family(state: Mapping[str, Any], path: Path) -> Sequence[str]:
    if any(map(_OF_DEFORMABLE.search, state)):
        return DEFORMABLE_RECIPES
    if any(map(_OF_DETR.search, state)):
        return DETR_RECIPES
    raise CheckpointProblem(
        f"{path}: neither one of our checkpoints nor an official DETR or Deformable DETR state dict; "
        f"its first keys are {', '.join(list(state)[:5]) or 'none'}"
    )


def _only(fits: list[_Fit], path: Path) -> _Fit:
    """Return the one recipe that fits without a problem."""
    fitting = [fit for fit in fits if not fit.problems]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(fit.recipe for fit in fitting)
        raise CheckpointProblem(f"{path}: fits {names}, which have the same tensors: name one of them with --recipe")
    fewest = min(len(fit.problems) for fit in fits)
    nearest = [fit for fit in fits if len(fit.problems) == fewest]
    names = " and ".join(fit.recipe for fit in nearest)
    raise CheckpointProblem(f"{path}: fits no recipe; nearest is {names}, but {_listed(nearest[0].problems)}")


def _listed(problems: list[str]) -> str:
    more = len(problems) - MOST_NAMED
    return "; ".join(problems[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _fitted(state: Mapping[str, Any], recipe: str) -> _Fit:
    config, num_classes = _sized(state, recipe)
    with torch.device("meta"):
        wanted = build_detector(config, num_classes=num_classes, seed=0).model.state_dict()
    layout = official_layout(wanted, _model(config))
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}  # our name to the official one that it was taken from
    problems: list[str] = []
    for name, slot in layout.items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            found = "missing" if value is None else f"a {type(value).__name__}"
            problems.append(f"{name} is {found}, expected shape {slot.shape}")
        elif tuple(value.shape) != slot.shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, expected {slot.shape}")
        else:
            for ours, tensor in slot.split(value).items():
                if ours not in tensors:
                    tensors[ours], origin[ours] = tensor, name
                elif not torch.equal(tensors[ours], tensor):
                    problems.append(f"{name} differs from {origin[ours]}, of which it is a copy in {recipe}")
    problems.extend(f"{name} is left over" for name in state if name not in layout)
    return _Fit(recipe=recipe, config=config, num_classes=num_classes, tensors=tensors, problems=problems)


def _model(config: ExperimentConfig) -> ModelConfig:
    assert isinstance(config.model, ModelConfig)  # as all official recipes
    return config.model


def _sized(state: Mapping[str, Any], recipe: str) -> tuple[ExperimentConfig, int]:
    """Return the recipe with the file's depth of backbone and number of queries, and its number of classes."""
    plain = RECIPES[recipe].model_dump(mode="json")
    if any(name.startswith("backbone.0.body.layer3.22.") for name in state):
        plain["model"]["backbone"]["depth"] = 101
    queries = state.get("query_embed.weight")
    if isinstance(queries, Tensor) and queries.ndim == 2 and plain["model"]["queries"]["kind"] == "learned":
        plain["model"]["queries"]["num_queries"] = max(1, len(queries))
    no_object = recipe in DETR_RECIPES  # a softmax has one row more
    rows = Counter(
        len(value) - no_object
        for name, value in state.items()
        if "class_embed." in name and isinstance(value, Tensor) and value.ndim and len(value) > no_object
    )
    num_classes = max(rows, key=lambda count: (rows[count], count == PUBLISHED_CLASSES), default=PUBLISHED_CLASSES)
    return ExperimentConfig.model_validate(plain), num_classes
