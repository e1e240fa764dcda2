"""What is wrong with a study, gathered until all of it is known: each problem with its place and key.

Also turns pydantic's errors into sentences that say what was found, what is allowed and what was probably meant.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from workbench.errors import StudyFileError

LONGEST_SHOWN = 60  # characters of a found value
MOST_TOLD = 100  # problems


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where something was written: a file with line and column counted from 1, or (line 0) an option or a default."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


DEFAULT = Place("default")


class Problems:
    """A growing list of problems, each told once, in the order of their places."""

    def __init__(self) -> None:
        self._found: dict[tuple[Place, str, str], None] = {}

    def add(self, place: Place, key: str, text: str) -> None:
        """Note one problem; `key` is the dotted key path, or "" for a whole file."""
        self._found.setdefault((place, key, text))

    def __bool__(self) -> bool:
        return bool(self._found)

    def lines(self) -> list[str]:
        """Return one line for each problem, by file and line; of very many the first, and how many more there are."""
        ordered = sorted(self._found)
        told = [f"{place}: {key}: {text}" if key else f"{place}: {text}" for place, key, text in ordered[:MOST_TOLD]]
        more = len(ordered) - len(told)
        return [*told, f"and {more} more problems"] if more else told

    def raise_if_any(self) -> None:
        """Raise a StudyFileError that holds every problem."""
        if self._found:
            raise StudyFileError("\n".join(self.lines()))


def did_you_mean(found: object, allowed: Iterable[str]) -> str:
    """Return "did you mean x? " when an allowed word is near, else ""."""
    near = get_close_matches(str(found), list(allowed), n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""


def shown(value: object) -> str:
    """Return a value as a reader of YAML would name it, cut to one short line."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case str():
            text = value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}..."
            return f"the text {text!r}"
        case int() | float():
            return f"{value!r}"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return repr(value)[:LONGEST_SHOWN]


_KINDS_OF_VALUE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "at most {}"),
    "too_short": ("min_length", "a list of at least {}"),
    "too_long": ("max_length", "at most {} of them"),
    "string_too_short": ("min_length", "text of at least {} character"),
    "string_pattern_mismatch": ("pattern", "text of the form {}"),
}
_NEGATIONS = {"off", "on", "yes", "no", "Off", "On", "Yes", "No"}


def in_words(error: ErrorDetails, allowed_keys: Iterable[str] = ()) -> str:
    """Say what was found, what is allowed and what was meant. `allowed_keys` are what an unknown key may mean."""
    found, context = error["input"], error.get("ctx", {})
    kind = error["type"]
    if kind == "extra_forbidden":
        keys = list(allowed_keys)
        return f"unknown key; {did_you_mean(error['loc'][-1], keys)}allowed: {', '.join(keys)}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        allowed = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"kind {context['tag']!r}: {did_you_mean(context['tag'], allowed)}allowed: {', '.join(allowed)}"
    if kind == "union_tag_not_found":
        return "found a mapping without its kind; add kind: NAME"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        words = re.split(r", | or ", allowed)
        return f"found {shown(found)}; {did_you_mean(found, words)}allowed: {allowed}"
    if kind in _BOUNDS:
        name, form = _BOUNDS[kind]
        bound = context[name]
        return f"found {shown(found)}; allowed: {form.format(bound if isinstance(bound, str) else f'{bound:g}')}"
    if kind in _KINDS_OF_VALUE:
        remedy = "; YAML 1.2 reads it as text" if kind == "bool_type" and str(found) in _NEGATIONS else ""
        return f"found {shown(found)}; allowed: {_KINDS_OF_VALUE[kind]}{remedy}"
    return f"found {shown(found)}; {error['msg']}"


def as_key(path: Iterable[Any]) -> str:
    """Return a path of keys and list positions as one dotted key: claims[0].metric."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
