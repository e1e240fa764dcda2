"""`evaluate`: score any checkpoint, ours or an official one, on a COCO folder, and write what it found.

The options come from the command line; what is computed is in `core.evaluation`.
"""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from core.checkpoint import CheckpointProblem, read_safely
from core.config import CocoFolder
from core.custom import CustomProblem, given_as_text
from core.data.batching import scoring_batches
from core.data.coco import open_scored
from core.data.pictures import GroundTruth, PictureSet
from core.data.splits import DataProblem, left_out, open_data
from core.evaluation.categories import Categories, Relabelled
from core.evaluation.checkpoints import LoadedCheckpoint, custom_targets, load_detector
from core.evaluation.coco_ap import coco_metrics
from core.evaluation.losses import mean_losses
from core.evaluation.score import chosen, num_candidates, with_proposal_recall
from core.metrics import Metrics
from core.types import Detections
from workbench import durable
from workbench.errors import DataError, WorkbenchError
from workbench.labels import METRICS, POINTS
from workbench.user_code import code_of_trial

PROGRESS_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pictures:
    """What is scored: pictures and truth with the folder's labels, and the same pictures with the model's."""

    pictures: PictureSet
    ground_truth: GroundTruth
    class_names: tuple[str, ...]
    categories: Categories
    name: str
    warnings: tuple[str, ...]


def evaluate(options: Namespace, *, tell: Callable[[str], None]) -> dict[str, Any]:
    """Score the checkpoint that the options name; return what `--json` prints. Warnings and progress go to `tell`.

    Raises:
        WorkbenchError: if an option, the checkpoint or the pictures cannot be used; nothing has been computed then.
    """
    began = time.perf_counter()
    device = _device(options.device)
    if options.predictions is not None and options.predictions.is_dir():
        raise WorkbenchError(f"{options.predictions}: is a folder; --predictions needs the name of a file")
    if options.num_pictures is not None and options.num_pictures < 1:
        raise WorkbenchError(f"--num-pictures {options.num_pictures}: at least 1 picture is needed")
    with _opened(options) as loaded:
        return {**_described(loaded, options, device, tell), "seconds": time.perf_counter() - began}


@contextmanager
def _opened(options: Namespace) -> Iterator[LoadedCheckpoint]:
    """Yield what the checkpoint holds; within the block its own code, where it has some, can be found and run."""
    path: Path = options.checkpoint
    try:
        content = read_safely(path)
        targets = custom_targets(content) if options.allow_code else ()
        with TemporaryDirectory() as folder, given_as_text(code_of_trial(path, targets), folder=Path(folder)):
            yield load_detector(
                content, path=path, recipe=options.recipe, parameters=options.parameters, allow_code=options.allow_code
            )
    except CheckpointProblem as problem:
        raise WorkbenchError(f"--checkpoint {problem}") from problem
    except CustomProblem as problem:
        raise WorkbenchError(f"--checkpoint {path}: {problem}") from problem


def _described(
    loaded: LoadedCheckpoint, options: Namespace, device: torch.device, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Score, write the predictions where they are asked for, and return all that is told but the time."""
    try:
        data = _pictures(loaded, options)
    except DataProblem as problem:
        raise DataError(str(problem)) from problem
    if loaded.recipe is None:
        torch.set_num_threads(loaded.config.training.threads)  # a trial's own score, to the last bit
    detector = loaded.detector.to(device)
    for warning in data.warnings:
        tell(f"Warning: {warning}")
    metrics, found = _score(loaded, data, device, tell)
    scored = sum(len(data.categories.scored(one).scores) for one in found)
    results = [entry for one in found for entry in data.categories.results(one)]
    described: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "recipe": loaded.recipe,
        "data": data.name,
        "split": options.split,
        "parameters": loaded.parameters,
        "metrics": metrics.to_json(),
        "detections": len(results),
        "detections_of_other_categories": len(results) - scored,
    }
    if options.losses:
        losses = mean_losses(detector, pictures=data.pictures, indices=range(len(data.pictures)), device=device)
        described |= {"losses": losses.terms | {"total": losses.total}, "loss_weights": losses.weights}
        described |= {"grad_norm": losses.grad_norm}
    if options.predictions is not None:
        durable.write_text(options.predictions, json.dumps(results) + "\n")
    return described


def _score(
    loaded: LoadedCheckpoint, data: _Pictures, device: torch.device, tell: Callable[[str], None]
) -> tuple[Metrics, list[Detections]]:
    """Return the numbers, as `core.evaluation.score` does, and the detections that they are of, with model labels."""
    how = loaded.config.evaluation
    found: list[Detections] = []
    told = time.perf_counter()
    for batch in scoring_batches(data.pictures, range(len(data.pictures)), batch_size=how.batch_size):
        detected = loaded.detector.detect(batch.to(device), top_k=num_candidates(how))
        found.extend(chosen(one, how) for one in detected)
        if time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            tell(f"{len(found)} of {len(data.pictures)} pictures")
    metrics = coco_metrics(
        [data.categories.scored(one) for one in found],
        data.ground_truth,
        class_names=data.class_names,
        picture_ids=data.pictures.picture_ids,
    )
    return with_proposal_recall(metrics, found), found


def _pictures(loaded: LoadedCheckpoint, options: Namespace) -> _Pictures:
    """Open the folder, or draw the pictures where the checkpoint was trained on drawn ones and no folder is named."""
    config = loaded.config.data
    if options.data is not None:
        folder = open_scored(options.data, options.split, rule=loaded.resize, num_pictures=options.num_pictures)
        pictures, truth, names, report = folder.scored, folder.ground_truth, folder.class_names, folder.report
        name = str(options.data)
    elif isinstance(config, CocoFolder):
        raise DataError("which pictures? Name a folder in COCO format with --data DIR")
    else:
        count = min(options.num_pictures or config.num_val, config.num_val)
        drawn = config.model_copy(update={"num_train": 1, "num_val": count, "split": options.split})
        data = open_data(drawn, root=None, cache=None)
        pictures, truth, names, report = data.scored, data.ground_truth, data.class_names, data.report
        name = "drawn shapes"
    categories = Categories(model_ids=tuple(loaded.classes), folder_ids=truth.category_ids)
    warnings = (*left_out(report), *_disagreements(loaded, dict(zip(truth.category_ids, names, strict=True))))
    return _Pictures(
        pictures=Relabelled(pictures, categories),
        ground_truth=truth,
        class_names=names,
        categories=categories,
        name=name,
        warnings=warnings,
    )


def _disagreements(loaded: LoadedCheckpoint, folder: dict[int, str]) -> list[str]:
    unknown = [f"{key} ({name})" for key, name in folder.items() if key not in loaded.classes]
    lines = []
    if len(unknown) == len(folder):
        raise DataError(
            f"--data: the model knows none of the folder's categories, {', '.join(unknown[:5])}; its ids are "
            f"{', '.join(map(str, list(loaded.classes)[:5]))}, ...: detections are scored by category id"
        )
    if unknown:
        lines.append(f"the model does not know the categories {', '.join(unknown)}: their boxes count as missed")
    if loaded.recipe is None:
        other = [
            f"{key} is '{loaded.classes[key]}' in the checkpoint and '{name}' in the folder"
            for key, name in folder.items()
            if loaded.classes.get(key, name) != name
        ]
        lines += [f"category {line}: scored by id" for line in other]
    return lines


def as_text(described: dict[str, Any]) -> str:
    """Return the result as a short table, in points."""
    metrics = described["metrics"]
    kind = "ours" if described["recipe"] is None else described["recipe"]
    lines = [
        f"{described['checkpoint']} ({kind}, {described['parameters']} weights)",
        f"{metrics['num_pictures']} pictures with {metrics['num_boxes']} boxes of {described['data']} "
        f"({described['split']}), {described['seconds']:.1f} s",
        "",
    ]
    for name, label in METRICS.items():
        value = metrics[name]
        lines.append(f"{label:10}{'nothing to score' if value is None else f'{POINTS * value:6.1f}'}")
    if metrics["ar50_proposals"] is not None:
        lines += [f"{'proposals':10}{POINTS * metrics['ar50_proposals']:6.1f}  recall of the selected ones at IoU .5"]
    if described["detections_of_other_categories"]:
        lines += [
            "",
            f"{described['detections_of_other_categories']} of {described['detections']} detections are of categories "
            "that the folder lacks: not scored",
        ]
    if "losses" in described:
        weights = described["loss_weights"]
        lines += ["", f"{'loss term':28}{'mean':>10}  weight"]
        lines += [f"{name:28}{described['losses'][name]:10.5f}  {weights[name]:g}" for name in weights]
        lines += [f"{'weighted sum':28}{described['losses']['total']:10.5f}"]
        lines += [f"{'norm of the summed gradient':28}{described['grad_norm']:10.5f}"]
    return "\n".join(lines) + "\n"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WorkbenchError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from error
    return device
