"""What every piece of configuration is, and how a tree of them is read as plain values and dotted keys. A leaf."""

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

OPERATIONAL: dict[str, JsonValue] = {"operational": True}

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A frozen piece of configuration that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="after")
    def _legal(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong across the fields, each with its remedy."""
        yield from ()


def scientific(part: Part) -> dict[str, Any]:
    """Return the fields that decide what is computed, as plain JSON values."""
    plain: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        if field.json_schema_extra == OPERATIONAL:
            continue
        value = getattr(part, name)
        if isinstance(value, Part):
            plain[name] = scientific(value)
        else:
            plain[name] = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(cast("dict[str, Any]", value), f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def dotted_keys(part: type[Part], prefix: str = "") -> list[str]:
    """Return every key that may be set in a part, in all members of its unions."""
    keys: list[str] = []
    for name, field in part.model_fields.items():
        keys.append(f"{prefix}{name}")
        for member in members(field.annotation):
            keys.extend(key for key in dotted_keys(member, f"{prefix}{name}.") if key not in keys)
    return keys


def members(annotation: Any) -> list[type[Part]]:
    """Return the parts that a field's annotation allows, in the order of its union."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [member for argument in get_args(annotation) for member in members(argument)]
    return []
