"""From a study file to a Study: precedence, selection, claims, and every mistake told at once with its place."""

import json
import random
from pathlib import Path

import pytest

from core.config import LearnedQueries, SelectedQueries
from workbench.errors import StudyFileError
from workbench.problems import Problems
from workbench.study import Look, Term
from workbench.study_file import Selection, load_study, profile_names
from workbench.yaml12 import read_text

STUDIES = Path(__file__).parent.parent.parent / "studies"

HEAD = """\
version: 1
study: trying
question: Does it help?
"""
TAIL = """\
baseline: base
variants:
  base: {}
  other: {set: {loss.auxiliary: false}}
  third: {set: {model.position.level_embed: false}}
claims:
  - {id: better, text: Other is better., plus: other, minus: base, metric: ap, kind: superiority}
scope: seeds
"""
SCALE = """\
looks: {seeds: [5, 10], alpha: [0.03, 0.02]}
margins: {ap: 0.02}
set:
  data: {kind: shapes, side: 64, num_train: 16, num_val: 8}
  model.decoder.num_layers: 2
"""


@pytest.fixture
def write(tmp_path):
    """Return a writer of a study with its profile `laptop`: returns the path of the study file."""

    def write(text, profile=SCALE):
        (tmp_path / "profiles").mkdir(exist_ok=True)
        (tmp_path / "profiles" / "laptop.yaml").write_text(profile)
        path = tmp_path / "trying.yaml"
        path.write_text(text)
        return path

    return write


def mistakes(path, **selection):
    """Return the problem lines of a study, with the folder cut off."""
    with pytest.raises(StudyFileError) as error:
        load_study(path, Selection(**selection))
    return [line.replace(f"{path.parent}/", "") for line in str(error.value).splitlines()]


def test_layers_win_in_order(write):
    """Default, study, profile, the study's own block, variant, --set: the later wins, and each key says who set it."""
    text = HEAD + "set: {training.epochs: 1, training.lr: 0.1, model.decoder.num_layers: 9, loss.weight_l1: 1}\n" + TAIL
    text += "profiles: {laptop: {set: {training.lr: 0.2, loss.weight_giou: 1}}}\n"
    study = load_study(write(text), Selection(sets=("loss.weight_giou=3",)))
    base, other = study.variants[0].config, study.variants[1].config
    assert base.model.encoder.num_layers == 6
    assert base.training.epochs == 1
    assert base.model.decoder.num_layers == 2
    assert base.training.lr == 0.2
    assert other.loss.auxiliary is False
    assert base.loss.weight_giou == 3.0
    where = {key: place for key, (_, place) in study.layers["other"].items()}
    assert where["model.encoder.num_layers"] == "default"
    assert where["training.epochs"] == f"study ({study.path}:4:7)"
    assert where["model.decoder.num_layers"] == f"profile laptop ({study.path.parent / 'profiles/laptop.yaml'}:5:3)"
    assert where["training.lr"] == f"profile laptop ({study.path}:13:27)"
    assert where["loss.auxiliary"] == f"variant other ({study.path}:8:17)"
    assert where["loss.weight_giou"] == "--set (--set loss.weight_giou=3)"


def test_dotted_and_nested_keys_are_the_same(write):
    """Mappings merge key by key, however the key is written."""
    dotted = load_study(write(HEAD + "set: {model.decoder.attention.num_points: 3, model.heads: separate}\n" + TAIL))
    nested = load_study(write(HEAD + "set: {model: {decoder: {attention: {num_points: 3}}, heads: separate}}\n" + TAIL))
    assert dotted.variants == nested.variants
    assert dotted.variants[0].config.model.decoder.num_layers == 2


def test_mapping_with_a_kind_replaces_and_the_dotted_kind_switches(write):
    """`part: {kind: ...}` takes the defaults of the kind; `part.kind` keeps what was set of the keys that both have."""
    base = "set: {model.queries: {num_queries: 7, reference: box}, model.encoder_supervision: {}}\n"
    profile = SCALE.replace("set:\n", "set:\n  model.queries: {kind: selected}\n")
    replaced = load_study(write(HEAD + base + TAIL, profile)).variants[0].config.model.queries
    assert replaced == SelectedQueries(num_queries=300)
    profile = SCALE.replace("set:\n", "set:\n  model.queries.kind: selected\n")
    switched = load_study(write(HEAD + base + TAIL, profile)).variants[0].config.model.queries
    assert switched == SelectedQueries(num_queries=7)
    kept = load_study(write(HEAD + base + TAIL)).variants[0].config.model.queries
    assert kept == LearnedQueries(num_queries=7, reference="box")


def test_part_that_may_be_absent(write):
    """An empty mapping makes a part with its defaults, null takes it away, and a key brings it back."""
    study = HEAD + "set: {model.encoder_supervision: %s}\n" + TAIL
    options = ("model.encoder_supervision.labels=class_aware",)
    assert load_study(write(study % "{}")).variants[0].config.model.encoder_supervision.labels == "binary"
    assert load_study(write(study % "null")).variants[0].config.model.encoder_supervision is None
    found = load_study(write(study % "null"), Selection(sets=options)).variants[0].config.model.encoder_supervision
    assert found is not None
    assert found.labels == "class_aware"
    off = load_study(write(study % "{}"), Selection(sets=("model.encoder_supervision=null",))).variants[0].config
    assert off.model.encoder_supervision is None


def test_selection_of_variants(write):
    """A profile's block may narrow the variants, --variants overrides it, and the baseline is always first."""
    path = write(HEAD + TAIL + "profiles: {laptop: {variants: [third]}}\n")
    assert [variant.name for variant in load_study(path).variants] == ["base", "third"]
    assert load_study(path).claims[0].missing == ("other",)
    chosen = load_study(path, Selection(variants=("other",)))
    assert [variant.name for variant in chosen.variants] == ["base", "other"]
    assert chosen.claims[0].missing == ()
    assert len(load_study(path, Selection(variants=("all",))).variants) == 3


def test_looks_seeds_and_budget(write):
    """The profile plans the looks; --seeds asks for one look at alpha .05, and --budget replaces the profile's."""
    path = write(HEAD + TAIL, SCALE + "budget: 1h30m\n")
    study = load_study(path)
    assert study.looks == (Look(seeds=5, alpha=0.03), Look(seeds=10, alpha=0.02))
    assert study.seeds == tuple(range(10))
    assert study.budget_seconds == 5400.0
    study = load_study(path, Selection(seeds=2, budget="10m"))
    assert study.looks == (Look(seeds=2, alpha=0.05),)
    assert study.seeds == (0, 1)
    assert study.budget_seconds == 600.0


def test_plus_and_minus_are_two_terms(write):
    """The sugar stands for weights 1 and -1; the margin comes from the profile unless the claim names one."""
    claim = load_study(write(HEAD + TAIL)).claims[0]
    assert claim.terms == (
        Term(variant="other", metric="ap", weight=1.0, parameters="averaged"),
        Term(variant="base", metric="ap", weight=-1.0, parameters="averaged"),
    )
    assert claim.margin == 0.02
    own = load_study(write(HEAD + TAIL.replace("kind: superiority", "kind: superiority, margin: 0.005"))).claims[0]
    assert own.margin == 0.005


def test_terms_spell_out_any_contrast(write):
    """Each term has its weight, its metric or the claim's, and its parameters or those its variant is scored with."""
    first, rest = (
        "{variant: other, weight: 1, parameters: raw}",
        "{variant: base, weight: -2}, {variant: third, weight: 1}",
    )
    terms = f"terms: [{first}, {rest}]"
    text = TAIL.replace("plus: other, minus: base", terms)
    claim = load_study(write(HEAD + "set: {evaluation.parameters: averaged}\n" + text)).claims[0]
    assert [(term.variant, term.weight, term.parameters) for term in claim.terms] == [
        ("other", 1.0, "raw"),
        ("base", -2.0, "averaged"),
        ("third", 1.0, "averaged"),
    ]
    raw = load_study(write(HEAD + "set: {evaluation.parameters: raw}\n" + TAIL)).claims[0]
    assert {term.parameters for term in raw.terms} == {"raw"}


def test_data_folder_chooses_pictures_and_becomes_absolute(write, tmp_path, monkeypatch):
    """--data alone chooses the profile `pictures` and sets data.root; with drawn pictures it is an error."""
    path = write(HEAD + TAIL)
    (tmp_path / "profiles" / "pictures.yaml").write_text(
        SCALE.replace("kind: shapes, side: 64, num_train: 16, num_val: 8", "kind: coco")
    )
    monkeypatch.chdir(tmp_path)
    study = load_study(path, Selection(data=Path("photos")))
    assert study.profile == "pictures"
    assert study.variants[0].config.data.root == str(tmp_path / "photos")
    assert mistakes(path, profile="laptop", data=Path("photos")) == [
        "--data photos: profile laptop draws its pictures: drop --profile or --data"
    ]


def test_smoke_gives_no_verdicts(write):
    """A profile may say that it never gives a verdict."""
    assert load_study(write(HEAD + TAIL, SCALE + "verdicts: false\n")).gives_verdicts is False
    assert load_study(write(HEAD + TAIL)).gives_verdicts is True


def test_profiles_beside_the_study_go_before_the_shipped_ones(write, tmp_path):
    """A study elsewhere can use the shipped profiles, and its own files replace them."""
    path = write(HEAD + TAIL)
    assert {"laptop", "smoke", "coco"} <= set(profile_names(path))
    assert load_study(path).variants[0].config.data.side == 64
    assert load_study(path, Selection(profile="smoke")).gives_verdicts is False


def test_all_mistakes_are_told_at_once(write):
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
    found = mistakes(write(text))
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
def test_single_mistake_is_one_line(write, old, new, message):
    """Each mistake is told once, where it was made, without followers."""
    text = (HEAD + TAIL).replace(old, new)
    assert text != HEAD + TAIL
    (line,) = mistakes(write(text))
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
def test_mistake_in_a_profile_is_told_in_its_file(write, old, new, message):
    """What is wrong in a profile, by itself or against the study, is told at its own line."""
    lines = mistakes(write(HEAD + TAIL, SCALE.replace(old, new)))
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
def test_mistake_on_the_command_line_names_the_option(write, selection, message):
    """What is wrong with an option is told with the option as it was typed, and nothing else is."""
    (line,) = mistakes(write(HEAD + TAIL), **selection)
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
def test_no_file_ends_in_a_traceback(write, change):
    """A hundred mutilated copies of the shipped study either load or are refused with at least one placed problem."""
    original = (STUDIES / "refinement_detach.yaml").read_text()
    told: list[str] = []
    for seed in range(100):
        path = write(change(original, random.Random(seed)))
        try:
            load_study(path, Selection(variants=("all",)))
        except StudyFileError as error:
            told.append(str(error))
    assert len(told) > 50
    assert [text for text in told if not all(line.startswith(str(path.parent)) for line in text.splitlines())] == []
