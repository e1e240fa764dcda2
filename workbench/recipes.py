"""A published recipe as the lowest layer of a study: what it sets over the defaults of the configuration."""

from collections.abc import Iterator
from typing import Any

from core.config import ExperimentConfig
from core.parts import Part
from core.recipes import RECIPES
from workbench.overrides import Assignment, Layer
from workbench.problems import Place


def recipe_layer(name: str, place: Place) -> Layer:
    """Return the layer of a recipe; it stands where the study names it."""
    found = tuple(_differences(RECIPES[name], ExperimentConfig(), "", place))
    return Layer(label=f"recipe {name}", place=place, assignments=found)


def _differences(part: Part, default: Part, prefix: str, place: Place) -> Iterator[Assignment]:
    """Yield what leads from a part with its defaults to this one, in the order in which layers are applied."""
    for field in type(part).model_fields:
        key, value, standard = f"{prefix}{field}", getattr(part, field), getattr(default, field)
        if not isinstance(value, Part):
            if value != standard:
                yield Assignment(key=key, value=_plain(value), place=place)
            continue
        if type(value) is not type(standard):
            standard = type(value)()
            if "kind" in type(value).model_fields:
                yield Assignment(key=key, value=None, place=place, replaces=True)
                yield Assignment(key=f"{key}.kind", value=standard.model_dump()["kind"], place=place)
            else:
                yield Assignment(key=key, value={}, place=place)
        yield from _differences(value, standard, f"{key}.", place)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
