"""Every mistake of a study file is told at once, with its place, what is allowed and what was probably meant."""

import json
import random
from pathlib import Path

import pytest
from trying import HEAD, SCALE, TAIL, mistakes

from workbench.errors import StudyFileError
from workbench.problems import Problems
from workbench.study_file import Selection, load_study
from workbench.yaml12 import read_text

STUDIES = Path(__file__).parent.parent.parent / "studies"


def test_all_mistakes_are_told_at_once(write_study):
    """One reading tells the mistakes of every section, each with its place, what is allowed and what was meant."""
    text = """\
version: 1
study: trying
question: Does it help?
set:
  model.decoder.numlayers: 3
  training.lr: fast
  training.epochs: 2.5
baseline: bas
variants:
  base: {}
  same: {}
  wide: {set: {model.hidden_dim: 66}}
  wide: {set: {model.hidden_dim: 64}}
  other: {sett: {loss.auxiliary: false}}
  two_stage: {set: {model.queries: {kind: selcted}}}
claims:
  - {id: a, text: A, plus: wide, minus: bse, metric: app, kind: better, margin: 2}
  - {id: b, text: B, plus: wide, minus: wide, metric: ap, kind: equivalence}
  - {id: b, text: C, plus: wide, minus: base, metric: ap50, kind: equivalence}
scope: pictures
profile: {}
profiles:
  laptop: {variants: [base, wid], set: {model.hidden_dim: 32}, margins: {ap: 2}}
  lapto: {}
"""
    found = mistakes(write_study(text))
    expected = [
        "trying.yaml:5:3: model.decoder.numlayers: unknown key; did you mean model.decoder.num_layers?",
        "trying.yaml:6:3: training.lr: found the text 'fast'; allowed: a number",
        "trying.yaml:7:3: training.epochs: found 2.5; allowed: a whole number",
        "trying.yaml:8:11: baseline: no such variant: 'bas'; did you mean base?",
        "trying.yaml:11:3: variants.same: computes the same as variant base: set what differs, or remove it",
        "trying.yaml:12:16: model: hidden_dim 66 is not divisible by num_heads 8: choose a multiple",
        "trying.yaml:13:3: variants.wide: given twice; the first is on line 12",
        "trying.yaml:14:11: variants.other.sett: unknown key; did you mean set? allowed: why, set",
        "trying.yaml:15:37: model.queries: kind 'selcted': did you mean selected? allowed: learned, selected",
        "trying.yaml:17:41: claims[0].minus: no such variant: 'bse'; did you mean base?",
        "trying.yaml:17:54: claims[0].metric: no such metric: 'app'; did you mean ap?",
        "trying.yaml:17:65: claims[0].kind: found the text 'better'; allowed: superiority or equivalence",
        "trying.yaml:17:81: claims[0].margin: 2 is above 0.2: margins are fractions, not points; did you mean 0.02?",
        "trying.yaml:18:5: claims[1]: compares a score with itself",
        "trying.yaml:19:10: claims[2].id: two claims have the id b",
        "trying.yaml:20:8: scope: found the text 'pictures'; allowed: seeds",
        "trying.yaml:21:1: profile: unknown key; did you mean profiles?",
        "trying.yaml:23:29: profiles.laptop.variants[1]: no such variant: 'wid'; did you mean wide?",
        "trying.yaml:23:41: model.hidden_dim: variant wide sets model.hidden_dim (trying.yaml:12:16)",
        "trying.yaml:23:78: profiles.laptop.margins.ap: 2 is above 0.2: margins are fractions, not points",
        "trying.yaml:24:3: profiles.lapto: no such profile: 'lapto'; did you mean laptop?",
    ]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: base\n", "", "trying.yaml:1:1: baseline: is missing"),
        ("plus: other, ", "", "trying.yaml:10:5: claims[0]: needs plus and minus, or terms instead of them"),
        ("metric: ap, ", "", "trying.yaml:10:5: claims[0]: needs a metric"),
        ("metric: ap, ", "metric: ap75, ", "trying.yaml:10:5: claims[0]: needs a margin: neither it nor the profile's"),
        ("plus: other, ", "plus: base, ", "trying.yaml:10:5: claims[0]: compares a score with itself"),
        (
            "plus: other, minus: base",
            "terms: [{variant: other, weight: 1}, {variant: base, weight: -2}]",
            "trying.yaml:10:49: claims[0].terms: compares nothing: the weights must add up to 0",
        ),
        ("{loss.auxiliary: false}", "[loss.auxiliary]", "trying.yaml:7:16: variants.other.set: found a list; allowed"),
        ("{loss.auxiliary: false}", "{loss.auxiliary: off}", "found the text 'off'; allowed: true or false"),
        ("{loss.auxiliary: false}", "{model.heads: none}", "found the text 'none'; allowed: shared or separate"),
        ("{loss.auxiliary: false}", "{model.strides: [8, 8]}", "strides [8, 8] must rise without repetition"),
        ("{loss.auxiliary: false}", "{training.threads: 2}", "variants.other: computes the same as the baseline base"),
        ("level_embed: false", "level_embed: true", "variants.third: computes the same as the baseline base"),
        ("{model.position.level_embed: false}", "{loss: {auxiliary: false}}", "computes the same as variant other"),
        ("{loss.auxiliary: false}", "{model.backbone.width: 8}", "trying.yaml:7:17: model.backbone.width: unknown key"),
        (
            "{loss.auxiliary: false}",
            "{loss.classification: {kind: iou_aware}}",
            "variants.other.set: changes loss.classification.alpha from 0.25 to 0.75 without asking for it",
        ),
        (
            "{loss.auxiliary: false}",
            "{model.queries.kind: selected}",
            "trying.yaml:7:17: model: selected queries need supervised proposals",
        ),
        ("scope: seeds", "scope: seeds\nprofiles: {laptpo: {}}", "did you mean laptop?"),
        ("scope: seeds", "scope: seeds\nprofiles: {smoke: {set: {training.lr: x}}}", "training.lr: found the text 'x'"),
        (
            "study: trying",
            "study: try ing",
            "trying.yaml:2:8: study: found the text 'try ing'; allowed: text of the form",
        ),
        ("version: 1", "version: 2", "trying.yaml:1:10: version: found 2; allowed: 1"),
    ],
)
def test_single_mistake_is_one_line(write_study, old, new, message):
    """Each mistake is told once, where it was made, without followers."""
    text = (HEAD + TAIL).replace(old, new)
    assert text != HEAD + TAIL
    (line,) = mistakes(write_study(text))
    assert message in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "model.decoder.num_layers: 2",
            "loss.auxiliary: false",
            "variant other sets loss.auxiliary (trying.yaml:7:17)",
        ),
        ("model.decoder.num_layers: 2", "model.position: {level_embed: true}", "so profile laptop may not"),
        (
            "model.decoder.num_layers: 2",
            "model.num_heads: 7",
            "laptop.yaml:5:3: model: hidden_dim 256 is not divisible",
        ),
        ("side: 64", "side: big", "laptop.yaml:4:24: data.side: found the text 'big'; allowed: a whole number"),
        ("side: 64", "side: 8", "laptop.yaml:4:24: data.side: found 8; allowed: at least 32"),
        (
            "{ap: 0.02}",
            "{ap: 2}",
            "laptop.yaml:2:15: margins.ap: 2 is above 0.2: margins are fractions, not points; did",
        ),
        ("{ap: 0.02}", "{app: 0.02}", "laptop.yaml:2:11: margins.app: no such metric: 'app'; did you mean ap?"),
        ("[5, 10]", "[10, 5]", "laptop.yaml:1:1: looks: needs rising numbers of seeds, and one alpha for each"),
        ("[5, 10]", "[5]", "laptop.yaml:1:1: looks: needs rising numbers of seeds, and one alpha for each"),
        ("looks:", "look:", "laptop.yaml:1:1: look: unknown key; did you mean looks?"),
        ("margins: {ap: 0.02}", "budget: soon", "budget: found the text 'soon'; allowed: a duration such as 90s"),
    ],
)
def test_mistake_in_a_profile_is_told_in_its_file(write_study, old, new, message):
    """What is wrong in a profile, by itself or against the study, is told at its own line."""
    lines = mistakes(write_study(HEAD + TAIL, SCALE.replace(old, new)))
    assert any(message in line for line in lines)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"sets": ("model.heds=1",)}, "--set model.heds=1: model.heds: unknown key; did you mean model.heads?"),
        ({"sets": ("model.heads",)}, "--set model.heads: must have the form KEY=VALUE"),
        ({"sets": ("model.heads=[",)}, "--set model.heads=[: is not YAML"),
        ({"sets": ("model.heads=x",)}, "--set model.heads=x: model.heads: found the text 'x'; allowed: shared or"),
        ({"sets": ("model.num_heads=7",)}, "--set model.num_heads=7: model: hidden_dim 256 is not divisible"),
        ({"sets": ("loss.auxiliary=true",)}, "variant other sets loss.auxiliary (trying.yaml:7:17), so --set may not"),
        ({"sets": ("loss={auxiliary: true}",)}, "variant other sets loss.auxiliary"),
        ({"profile": "laptpo"}, "--profile laptpo: no such profile: 'laptpo'; did you mean laptop?"),
        ({"variants": ("othr",)}, "--variants othr: no such variant: 'othr'; did you mean other?"),
        ({"seeds": 0}, "--seeds 0: allowed: 1 to 1000"),
        ({"budget": "soon"}, "--budget soon: found the text 'soon'; allowed: a duration"),
    ],
)
def test_mistake_on_the_command_line_names_the_option(write_study, selection, message):
    """What is wrong with an option is told with the option as it was typed, and nothing else is."""
    (line,) = mistakes(write_study(HEAD + TAIL), **selection)
    assert message in line


ODD_VALUES = (
    None,
    "",
    -1,
    0.5,
    2**40,
    True,
    [],
    {},
    [[]],
    {"kind": "nope"},
    {"kind": ["a"]},
    "off",
    {"set": {}},
    "a.b",
)
ODD_TEXT = "{}[]:,-\n\t \"'#&*!|>%@`\\\x00\x07?<01e.x"


def _paths(tree, path=()):
    yield path
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from _paths(value, (*path, key))


def _changed_tree(text, rng):
    """The study with some values replaced, removed or put under another key."""
    tree = read_text(text, "study", Problems()).value
    for _ in range(rng.randint(1, 3)):
        *around, key = rng.choice([path for path in _paths(tree) if path])
        node = tree
        for part in around:
            node = node[part]
        match rng.choice(("replace", "remove", "add")):
            case "replace":
                node[key] = rng.choice(ODD_VALUES)
            case "remove":
                del node[key]
            case "add" if isinstance(node, dict):
                node[rng.choice(("kind", "set", "model", "model.queries.kind", "looks", f"{key}x"))] = node[key]
    return json.dumps(tree)


def _changed_text(text, rng):
    """The study with pieces cut out, repeated or replaced by what YAML gives a meaning to."""
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(text))
        end = start + rng.randint(1, 30)
        put = rng.choice(("", text[start:end] * 2, rng.choice(ODD_TEXT), rng.choice(ODD_TEXT) * 40))
        text = text[:start] + put + text[end:]
    return text


@pytest.mark.parametrize("change", [_changed_tree, _changed_text])
def test_no_file_ends_in_a_traceback(write_study, change):
    """A hundred mutilated copies of the shipped study either load or are refused with at least one placed problem."""
    original = (STUDIES / "refinement_detach.yaml").read_text()
    told: list[str] = []
    for seed in range(100):
        path = write_study(change(original, random.Random(seed)))
        try:
            load_study(path, Selection(variants=("all",)))
        except StudyFileError as error:
            told.append(str(error))
    assert len(told) > 50
    assert [text for text in told if not all(line.startswith(str(path.parent)) for line in text.splitlines())] == []
