"""What two configurations differ in, and whether the variants of a study differ in what they say."""

import json
from collections.abc import Sequence
from typing import Any

from core.config import ExperimentConfig
from core.parts import flatten, scientific
from workbench.overrides import clashes
from workbench.problems import Problems, shown
from workbench.study import Variant
from workbench.yaml12 import Document

ABSENT = "(absent)"  # a key that belongs to another kind, or to a part that is null


def differences(baseline: ExperimentConfig, other: ExperimentConfig) -> dict[str, tuple[Any, Any]]:
    """Return the scientific keys that differ, with the value on each side or `ABSENT`."""
    ours, theirs = flatten(scientific(baseline)), flatten(scientific(other))
    return {
        key: (ours.get(key, ABSENT), theirs.get(key, ABSENT))
        for key in [*ours, *(key for key in theirs if key not in ours)]
        if ours.get(key, ABSENT) != theirs.get(key, ABSENT)
    }


def check_differences(variants: Sequence[Variant], baseline: str, document: Document, problems: Problems) -> None:
    """Tell the variants that equal another one, and those that differ from the baseline in keys nobody asked for."""
    first = next((variant for variant in variants if variant.name == baseline), None)
    ordered = [*([first] if first else []), *(variant for variant in variants if variant.name != baseline)]
    names: dict[str, str] = {}  # by what is computed
    for variant in ordered:
        place, key = document.place(("variants", variant.name)), f"variants.{variant.name}"
        twin = names.setdefault(json.dumps(scientific(variant.config), sort_keys=True), variant.name)
        if twin != variant.name:
            whom = f"the baseline {baseline}" if twin == baseline else f"variant {twin}"
            problems.add(place, key, f"computes the same as {whom}: set what differs, or remove it")
        elif first and variant is not first:
            for asked_not, text in _unasked(first, variant).items():
                problems.add(place, f"{key}.set", f"changes {asked_not} {text}")


def _unasked(baseline: Variant, variant: Variant) -> dict[str, str]:
    """Return the keys that differ although neither side sets them: a replaced part falls back to its defaults.

    A key that only one side has belongs to the kind or part that was asked for.
    """
    asked = [*baseline.overrides, *variant.overrides]
    reason = "without asking for it, since a part that is replaced takes its defaults: set it too"
    return {
        key: f"from {shown(ours)} to {shown(theirs)} {reason}"
        for key, (ours, theirs) in differences(baseline.config, variant.config).items()
        if ABSENT not in (ours, theirs) and not any(clashes(key, other) for other in asked)
    }
