"""Any checkpoint, ours or an official one, as a detector that knows which categories its labels mean."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from core.checkpoint import CheckpointProblem, check_format
from core.checkpoint_files import is_intact, sidecar_of
from core.config import CocoFolder, ExperimentConfig, FixedSize, ShorterSide
from core.detector import AnyDetector, build_detector
from core.official import load_official

Parameters = Literal["raw", "averaged"]
OTHER_VERSION = "evaluate it with the version that wrote it, or train it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCheckpoint:
    """A detector in evaluation mode on the CPU, and what it was made with.

    `recipe` is None where the checkpoint is ours; `classes`: a name by category id, in the order of the labels, or the
    id alone as text where the file names none.
    """

    detector: AnyDetector
    config: ExperimentConfig
    recipe: str | None
    parameters: Parameters
    classes: dict[int, str]

    @property
    def resize(self) -> FixedSize | ShorterSide:
        """How its pictures are resized for scoring."""
        data = self.config.data
        return data.resize if isinstance(data, CocoFolder) else FixedSize(height=data.side, width=data.side)


def custom_targets(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the targets of the custom parts that a checkpoint's configuration names, sorted; () where it has none."""
    try:
        return tuple(sorted(set(_targets(content["config"])))) if _is_ours(content) and "config" in content else ()
    except RecursionError:  # a configuration that holds itself, which is told where it is read
        return ()


def load_detector(
    content: Mapping[str, Any], *, path: Path, recipe: str | None, parameters: Parameters | None, allow_code: bool
) -> LoadedCheckpoint:
    """Build the detector of one of our checkpoints, or of an official file.

    Args:
        content: what `read_safely` found.
        path: where.
        recipe: of an official file, where its tensors fit several.
        parameters: raw or averaged weights; None for what the configuration scores, where there are such.
        allow_code: whether a configuration may name parts of the user's own, whose code is then run.

    Raises:
        CheckpointProblem: if the content does not fit, or lacks what is asked for.
        CustomProblem: if a part of the user's own cannot be built.
    """
    if _is_ours(content):
        return _ours(content, path, recipe=recipe, parameters=parameters, allow_code=allow_code)
    if parameters == "averaged":
        raise CheckpointProblem(f"{path}: official files hold no averaged weights: use --parameters raw")
    official = load_official(content, path=path, recipe=recipe)
    return LoadedCheckpoint(
        detector=official.detector,
        config=_as_evaluated_officially(official.config),
        recipe=official.recipe,
        parameters="raw",
        classes={category_id: str(category_id) for category_id in range(official.num_classes)},
    )


def _is_ours(content: Mapping[str, Any]) -> bool:
    return "format" in content and "raw" in content


def _ours(
    content: Mapping[str, Any], path: Path, *, recipe: str | None, parameters: Parameters | None, allow_code: bool
) -> LoadedCheckpoint:
    check_format(content, path)
    if sidecar_of(path).is_file() and not is_intact(path):
        raise CheckpointProblem(f"{path}: is damaged: its checksum is not the one in {sidecar_of(path).name}")
    if recipe is not None:
        raise CheckpointProblem(f"{path}: one of our checkpoints, which holds its own configuration: omit --recipe")
    if "config" not in content:
        raise CheckpointProblem(
            f"{path}: was written before checkpoints held their configuration and classes: train it again"
        )
    if wrong := _wrong_part(content):
        raise CheckpointProblem(f"{path}: is damaged: {wrong}: {OTHER_VERSION}")
    config = _validated(content["config"], path)
    if (targets := custom_targets(content)) and not allow_code:
        raise CheckpointProblem(f"{path}: uses code of your own ({', '.join(targets)}): allow it with --allow-code")
    if parameters == "averaged" and content["averaged"] is None:
        raise CheckpointProblem(
            f"{path}: holds no averaged weights (training.ema_decay was null): use --parameters raw"
        )
    wanted = parameters or config.evaluation.parameters
    used: Parameters = "raw" if content["averaged"] is None else wanted
    classes: dict[int, str] = content["classes"]
    plain = _without_pretrained(config)
    try:
        if not targets:  # so that a small file cannot ask for a huge detector; a user's own part may need real tensors
            with torch.device("meta"):
                build_detector(plain, num_classes=len(classes), seed=0).load_state_dict(content[used], assign=True)
        detector = build_detector(plain, num_classes=len(classes), seed=0)
        detector.load_state_dict(content[used])
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise CheckpointProblem(
            f"{path}: its weights do not fit the detector that this version builds from its configuration ({told}): "
            f"{OTHER_VERSION}"
        ) from error
    return LoadedCheckpoint(detector=detector.eval(), config=config, recipe=None, parameters=used, classes=classes)


def _wrong_part(content: Mapping[str, Any]) -> str:
    """Say which part of one of our checkpoints is none; "" where all are."""
    raw, averaged, classes = (content.get(name, "") for name in ("raw", "averaged", "classes"))
    if not _is_of(raw, str, object) or not (averaged is None or _is_of(averaged, str, object)):
        return "raw or averaged holds no weights by name"
    return "" if _is_of(classes, int, str) else "classes holds no names by category id"


def _is_of(value: Any, keys: type, values: type) -> bool:
    return isinstance(value, dict) and all(isinstance(k, keys) and isinstance(v, values) for k, v in value.items())


def _validated(plain: Any, path: Path) -> ExperimentConfig:
    try:
        return ExperimentConfig.model_validate(plain)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise CheckpointProblem(f"{path}: its configuration is of another version ({told}): {OTHER_VERSION}") from error


def _as_evaluated_officially(config: ExperimentConfig) -> ExperimentConfig:
    """Let the recipe resize with Pillow and score pictures one by one, since padding changes the scores."""
    plain = config.model_dump(mode="json")
    plain["data"]["resize"]["resampling"] = "pillow"
    plain["evaluation"]["batch_size"] = 1
    return ExperimentConfig.model_validate(plain)


def _without_pretrained(config: ExperimentConfig) -> ExperimentConfig:
    """Name no pretrained weights, which the checkpoint's would replace: their file need not be here."""
    plain = config.model_dump(mode="json")
    if "weights" in plain["model"].get("backbone", {}):
        plain["model"]["backbone"]["weights"] = None
    return ExperimentConfig.model_validate(plain)


def _targets(plain: Any) -> Iterator[str]:
    """Yield the targets of all custom parts."""
    if isinstance(plain, dict):
        if plain.get("kind") == "custom" and isinstance(plain.get("target"), str):
            yield plain["target"]
        for value in plain.values():
            yield from _targets(value)
