"""The plans that a study has had at one profile: each edit of its claims, looks or selection made another.

A plan that cannot be read is told and left out: it must not take the readable ones with it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from workbench import checks, durable, search
from workbench.errors import StoreError
from workbench.records import Verdict
from workbench.study import FEWEST_SEEDS, Plan

_FILES = ("plan.json", "registered.json", "looks.json", "verdicts.json")
_WATCHED = (*_FILES, search.FILE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredPlan:
    """What plans have to know of each other, without reading every configuration."""

    folder: Path
    registered_at: str  # UTC, ISO 8601
    plain: dict[str, Any]  # plan.json
    claims: dict[str, str]  # identity -> id
    trials: frozenset[tuple[str, str]]  # variant, id; of a search also each configuration on record
    looks: tuple[dict[str, Any], ...]
    looks_started: int
    verdicts: dict[str, Verdict]  # claim's id -> the verdict stored last
    problems: tuple[str, ...]  # files of it that are damaged and are taken to be empty


def read(folder: Path) -> RegisteredPlan | None:
    """Read a plan's folder; None where it was not registered, or not to the end.

    Raises:
        StoreError: a file of it is damaged, or a later version of the workbench wrote it.
    """
    stamp = tuple(durable.stamp(folder / name) for name in _WATCHED)
    return None if None in stamp[:2] else _read(folder, stamp)


@lru_cache(maxsize=64)  # a driver asks again with every round of its mirror, and a plan of many trials is long
def _read(folder: Path, stamp: tuple[object, ...]) -> RegisteredPlan:  # noqa: ARG001 - the stamp names the contents
    try:
        plain, registered = (_object(folder / name) for name in _FILES[:2])
        durable.check_time(registered["registered_at"])
        started, judged = (folder / name for name in _FILES[2:])
        configurations = [(item.name, item.trial_id) for item in search.read(folder)]
        damaged = [path for path in (started, judged) if is_damaged(path)]
        if not all(
            isinstance(name, str) for trial in plain["trials"] for name in (trial["variant"], trial["trial_id"])
        ):
            raise TypeError("a trial whose name is no text")
        claims = {identity(claim): str(claim["id"]) for claim in plain["study"]["claims"]}
        return RegisteredPlan(
            folder=folder,
            registered_at=registered["registered_at"],
            plain=plain,
            claims=claims,
            trials=frozenset([*((trial["variant"], trial["trial_id"]) for trial in plain["trials"]), *configurations]),
            looks=tuple(plain["study"]["looks"]),
            looks_started=len(checks.looks(durable.read_json(started))),
            verdicts={verdict.claim: verdict for verdict in checks.verdicts(durable.read_json(judged))},
            problems=tuple(f"{path} is damaged: what it said is not known; the next run writes it" for path in damaged),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{folder}: holds no plan ({error!r}): remove it and run the study again") from error


def read_all(folder: Path) -> tuple[tuple[RegisteredPlan, ...], tuple[str, ...]]:
    """Return the registered plans in the folder of a study and profile, and why others cannot be read."""
    plans: list[RegisteredPlan] = []
    problems: list[str] = []
    for path in sorted(folder.glob("*/plan.json")):
        try:
            found = read(path.parent)
            plans += [found] if found else []
            problems += found.problems if found else ()
        except StoreError as error:
            problems.append(str(error))
    return tuple(plans), tuple(problems)


def identity(claim: dict[str, Any]) -> str:
    """Return what makes a claim the same claim: its contrast, kind and margin, not its wording."""
    return json.dumps([claim["kind"], claim["margin"], claim["terms"]], sort_keys=True)


def first_registered(plans: Sequence[RegisteredPlan]) -> dict[str, str]:
    """Return when each claim, by its identity, was first registered."""
    first: dict[str, str] = {}
    for plan in plans:
        for claim in plan.claims:
            first[claim] = min(plan.registered_at, first.get(claim, plan.registered_at))
    return first


def looked_before(plan: Plan, plans: Sequence[RegisteredPlan]) -> dict[str, tuple[str, ...]]:
    """Return by claim how plans registered earlier had looked at it, on the same trials, with another set of looks.

    Each set spends the whole alpha, so trying one after another spends it again. A look at fewer seeds than a verdict
    takes could not have decided anything and does not count.
    """
    own = next((item for item in plans if item.folder.name == plan.plan_hash), None)
    since = own.registered_at if own else durable.now()
    looks = tuple(asdict(look) for look in plan.study.looks)
    trials = {(trial.variant, trial.trial_id) for trial in plan.trials}
    found: dict[str, list[str]] = {}
    for item in sorted(plans, key=lambda item: item.registered_at):
        if item.registered_at >= since or item.looks == looks:
            continue
        shared = {variant for variant, _ in trials & item.trials}
        for claim in plan.study.claims:
            verdict = item.verdicts.get(item.claims.get(identity(asdict(claim)), ""))
            same = {term.variant for term in claim.terms} <= shared
            if verdict and same and verdict.n_pairs >= FEWEST_SEEDS:
                found.setdefault(claim.id, []).append(_look_text(item, verdict))
    return {claim: tuple(told) for claim, told in found.items()}


def _look_text(plan: RegisteredPlan, verdict: Verdict) -> str:
    looks = [f"{look['seeds']} seeds at alpha {look['alpha']:g}" for look in plan.looks[: plan.looks_started]]
    return f"{' and '.join(looks)} ({verdict.verdict})"


def is_damaged(path: Path) -> bool:
    """Tell whether a file of a plan is there and is not what it should be.

    Raises:
        StoreError: a later version of the workbench wrote it, or the file system does not give it.
    """
    plain = durable.read_json(path)
    if plain is None:
        return durable.damaged(path)
    wanted = {"plan.json": "study", "registered.json": "registered_at", "looks.json": "looks"}
    return wanted.get(path.name, "verdicts") not in plain


def set_aside_damaged(path: Path) -> None:
    """Give a file of a plan another name where it is damaged, so that it can be written anew and is not lost."""
    if is_damaged(path):
        durable.set_aside(path)


def _object(path: Path) -> dict[str, Any]:
    plain = durable.read_json(path)
    if plain is None:
        raise StoreError(f"{path} is damaged: remove it and run the study again")
    return plain
