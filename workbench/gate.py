"""A gate before hundreds of GPU-hours: does this code, on this data, score what was published, and learn as it should?

A passed gate is kept in `runs/gates/<profile>.json` with what it is of: the detector's code, the numerics, the
checkpoint, the pictures. `run` asks for one that matches where a study is expected to be dear.
"""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core import numerics
from core.data.fingerprint import DataProblem, fingerprint
from core.recipes import DEFAULT
from workbench import bands, durable, provenance
from workbench.budget import Budget
from workbench.errors import WorkbenchError
from workbench.expenses import WITHOUT_GATE, gone_around
from workbench.labels import POINTS
from workbench.options import Options
from workbench.plan import make_plan
from workbench.published import PUBLISHED, Published
from workbench.store import Store
from workbench.study import TrialSpec
from workbench.study_file import Selection, load_study

GPU_HOURS = 100.0
"""Expected GPU-hours of a study at its profile above which `run` asks for a passed gate."""
TOLERANCE = 0.001  # of AP: published numbers are rounded to it
_STUDY = """\
version: 1
study: gate
question: Does the recipe train as it should?
recipe: {recipe}
baseline: recipe
variants: {{recipe: {{}}}}
scope: seeds
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at, and what was found in words."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """What a gate found. `identity`: what it is of."""

    profile: str
    checks: tuple[Check, ...]
    identity: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Tell whether everything was looked at and found good."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a gate is asked for. Without a checkpoint, which drawn pictures have none of, only the losses are checked.

    `study`: train the baseline of a study in place of the bare recipe.
    """

    profile: str
    checkpoint: Path | None = None
    data: Path | None = None
    recipe: str | None = None
    study: Path | None = None
    device: str = "cpu"


def gate(
    asked: Asked,
    store: Store,
    *,
    tell: Callable[[str], None],
    published: Mapping[tuple[str, int], Published] = PUBLISHED,
) -> GateResult:
    """Check both, and keep the result where both could be checked.

    Raises:
        WorkbenchError: the profile, the checkpoint or the pictures cannot be used.
    """
    recipe, depth = asked.recipe or DEFAULT, 0
    if asked.checkpoint is not None:
        recipe, depth = _official(asked.checkpoint, asked.recipe)
    spec = training(asked, recipe)
    if asked.checkpoint is None and spec.config.data.kind == "coco":
        raise WorkbenchError(f"--profile {asked.profile}: its gate needs an official file: name it with --checkpoint")
    checks: list[Check] = []
    if asked.checkpoint is not None:
        checks.append(_scores(asked, recipe, depth, published, tell))
    checks.append(_learns(asked, recipe, spec, store, tell))
    identity = _identity(spec) | {"recipe": recipe, "device": asked.device}
    if asked.checkpoint is not None:
        identity["checkpoint"] = {"name": asked.checkpoint.name, "sha256": _sha256(asked.checkpoint)}
    result = GateResult(profile=asked.profile, checks=tuple(checks), identity=identity)
    if asked.checkpoint is not None:
        durable.write_json(_file(store, asked.profile), as_json(result) | {"checked_at": durable.now()})
    return result


def training(asked: Asked, recipe: str) -> TrialSpec:
    """Return the training whose losses are checked: the recipe's at the profile, or the baseline's of a study."""
    selection = Selection(profile=asked.profile, data=asked.data, seeds=1)
    if asked.study is not None:
        plan = make_plan(load_study(asked.study, selection), pictures_needed=True)
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "gate.yaml"
            path.write_text(_STUDY.format(recipe=recipe), encoding="utf-8")
            plan = make_plan(load_study(path, selection), pictures_needed=True)
    return next(plan.specs[trial.trial_id] for trial in plan.trials if trial.variant == plan.study.baseline)


def _official(path: Path, recipe: str | None) -> tuple[str, int]:
    """Return the recipe of an official file and the depth of its backbone."""
    from core.checkpoint import CheckpointProblem, read_safely  # torch takes seconds
    from core.evaluation.checkpoints import load_detector

    try:
        loaded = load_detector(read_safely(path), path=path, recipe=recipe, parameters=None, allow_code=False)
    except CheckpointProblem as problem:
        raise WorkbenchError(f"--checkpoint {problem}") from problem
    if loaded.recipe is None:
        raise WorkbenchError(
            f"--checkpoint {path}: is one of ours; a gate needs an official file, whose score was published"
        )
    return loaded.recipe, getattr(getattr(loaded.config.model, "backbone", None), "depth", 0)


def _scores(
    asked: Asked,
    recipe: str,
    depth: int,
    published: Mapping[tuple[str, int], Published],
    tell: Callable[[str], None],
) -> Check:
    name = "published AP"
    wanted = published.get((recipe, depth))
    if wanted is None:
        return Check(name=name, passed=False, text=f"no AP was published of {recipe} with a ResNet-{depth}")
    tell(f"Scoring {asked.checkpoint} on {asked.data}")
    metrics = scored(asked, recipe, tell)
    ap, pictures = metrics["ap"], metrics["num_pictures"]
    found = f"AP {POINTS * (ap or 0.0):.2f} on {pictures} pictures; {POINTS * wanted.ap:.1f} was published"
    found += f" ({wanted.source})"
    if pictures != wanted.num_pictures:
        found += f", on {wanted.num_pictures} pictures: scores of others cannot be compared"
        return Check(name=name, passed=False, text=found)
    return Check(name=name, passed=ap is not None and abs(ap - wanted.ap) <= TOLERANCE + 1e-9, text=found)


def scored(asked: Asked, recipe: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the metrics of the checkpoint on the folder's val pictures, as `evaluate` gives them."""
    from workbench.evaluate_command import evaluate  # brings torch

    given = {"checkpoint": asked.checkpoint, "recipe": recipe, "data": asked.data, "device": asked.device}
    rest = {"split": "val", "num_pictures": None, "parameters": None, "predictions": None}
    options = Namespace(**given, **rest, losses=False, allow_code=False)
    return evaluate(options, tell=tell)["metrics"]


def _learns(asked: Asked, recipe: str, spec: TrialSpec, store: Store, tell: Callable[[str], None]) -> Check:
    name, what = "loss", training_name(asked, recipe)
    band = bands.known(store, spec)
    if band is None:
        return Check(
            name=name,
            passed=False,
            text=f"no band stored of {what}: record one on a machine and code that you trust with {_to_record(asked)}",
        )
    tell(f"Training {bands.STEPS} steps of {what}")
    # The seed is one of the band's, so that what is compared is everything else.
    found = bands.in_windows(bands.losses(spec, seed=0, device=asked.device, cache=store.cache_dir).losses)
    text = f"means of {bands.WINDOW} steps of {what}: {', '.join(f'{loss:.4g}' for loss in found)}"
    outside = [
        f"{low:.4g} to {high:.4g} where {loss:.4g} was found"
        for loss, (low, high) in zip(found, band.windows, strict=False)
        if not low <= loss <= high
    ]
    if len(found) < len(band.windows):
        outside.append(f"{len(band.windows)} windows where {len(found)} were trained")
    text += f"; the band ({band.source}) is {'; '.join(outside)}" if outside else f", inside the band ({band.source})"
    return Check(name=name, passed=not outside, text=text)


def training_name(asked: Asked, recipe: str) -> str:
    """Return in words which training is checked."""
    return f"the baseline of {asked.study}" if asked.study else f"{recipe} at profile {asked.profile}"


def _to_record(asked: Asked) -> str:
    words = ["doctor", "--profile", asked.profile]
    words += ["--study", str(asked.study)] if asked.study else ["--recipe", asked.recipe or "NAME"]
    words += ["--data", str(asked.data)] if asked.data else []
    return f"`python -m workbench {' '.join(words)} --record-band`"


def _identity(spec: TrialSpec) -> dict[str, Any]:
    return {
        "code_hash": provenance.code_hash(),
        "numerics": numerics.VERSION,
        "data_fingerprint": _pictures(spec),
    }


def _pictures(spec: TrialSpec) -> str:
    """Return the fingerprint of a trial's pictures, those of val included also where it is not scored on them."""
    data = spec.config.data
    if data.split == "val":
        return spec.data_fingerprint
    try:
        return fingerprint(data.model_copy(update={"split": "val"}), root=Path(spec.data_root or "."))
    except DataProblem:
        return ""  # no gate was passed on a folder without them


def _file(store: Store, profile: str) -> Path:
    return store.root / "gates" / f"{profile}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(result: GateResult) -> dict[str, Any]:
    """Return a result as JSON values."""
    return json.loads(json.dumps({"passed": result.passed, **asdict(result)}))


def as_text(result: GateResult) -> str:
    """Return a result for a terminal."""
    lines = [f"{'passed' if check.passed else 'NOT PASSED':11}{check.name}: {check.text}" for check in result.checks]
    end = f"The gate of profile {result.profile} is passed" if result.passed else "The gate is not passed"
    if result.passed and "checkpoint" not in result.identity:
        end = "What can be checked without an official file is good"
    return "\n".join([*lines, end]) + "\n"


# Asked for by run


def missing(profile: str, specs: Mapping[str, TrialSpec], store: Store) -> str | None:
    """Return why no passed gate of the profile matches these trials; None where one does."""
    kept = durable.read_json(_file(store, profile))
    if kept is None:
        return f"no gate of profile {profile} is on record"
    try:
        return _mismatch(kept, profile, specs)
    except durable.UNUSABLE:
        return f"the gate of profile {profile} on record is damaged"


def _mismatch(kept: dict[str, Any], profile: str, specs: Mapping[str, TrialSpec]) -> str | None:
    if kept["passed"] is not True:
        failed = "; ".join(f"{check['name']}: {check['text']}" for check in kept["checks"] if not check["passed"])
        return f"the gate of profile {profile} was not passed ({failed})"
    identity = kept["identity"]
    if identity["code_hash"] != provenance.code_hash() or identity["numerics"] != numerics.VERSION:
        return f"the gate of profile {profile} was passed by other detector code ({identity['code_hash']})"
    if {_pictures(spec) for spec in specs.values()} != {identity["data_fingerprint"]}:
        return f"the gate of profile {profile} was passed on other pictures"
    return None


def require(budget: Budget, options: Options, *, say: Callable[[str], None]) -> None:
    """Refuse a study that is expected to cost more than `GPU_HOURS` and has no gate that matches.

    Where nothing is known of its cost and it would run on GPUs, a probe measures it first, where its trials would run.
    `options.without_gate` goes on, and the study's folder then says so.

    Raises:
        WorkbenchError: there is no such gate, or the cost cannot be known here.
    """
    plan, store = budget.plan, budget.store
    if not budget.machine.gpus:
        return
    hours = _expected_hours(budget, until_decided=options.until_decided)
    if hours is None and not options.without_gate:
        from workbench.probe import probe  # only where nothing is on record

        say("Nothing is on record of what a trial costs:")
        address = options.address if options.executor == "ray" else None
        probe(plan, store, budget.machine, allow_code=options.allow_code, tell=say, address=address)
        hours = _expected_hours(budget, until_decided=options.until_decided)
    if hours is not None and hours <= GPU_HOURS:
        return
    if bands.first_epoch_watch(store, plan) is None:
        say("The baseline's first epoch is not watched: no band of it is stored (docs/budget.md)")
    reason = missing(plan.study.profile, plan.specs, store)
    if reason is None:
        return
    reason += "" if hours is None else f", and {hours:.0f} GPU-hours are expected"
    if not options.without_gate:
        raise WorkbenchError(
            f"{reason}; above {GPU_HOURS:g} a study needs one: python -m workbench doctor --profile "
            f"{plan.study.profile} --checkpoint FILE --data DIR (docs/budget.md); or go on knowingly: --without-gate"
        )
    _go_around(budget, reason, say)


def watch(budget: Budget, *, without_gate: bool, say: Callable[[str], None]) -> Callable[[], str | None]:
    """Return the check of the baseline's first epoch; with `without_gate` one that never gives a reason to stop."""
    check = bands.first_epoch_watch(budget.store, budget.plan) or (lambda: None)
    if not without_gate:
        remedy = "Find out why, or go on knowingly with --without-gate"
        return lambda: (found := check()) and f"Paused: {found}. {remedy}"
    if (found := check()) is not None:
        _go_around(budget, found, say)
    return lambda: None


def _expected_hours(budget: Budget, *, until_decided: bool) -> float | None:
    """Return the GPU-hours that a study will have cost when this run ends, those spent included; None if not known."""
    looks = budget.expected().looks
    number = len(looks) if until_decided else max(1, budget.store.results_for(budget.plan).looks_started)
    left = looks[number - 1].gpu_hours
    return None if left is None else budget.gpu_hours() + left


def _go_around(budget: Budget, reason: str, say: Callable[[str], None]) -> None:
    """Say, and keep in the study's folder, what was known when the user went on."""
    say(f"Warning: {reason}; going on without a gate, which the report will say")
    folder = budget.store.study_dir(budget.plan)
    earlier = gone_around(folder)
    if reason not in [item["reason"] for item in earlier]:
        durable.write_json(folder / WITHOUT_GATE, {"reasons": [*earlier, {"at": durable.now(), "reason": reason}]})
