"""A covering array of strength two: few configurations that hold every legal pair of values of the toggles.

Greedy, as in the algorithm AETG (Cohen et al., IEEE TSE 23(7), 1997): each configuration starts from a pair that is not
covered yet and takes, factor by factor, the value that covers most. What the validator refuses is not a pair to cover.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import Any

import numpy as np
from pydantic import ValidationError
from toggles import alternatives, fields, get, is_operational, name_of

from core.config import ExperimentConfig, SwinV2
from core.parts import Part

Path = tuple[str, ...]
Choice = tuple[Path, int]  # a factor and the number of its value
Row = dict[Path, int]

TRIES = 60  # rows that are tried for a pair before it is taken for illegal


def factors(base: ExperimentConfig) -> dict[Path, list[Any]]:
    """Return the values of each toggle of model and loss that is a choice, the base's value first.

    A part with fields is one factor: its values are the kinds, and of each kind one for every choice of its fields. So
    no value depends on a part that another factor removes. Numbers are left out, but for layers and levels, which may
    be none; so are parts too large for a test.
    """
    found: dict[Path, list[Any]] = {}
    for path, annotation in fields(base):
        if path[0] not in ("model", "loss") or len(path) == 1:
            continue
        if any(path[:end] in found for end in range(2, len(path))):
            continue  # inside a part that is one factor
        value = get(base, path)
        others = alternatives(annotation, value)
        if any(isinstance(other, Part) for other in (value, *others)):
            kinds = [other for other in others if not isinstance(other, SwinV2)]
            if kinds:  # a part that is always there, and of one kind, is no factor itself
                found[path] = [variant for one in [value, *kinds] for variant in _variants(one)]
        elif isinstance(value, bool | str | tuple) and not is_operational(base, path):
            found[path] = [value, *others]
        elif path[-1] in ("num_layers", "extra_levels"):
            found[path] = [value, 0]
    return {path: values for path, values in found.items() if len(values) > 1}


def _variants(part: Any) -> Iterator[Any]:
    """Yield a part, and it with each other choice of one of its fields, as far as these are legal."""
    yield part
    if not isinstance(part, Part):
        return
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if name == "kind" or not isinstance(value, bool | str):
            continue
        for other in alternatives(field.annotation, value):
            try:
                yield type(part).model_validate({**part.model_dump(mode="json"), name: other})
            except ValidationError:
                continue


def build(base: ExperimentConfig, values: Mapping[Path, list[Any]], row: Row) -> ExperimentConfig:
    """Return the configuration of a row.

    Raises:
        ValidationError: if it is not legal.
    """
    plain = base.model_dump(mode="json")
    for path, number in row.items():
        value = values[path][number]
        node = plain
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value.model_dump(mode="json") if isinstance(value, Part) else value
    return ExperimentConfig.model_validate(plain)


def _is_legal(base: ExperimentConfig, values: Mapping[Path, list[Any]], row: Row) -> bool:
    try:
        build(base, values, row)
    except ValidationError:
        return False
    return True


def _pairs(row: Row) -> set[tuple[Choice, Choice]]:
    return set(combinations(sorted(row.items()), 2))


def covering_array(
    bases: list[ExperimentConfig], *, seed: int = 0
) -> tuple[list[ExperimentConfig], list[tuple[str, str]]]:
    """Return configurations that cover every legal pair, and the pairs for which no legal configuration was found.

    The rows start from the first base or from another: a pair may need what only that one has.
    """
    rng = np.random.default_rng(seed)
    base = bases[0]
    values = factors(base)
    for other in bases[1:]:
        for path, choices in values.items():
            if _number(choices, get(other, path)) is None:
                choices.append(get(other, path))
    starts: list[Row] = [{p: _number(choices, get(other, p)) for p, choices in values.items()} for other in bases]
    missing = {
        tuple(sorted(((p, i), (q, j))))
        for p, q in combinations(values, 2)
        for i in range(len(values[p]))
        for j in range(len(values[q]))
    }
    rows: list[Row] = []
    illegal: list[tuple[str, str]] = []
    while missing:
        pair = min(missing)
        row = _row_with(pair, base, values, starts, missing, rng)
        if row is None:
            illegal.append(tuple(name_of((path, values[path][number])) for path, number in pair))
            missing.discard(pair)
            continue
        rows.append(row)
        missing -= _pairs(row)
    return [build(base, values, row) for row in rows], illegal


def _number(choices: list[Any], value: Any) -> int | None:
    """Return the number of the choice that is like a value but for numbers."""
    return next((number for number, choice in enumerate(choices) if _likeness(choice) == _likeness(value)), None)


def _likeness(value: Any) -> Any:
    if not isinstance(value, Part):
        return value
    return {name: one for name, one in value.model_dump().items() if isinstance(one, bool | str)}


def _row_with(pair, base, values, starts, missing, rng) -> Row | None:
    """Return a legal row that holds the pair and as many missing ones as a greedy pass finds, or None."""
    for start in islice(_attempts(starts, values, rng), TRIES):
        row = {**start, **dict(pair)}
        if _is_legal(base, values, row):
            return _improved(row, dict(pair), base, values, missing, rng)
    return None


def _attempts(starts: list[Row], values, rng) -> Iterator[Row]:
    """Yield the starts themselves, then starts with more and more random values."""
    yield from starts
    for attempt in range(TRIES):
        row = dict(starts[attempt % len(starts)])
        for path in rng.permutation(len(values))[: 1 + attempt // 6]:
            name = list(values)[path]
            row[name] = int(rng.integers(len(values[name])))
        yield row


def _improved(row: Row, fixed: Row, base, values, missing, rng) -> Row:
    """Give each factor in a random order the legal value that covers most of what is missing."""
    names = list(values)
    for place in rng.permutation(len(names)):
        path = names[place]
        if path in fixed:
            continue
        gains = []
        for number in range(len(values[path])):
            gain = sum(tuple(sorted(((path, number), other))) in missing for other in row.items() if other[0] != path)
            gains.append((-gain, number != row[path], number))
        for _, _, number in sorted(gains):
            candidate = {**row, path: number}
            if number == row[path] or _is_legal(base, values, candidate):
                row = candidate
                break
    return row
