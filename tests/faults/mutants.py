"""Study files that nobody would write: mutations of sound ones, by their text and by their structure, seeded."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

STUDY = """\
version: 1
study: mutant
question: "Does a heavier box loss help?"
recipe: deformable_refine
set: {training.lr_backbone: 1.0e-3}
baseline: plain
variants:
  plain: {}
  sharp:
    why: boxes weigh more
    set: {loss.weight_giou: 4.0, loss.matcher: {cost_l1: 6.0}}
  own: {set: {loss.auxiliary: false, training.weight_decay: 0.0}}
claims:
  - {id: sharp_better, text: Sharp is better., plus: sharp, minus: plain, metric: ap, kind: superiority}
  - id: sum
    text: Together they are as good.
    kind: equivalence
    margin: .03
    metric: ap50
    family: both
    terms:
      - {variant: sharp, weight: 1.0, parameters: raw}
      - {variant: own, weight: -1}
scope: seeds
profiles:
  tiny: {looks: {seeds: [2, 3], alpha: [.03, .02]}, budget: 1h30m, set: {training.epochs: 1}}
execution: {retries: 1, stall_after: 90s, quota: 2GB}
"""

PROFILE = """\
verdicts: false
looks: {seeds: [2], alpha: [0.05]}
margins: {ap: 0.02, ap50: .03}
execution: {gpus: .5}
set: {data: {kind: shapes, side: 64, num_train: 64, num_val: 24}, training.batch_size: 8}
"""

FRAGMENTS = (
    *("{", "}", "[", "]", ":", "- ", "? ", "&a ", "*a", "*b", "!!python/object:os.system ", "!x ", "|", ">", "#", "%"),
    *(
        "\t",
        "\n",
        "\r\n",
        "\n\n\n",
        "---\n",
        "...\n",
        "<<: ",
        "'",
        '"',
        "\\",
        "\\x00",
        "\x00",
        "\x07",
        "\x85",
        "\ufeff",
    ),
    *("\u2028", "\ud800", "é", "日本", "😀", "\u202e", "\x7f", "~", "null", "true", "off", "on", "yes", "Infinity"),
    *("0", "-1", "010", "0x1f", "0o17", "1e-4", "1e400", ".inf", "-.INF", ".nan", "1_000", "9" * 17, "9" * 400, "-0.0"),
    *("2026-11-22", "12:30:45", "../../../etc/passwd", "/dev/zero", "~/x", "kind: custom", "target: 'os:system'"),
    *("a: " * 25, "[" * 30, "{a: " * 30, "  " * 40, "x" * 3000, "&a [*a, *a]", "${HOME}", "{{ x }}", "%s%s%n"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 10**17, -(10**17), 0.0, -0.5, 1e-300, 1e300, "", " ", "off", "no", "\n", "é😀"),
    *([], {}, [[]], [None], {"a": 1}, [1, "x", {}], "x" * 5000, "raw", "all", "superiority", "coco", "custom"),
    *({"kind": "custom", "target": "os:system"}, {"kind": "custom"}, {"kind": "learned"}, {"kind": 3}, {"kind": None}),
    *("http://user:secret@host", "../../x", [0] * 2000, {str(i): i for i in range(1500)}),
)


_TREE = yaml.safe_load(STUDY)


def text_mutant(rng: random.Random, text: str) -> bytes:
    """Return the text with one to four wounds."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        text = rng.choice(_WOUNDS)(rng, text)
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((0, 0, 0, 1, 5))):  # bytes that need not be UTF-8 any more
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def structure_mutant(rng: random.Random) -> bytes:
    """Return well-formed YAML whose keys, values or shape are others than the study's."""
    tree = copy.deepcopy(_TREE)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        holder, key = rng.choice(_places(tree))
        rng.choice(_CHANGES)(rng, holder, key)
    return json.dumps(tree, indent=rng.choice((None, 1))).encode()  # which is YAML as well


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Return every (mapping or list, key) of a tree, from outside in."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in entries for found in ((node, key), *_places(value))] or [([None], 0)]


def _insert(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(FRAGMENTS) + text[at:]


def _replace(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text) + 1)
    return text[:start] + rng.choice(FRAGMENTS) + text[start + rng.randrange(12) :]


def _delete(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text) + 1)
    return text[:start] + text[start + rng.randrange(40) :]


def _of_lines(change: Callable[[random.Random, list[str]], None]) -> Callable[[random.Random, str], str]:
    def wound(rng: random.Random, text: str) -> str:
        lines = text.split("\n")
        change(rng, lines)
        return "\n".join(lines)

    return wound


def _indent(rng: random.Random, lines: list[str]) -> None:
    at = rng.randrange(len(lines))
    lines[at] = rng.choice(("  ", " ", "\t")) + lines[at] if rng.random() < 0.5 else lines[at].lstrip()


def _repeat(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))


def _drop(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines))]


def _swap(rng: random.Random, lines: list[str]) -> None:
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


_WOUNDS = (_insert, _insert, _replace, _replace, _delete, *map(_of_lines, (_indent, _repeat, _drop, _swap)))


def _set_value(rng: random.Random, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(rng.choice(VALUES))


def _rename(rng: random.Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        name = str(key)
        at = rng.randrange(len(name) + 1)
        holder[rng.choice((name[:at] + name[at + 1 :], name + "x", name.upper(), "", "kind", "set"))] = holder.pop(key)


def _remove(_rng: random.Random, holder: Any, key: Any) -> None:
    del holder[key]


def _nest(rng: random.Random, holder: Any, key: Any) -> None:
    for _ in range(rng.choice((1, 2, 30))):
        holder[key] = {str(key): holder[key]} if rng.random() < 0.5 else [holder[key]]


def _graft(rng: random.Random, holder: Any, key: Any) -> None:
    there, at = rng.choice(_places(_TREE))
    holder[key] = copy.deepcopy(there[at])


_CHANGES = (_set_value, _set_value, _set_value, _rename, _rename, _remove, _nest, _graft)
