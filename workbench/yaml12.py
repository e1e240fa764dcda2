"""Read YAML by the rules of YAML 1.2's core schema, and remember where every key and value stands.

PyYAML reads YAML 1.1, in which `off` is false, `1e-4` is text, `010` is 8, `2026-11-22` a date and the second of two
equal keys silently wins. Its scanner and parser are kept; what a scalar means is decided here:

- true and false are the only booleans; off, on, yes and no are text;
- 1e-4 is a number; 0x1f and 0o17 are whole numbers; 010 is refused, since 1.1 reads 8 and 1.2 reads 10;
- numbers are finite and fit 18 digits; there are no dates, tags or merge keys; keys are text;
- a key given twice is an error that names both lines;
- size, nesting and what aliases expand to are limited.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from workbench.problems import Place, Problems, as_key
from workbench.terminal import STEERING

LARGEST_FILE = 100_000  # characters
DEEPEST = 20  # nested mappings and lists
MOST_NODES = 20_000  # after aliases are expanded
MOST_ENTRIES = 1_000  # of one mapping or list
LONGEST_KEY = 200  # characters

Path_ = tuple[str | int, ...]

_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = {"", "~", "null", "Null", "NULL"}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
MOST_DIGITS = 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Plain values with the place of each key and each value. `value` is None when nothing could be read."""

    source: str
    value: Any
    keys: dict[Path_, Place] = field(default_factory=dict)
    values: dict[Path_, Place] = field(default_factory=dict)

    def at(self, path: Path_) -> Any:
        """Return the value at `path`; None where there is none."""
        node = self.value
        for part in path:
            if isinstance(node, dict):
                node = node.get(part)
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return None
        return node

    def names(self, *path: str) -> list[str]:
        """Return the keys of the mapping at `path`; none where there is no mapping."""
        node = self.at(path)
        return list(node) if isinstance(node, dict) else []

    def place(self, path: Path_) -> Place:
        """Return where the key at `path` stands, or its value (list items), or the nearest thing around it."""
        for end in range(len(path), -1, -1):
            for known in (self.keys, self.values):
                if path[:end] in known:
                    return known[path[:end]]
        return Place(self.source, 1, 1)

    def value_place(self, path: Path_) -> Place:
        """Return where the value at `path` begins, or the nearest thing around it."""
        return self.values.get(path) or self.place(path)


def read_file(path: Path, problems: Problems) -> Document:
    """Read one file; what is wrong with it goes to `problems`."""
    try:
        raw = beginning(path)
    except OSError as error:
        problems.add(Place(str(path)), "", f"cannot be read: {error.strerror}")
        return Document(source=str(path), value=None)
    return read_bytes(raw, str(path), problems)


def beginning(path: Path) -> bytes:
    """Return as many bytes of a file as are enough to read it, or to tell that it is too large; raises OSError."""
    with path.open("rb") as file:
        return file.read(LARGEST_FILE * 4 + 1)  # UTF-8 has at most 4 bytes a character


def read_bytes(raw: bytes, source: str, problems: Problems) -> Document:
    """Read what a file begins with; what is wrong with it goes to `problems` under the name `source`."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add(Place(source, raw[: error.start].count(b"\n") + 1, 1), "", "is not UTF-8 text")
        return Document(source=source, value=None)
    return read_text(text, source, problems)


def read_text(text: str, source: str, problems: Problems) -> Document:
    """Read one YAML document; what is wrong with it goes to `problems` under the name `source`."""
    document = Document(source=source, value=None)
    if len(text) > LARGEST_FILE:
        problems.add(Place(source), "", f"has {len(text)} characters; allowed: {LARGEST_FILE}")
        return document
    try:
        root = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
        remedy = "; indent with spaces" if "'\\t'" in (error.problem or "") else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        problems.add(place, "", f"is not YAML: {reason}{remedy}")
        return document
    except yaml.YAMLError as error:  # a character that YAML does not allow
        problems.add(Place(source), "", f"is not YAML: {str(error).splitlines()[0]}")
        return document
    except (ValueError, OverflowError) as error:  # PyYAML turns "\UFFFFFFFF" into a character without looking
        problems.add(Place(source), "", f"is not YAML: {error}")
        return document
    if root is None:
        problems.add(Place(source), "", "is empty")
        return document
    return _Reader(document, problems).read(root)


class _Composer(yaml.SafeLoader):
    """PyYAML's parser, with bounded nesting; says of a scalar only whether it was plain or quoted."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            event: Any = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEEPEST} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:  # noqa: ARG002 - PyYAML's signature
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "quoted"
        return "collection"


class _Stop(Exception):  # noqa: N818 - ends the reading of a document, never seen outside
    """Nothing more of this document can be read."""


class _Reader:
    """Turns PyYAML's nodes into plain values."""

    def __init__(self, document: Document, problems: Problems) -> None:
        self._document = document
        self._problems = problems
        self._nodes = 0

    def read(self, root: yaml.Node) -> Document:
        document = self._document
        try:
            value = self._value(root, ())
        except _Stop:
            return Document(source=document.source, value=None)
        value = None if value is _REFUSED else value
        return Document(source=document.source, value=value, keys=document.keys, values=document.values)

    def _value(self, node: yaml.Node, path: Path_) -> Any:
        place = self._place(node)
        self._document.values[path] = place
        self._nodes += 1
        if self._nodes > MOST_NODES or len(path) > DEEPEST:
            limit = f"more than {MOST_NODES} values" if self._nodes > MOST_NODES else f"more than {DEEPEST} levels"
            self._problems.add(place, as_key(path), f"aliases expand to {limit}")
            raise _Stop
        if node.tag not in ("plain", "quoted", "collection"):
            self._problems.add(place, as_key(path), f"the tag {node.tag} is not read; write the value alone")
            return _REFUSED
        if isinstance(node, yaml.CollectionNode) and len(node.value) > MOST_ENTRIES:
            self._problems.add(place, as_key(path), f"has {len(node.value)} entries; allowed: {MOST_ENTRIES}")
            raise _Stop
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = [self._value(item, (*path, position)) for position, item in enumerate(node.value)]
            return _REFUSED if any(item is _REFUSED for item in items) else items
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            key = _key(key_node)
            if key is None:
                self._problems.add(place, as_key(path), "a key must be text: quote it; there are no merge keys (<<)")
            elif len(key) > LONGEST_KEY:
                self._problems.add(place, as_key(path), f"a key of {len(key)} characters; allowed: {LONGEST_KEY}")
            elif (*path, key) in self._document.keys:
                first = self._document.keys[(*path, key)]
                self._problems.add(place, as_key((*path, key)), f"given twice; the first is on line {first.line}")
            else:
                self._document.keys[(*path, key)] = place
                value = self._value(value_node, (*path, key))
                if value is not _REFUSED:
                    values[key] = value
        return values

    def _scalar(self, node: yaml.Node, path: Path_) -> Any:
        value = node.value if node.tag == "quoted" else _plain(node.value)
        problem = value if isinstance(value, _Refused) else None
        if isinstance(value, str) and (bad := STEERING.search(value)):
            problem = _Refused(f"the character {bad.group()!r} is not allowed")
        if problem:
            self._problems.add(self._place(node), as_key(path), problem.text)
            return _REFUSED
        return value

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._document.source, node.start_mark.line + 1, node.start_mark.column + 1)


@dataclass(frozen=True, slots=True)
class _Refused:
    """Why a plain scalar has no value."""

    text: str


_REFUSED = _Refused("")  # stands for a value whose problem is told; its key is left out


def _key(node: yaml.Node) -> str | None:
    """Return a key, or None where it is not plain text."""
    if not isinstance(node, yaml.ScalarNode) or node.value == "<<" or STEERING.search(node.value):
        return None
    return node.value if node.tag == "quoted" or isinstance(_plain(node.value), str) else None


def _plain(text: str) -> Any:
    """Return what an unquoted scalar means."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _DECIMAL.fullmatch(text) or _OTHER_BASE.fullmatch(text):
        if len(text) > MOST_DIGITS:
            return _Refused(f"a number of more than {MOST_DIGITS} digits")
        return int(text, 0)
    if _LEADING_ZERO.fullmatch(text):
        decimal = text.lstrip("+-").lstrip("0") or "0"
        return _Refused(f"a leading zero is read in two ways; write {decimal[:MOST_DIGITS]}, or 0o for base 8")
    if _FLOAT.fullmatch(text):
        number = float(text)
        return number if abs(number) != float("inf") else _Refused(f"found {text}; allowed: a finite number")
    if _NOT_FINITE.fullmatch(text):
        return _Refused(f"found {text}; allowed: a finite number")
    return text
