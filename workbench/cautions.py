"""What a plan warns of before anything runs: what cannot lead to a verdict, and settings that are legal and odd."""

from collections.abc import Callable, Iterator

from core.config import ExperimentConfig, ModelConfig, pretrained_backbone
from workbench.contacts import named_by_file
from workbench.labels import size
from workbench.study import FEWEST_SEEDS, Study
from workbench.user_code import FLAG, asked_to_run

LARGEST_VALID_SIDE = 0.99
"""Of a proposal, as a share of the picture: tokens of larger ones are not valid (Deformable DETR's official code)."""


def cautions(study: Study) -> Iterator[str]:
    """Yield the warnings of a study."""
    yield from _of_search(study) if study.search is not None or study.tuned is not None else ()
    yield from _of_verdicts(study) if study.search is None else ()
    for claim in study.claims:
        if claim.missing:
            names = ", ".join(claim.missing)
            yield f"claim {claim.id} stays undecided: {names} not selected (--variants all runs every variant)"
    if uri := named_by_file(study):
        yield f"run sends its records to {uri}, which the study's file or profile names (--tracking-uri: elsewhere)"
    if (quota := study.execution.quota_bytes) is not None:
        yield f"run keeps checkpoints and predictions in --runs within {size(quota)}: those of other studies go, too"
    for line in asked_to_run(study):
        yield f"{line}: run needs {FLAG}"
    for is_odd, text in _ODD:
        if names := [variant.name for variant in study.variants if is_odd(variant.config)]:
            yield text.format(", ".join(names))


def _of_verdicts(study: Study) -> Iterator[str]:
    """Yield why no verdict can come of it."""
    last = study.looks[-1].seeds
    if not study.gives_verdicts:
        yield f"profile {study.profile} tests the plumbing: it never gives a verdict"
    elif last < FEWEST_SEEDS:
        yield f"{last} seeds cannot reach a verdict: {FEWEST_SEEDS} or more are needed (--seeds {FEWEST_SEEDS})"


def _of_search(study: Study) -> Iterator[str]:
    """Yield what to know of a search, and of settings that came from one."""
    if study.search is not None:
        yield "a search claims nothing: its result is for a study that names it under tuned"
    if study.tuned is None:
        return
    if study.tuned.profile != study.profile:
        yield f"the settings of {study.tuned.path} were chosen at profile {study.tuned.profile}, not {study.profile}"
    if any(variant.config.data.split == "tune" for variant in study.variants):
        yield f"scored on the split on which the settings of {study.tuned.path} were chosen: leave data.split at val"


def _is_random_and_frozen(config: ExperimentConfig) -> bool:
    backbone = pretrained_backbone(config)
    if backbone is None or backbone.weights is not None:
        return False
    return backbone.frozen_stages > 0 or getattr(backbone, "frozen_batch_norm", False)


def _has_level_without_proposals(config: ExperimentConfig) -> bool:
    model = config.model
    if not isinstance(model, ModelConfig) or model.encoder_supervision is None:
        return False
    return model.encoder_supervision.anchor_scale * 2 ** (model.num_levels - 1) >= LARGEST_VALID_SIDE


def _has_two_levels_of_one_size(config: ExperimentConfig) -> bool:
    model = config.model
    if not isinstance(model, ModelConfig):
        return False
    return getattr(model.backbone, "dilation", False) and {16, 32} <= set(model.strides)


_ODD: tuple[tuple[Callable[[ExperimentConfig], bool], str], ...] = (
    (
        _is_random_and_frozen,
        "the backbone of {} is random and partly frozen: set model.backbone.weights, "
        "or frozen_stages 0 and frozen_batch_norm false",
    ),
    (
        _has_level_without_proposals,
        "the coarsest level of {} has no valid token, since its proposals would be as large as the picture: lower "
        "model.encoder_supervision.anchor_scale, which doubles with each level, or use fewer levels",
    ),
    (
        _has_two_levels_of_one_size,
        "two levels of {} have the same size, since a dilated last stage keeps stride 16: leave 16 or 32 out of "
        "model.strides, or set model.backbone.dilation to false",
    ),
)
