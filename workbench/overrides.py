"""From layers of overrides to one configuration: who set which key, and what each `set` means.

A key is dotted or nested. A mapping with a `kind` replaces the whole part; other mappings merge key by key. The dotted
key `part.kind` switches a part to another kind and keeps what lower layers set of the keys that both kinds have.
Later layers win. Everything set is kept with its place, so that an error found in the resolved configuration is told
where it was written.

A layer that `scales` (a profile) sets what it finds: a kind that recipe or study named is not switched by a dotted key,
and a key that the part's kind does not have waits for a later layer to choose a kind that has it, and is dropped when
none does.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from core.config import ExperimentConfig
from core.parts import Part, dotted_keys, flatten, members
from workbench.problems import DEFAULT, Place, Problems, in_words
from workbench.yaml12 import Document

KEYS = frozenset(dotted_keys(ExperimentConfig))
_OF_OTHER_LAYERS = ("extra_forbidden", "value_error", "union_tag_not_found")
"""Errors that a layer alone cannot be blamed for: another one may choose the kind, or the value that a rule needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One key set to one value; `replaces` clears the part at `key` before the keys below it are set."""

    key: str
    value: Any
    place: Place
    replaces: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The assignments of one source, in order. `label` names it in `plan --explain`; `place` is where it stands."""

    label: str
    place: Place
    assignments: tuple[Assignment, ...] = ()
    scales: bool = False

    def asked(self) -> dict[str, Any]:
        """Return the keys that this layer sets, as plain values."""
        return {item.key: item.value for item in self.assignments if not item.replaces}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The value of a key and the layer that set it."""

    value: Any
    place: Place = DEFAULT
    label: str = "default"

    def where(self) -> str:
        """Return the layer and its place in one phrase."""
        return self.label if self.place in (DEFAULT, Place(self.label)) else f"{self.label} ({self.place})"


Settings = dict[str, Setting]


def read_layer(label: str, document: Document, path: tuple[str | int, ...], problems: Problems) -> Layer:
    """Read the `set` mapping at `path` of a document; unknown keys and keys set twice go to `problems`."""
    node = document.at(path)
    found: list[Assignment] = []
    if isinstance(node, dict):
        _read(node, "", path, document, found, problems)
    first: dict[str, Assignment] = {}
    for item in found:
        if item.key in first and not (item.replaces or first[item.key].replaces):
            problems.add(item.place, item.key, f"set twice; the first is on line {first[item.key].place.line}")
        first.setdefault(item.key, item)
    return Layer(label=label, place=document.place(path[:-1]), assignments=tuple(found))


def _read(
    node: dict[str, Any],
    prefix: str,
    path: tuple[str | int, ...],
    document: Document,
    found: list[Assignment],
    problems: Problems,
) -> None:
    """Append the assignments of one mapping that stands at the dotted key `prefix`."""
    for name in sorted(node, key=lambda name: name != "kind"):  # the kind first: it decides which keys there are
        key, place = prefix + name, document.place((*path, name))
        if key not in KEYS:
            problems.add(place, key, f"unknown key; {_near_key(key)}")
            continue
        value = node[name]
        if not (isinstance(value, dict) and _parts(key)):
            found.append(Assignment(key=key, value=value, place=place))
        elif "kind" in value and f"{key}.kind" in KEYS:
            found.append(Assignment(key=key, value=None, place=place, replaces=True))
            _read(value, f"{key}.", (*path, name), document, found, problems)
        elif value:
            _read(value, f"{key}.", (*path, name), document, found, problems)
        else:  # an empty mapping: the part is there, with its defaults
            found.append(Assignment(key=key, value={}, place=place))


def _near_key(key: str) -> str:
    """Say which key was probably meant: of the same part, else of any part, else name those of the part."""
    around, _, name = key.rpartition(".")
    beside = {known.rpartition(".")[2]: known for known in sorted(KEYS) if known.rpartition(".")[0] == around}
    anywhere = {known.rpartition(".")[2]: known for known in sorted(KEYS, reverse=True)}
    for names in (beside, anywhere):
        if near := get_close_matches(name, names, n=1, cutoff=0.6):
            return f"did you mean {names[near[0]]}?"
    return f"allowed: {', '.join(beside)}" if beside else f"allowed: {', '.join(ExperimentConfig.model_fields)}"


def _parts(key: str) -> list[type[Part]]:
    """Return the parts that may stand at a dotted key, over all kinds of the parts around it."""
    parts: list[type[Part]] = [ExperimentConfig]
    for name in key.split("."):
        fields = [part.model_fields[name] for part in parts if name in part.model_fields]
        parts = [member for field in fields for member in members(field.annotation)]
    return parts


def _of_kind(key: str, kind: object) -> type[Part] | None:
    """Return the member of the union at `key` with this kind, if there is one."""
    return next((part for part in _parts(key) if part.model_fields["kind"].default == kind), None)


def _defaults(part: Part, prefix: str) -> Settings:
    return {key: Setting(value=value) for key, value in flatten(part.model_dump(), prefix).items()}


@cache
def _all_defaults() -> Settings:
    return _defaults(ExperimentConfig(), "")


def apply(layers: Iterable[Layer]) -> Settings:
    """Lay the layers over the defaults; the result holds every key of the kinds that were chosen."""
    settings = dict(_all_defaults())
    waiting: list[tuple[Assignment, str]] = []
    named: set[str] = set()  # kinds that recipe and study name by themselves
    for layer in layers:
        replaced: list[str] = []  # parts whose kind the layer itself chooses: there it must know the keys
        for item in layer.assignments:
            chosen = any(item.key.startswith(f"{part}.") for part in replaced)
            if layer.scales and not chosen and item.key in named:
                continue
            if not layer.scales and item.key.endswith(".kind"):
                named.add(item.key)
            if layer.scales and not chosen and not _fits(item.key, settings):
                waiting.append((item, layer.label))
                continue
            replaced += [item.key] if item.replaces else []
            if item.replaces:  # the part starts anew: nothing that lower layers set is left
                waiting = [(other, label) for other, label in waiting if not clashes(other.key, item.key)]
            _assign(settings, item, layer.label)
            waiting = _wake(settings, waiting)
    return settings


def _fits(key: str, settings: Settings) -> bool:
    """Tell whether the parts around a key are there and of kinds that have it."""
    parts: list[type[Part]] = [ExperimentConfig]
    around = ""
    for name in key.split("."):
        if around and not any(setting.startswith(around) for setting in settings):
            here = settings.get(around.removesuffix("."))
            if here is None or here.value != {}:
                return False  # the part is null
        if len(parts) > 1:
            kind = settings.get(f"{around}kind")
            parts = [part for part in parts if kind and part.model_fields["kind"].default == kind.value]
        if not parts or name not in parts[0].model_fields:
            return False
        parts = members(parts[0].model_fields[name].annotation)
        around += f"{name}."
    return True


def _wake(settings: Settings, waiting: list[tuple[Assignment, str]]) -> list[tuple[Assignment, str]]:
    """Set what has waited for its part and finds it now, unless a later layer has set it; return what still waits."""
    still: list[tuple[Assignment, str]] = []
    for item, label in waiting:
        if _fits(item.key, settings) and not _set_later(item.key, label, settings):
            _assign(settings, item, label)
        else:
            still.append((item, label))
    return still


def _set_later(key: str, label: str, settings: Settings) -> bool:
    """Tell whether a layer other than `label` has set the key or one below it."""
    return any(
        setting.place != DEFAULT and setting.label != label
        for known, setting in settings.items()
        if f"{known}.".startswith(f"{key}.")
    )


def _assign(settings: Settings, item: Assignment, label: str) -> None:
    below = [key for key in settings if key.startswith(f"{item.key}.")]
    if item.replaces:
        _drop(settings, below)
        return
    if item.value == {} and below:
        return  # nothing to merge
    _drop(settings, below)
    for part in _ends(item.key)[1:]:
        settings.pop(part, None)  # a part that was null or empty now has keys
    settings[item.key] = Setting(value=item.value, place=item.place, label=label)
    if item.key.endswith(".kind"):
        _switch(settings, item.key.removesuffix(".kind"), item.value)


def _switch(settings: Settings, part_key: str, kind: object) -> None:
    """Give the part the keys of its new kind: those that a layer set stay, the others take its defaults."""
    part = _of_kind(part_key, kind)
    if part is None:
        return  # a misspelt kind is told by `resolve`
    prefix = f"{part_key}."
    kept = tuple(  # inner parts whose kind a layer chose: they have the keys that they need
        key.removesuffix("kind")
        for key, setting in settings.items()
        if key.startswith(prefix) and key.endswith(".kind") and key != f"{prefix}kind" and setting.place != DEFAULT
    )
    stale = [
        key
        for key, setting in settings.items()
        if key.startswith(prefix)
        and (
            (setting.place == DEFAULT and not key.startswith(kept))
            or key.removeprefix(prefix).split(".")[0] not in part.model_fields
        )
    ]
    _drop(settings, stale)
    for key, setting in _defaults(part(), prefix).items():
        if not key.startswith(kept) and not any(end in settings for end in _ends(key)):
            settings[key] = setting


def _drop(settings: Settings, keys: Iterable[str]) -> None:
    for key in keys:
        del settings[key]


def _nested(settings: Settings) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        *around, name = key.split(".")
        node = tree
        for part in around:
            node = node.setdefault(part, {})
        node[name] = setting.value
    return tree


def resolve(layers: Sequence[Layer], problems: Problems) -> tuple[ExperimentConfig | None, Settings]:
    """Return the configuration that the layers lead to, or None; each error is told where its key was set."""
    settings = apply(layers)
    details = _errors(settings)
    for detail in details:
        key = _key_of(detail, settings)
        rule = detail["type"] == "value_error"
        place = _trigger(detail, key, layers) if rule else _place_of(key, settings, layers)
        problems.add(place, key, in_words(detail, _allowed(detail, key, settings)))
    return None if details else ExperimentConfig.model_validate(_nested(settings)), settings


def explain(config: ExperimentConfig, settings: Settings) -> dict[str, tuple[Any, str]]:
    """Return each key of the configuration with its value, as JSON knows it, and the layer that set it."""
    found: dict[str, tuple[Any, str]] = {}
    for key, value in flatten(config.model_dump(mode="json")).items():
        around = next((settings[end] for end in _ends(key) if end in settings), Setting(value=None))
        found[key] = (value, around.where())
    return found


def _ends(key: str) -> list[str]:
    """Return the key and the parts around it, from the inside out."""
    names = key.split(".")
    return [".".join(names[:end]) for end in range(len(names), 0, -1)]


def _key_of(detail: ErrorDetails, settings: Settings) -> str:
    """Return the dotted key that pydantic means: its path without the kinds and list positions in between."""
    node: Any = _nested(settings)
    names: list[str] = []
    for part in detail["loc"]:
        if isinstance(node, dict) and part in node:
            names.append(str(part))
            node = node[part]
    return ".".join(names)


def _place_of(key: str, settings: Settings, layers: Sequence[Layer]) -> Place:
    """Return where the key, or for a whole part any key of it, was set last."""
    if key in settings:
        return settings[key].place
    set_below = [setting.place for name, setting in settings.items() if name.startswith(f"{key}.")]
    kind = settings.get(f"{key}.kind")
    return kind.place if kind else next((place for place in set_below if place != DEFAULT), layers[-1].place)


def _allowed(detail: ErrorDetails, key: str, settings: Settings) -> list[str]:
    """Return the keys that may stand beside an unknown one."""
    if detail["type"] != "extra_forbidden":
        return []
    part_key = key.rpartition(".")[0]
    kind = settings.get(f"{part_key}.kind")
    part = _of_kind(part_key, kind.value) if kind else None
    return list(part.model_fields) if part else []


def _trigger(detail: ErrorDetails, key: str, layers: Sequence[Layer]) -> Place:
    """Return where a rule across keys began to be broken: in the layer from which on its message stands to the end."""
    text = in_words(detail)
    first = len(layers)
    while first and text in _rules_broken(layers[: first - 1]):
        first -= 1
    layer = layers[max(first, 1) - 1]
    below = [item for item in layer.assignments if not item.replaces and f"{item.key}.".startswith(f"{key}.")]
    named = [item for item in below if re.search(rf"\b{item.key.rpartition('.')[2]}\b", text)]
    return (named or below)[-1].place if below else layer.place


def without_wrong_values(layer: Layer, problems: Problems) -> Layer:
    """Leave out, and tell, the values of a layer that are wrong in themselves, even where a later layer hides them."""
    settings = apply([layer])
    wrong: list[str] = []
    for detail in _errors(settings):
        if detail["type"] not in _OF_OTHER_LAYERS:
            key = _key_of(detail, settings)
            problems.add(_place_of(key, settings, [layer]), key, in_words(detail))
            wrong.append(key)
    sound = (item for item in layer.assignments if not any(f"{item.key}.".startswith(f"{key}.") for key in wrong))
    return replace(layer, assignments=tuple(sound))


def _errors(settings: Settings) -> list[ErrorDetails]:
    try:
        ExperimentConfig.model_validate(_nested(settings))
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _rules_broken(layers: Sequence[Layer]) -> set[str]:
    return {in_words(detail) for detail in _errors(apply(layers))}


def clashes(key: str, other: str) -> bool:
    """Tell whether two keys set the same thing: they are equal, or one is a part that holds the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
