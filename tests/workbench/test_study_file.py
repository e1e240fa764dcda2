"""From a study file to a Study: precedence, selection and claims."""

from pathlib import Path

from trying import HEAD, SCALE, TAIL, mistakes

from core.config import LearnedQueries, SelectedQueries
from workbench.study import Look, Term
from workbench.study_file import Selection, load_study, profile_names


def test_layers_win_in_order(write_study):
    """Default, study, profile, the study's own block, variant, --set: the later wins, and each key says who set it."""
    text = HEAD + "set: {training.epochs: 1, training.lr: 0.1, model.decoder.num_layers: 9, loss.weight_l1: 1}\n" + TAIL
    text += "profiles: {laptop: {set: {training.lr: 0.2, loss.weight_giou: 1}}}\n"
    study = load_study(write_study(text), Selection(sets=("loss.weight_giou=3",)))
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


def test_dotted_and_nested_keys_are_the_same(write_study):
    """Mappings merge key by key, however the key is written."""
    dotted = load_study(
        write_study(HEAD + "set: {model.decoder.attention.num_points: 3, model.heads: separate}\n" + TAIL)
    )
    nested = load_study(
        write_study(HEAD + "set: {model: {decoder: {attention: {num_points: 3}}, heads: separate}}\n" + TAIL)
    )
    assert dotted.variants == nested.variants
    assert dotted.variants[0].config.model.decoder.num_layers == 2


def test_mapping_with_a_kind_replaces_and_the_dotted_kind_switches(write_study):
    """`part: {kind: ...}` takes the defaults of the kind; `part.kind` keeps what was set of the keys that both have."""
    base = "set: {model.queries: {num_queries: 7, reference: box}, model.encoder_supervision: {}}\n"
    profile = SCALE.replace("set:\n", "set:\n  model.queries: {kind: selected}\n")
    replaced = load_study(write_study(HEAD + base + TAIL, profile)).variants[0].config.model.queries
    assert replaced == SelectedQueries(num_queries=300)
    profile = SCALE.replace("set:\n", "set:\n  model.queries.kind: selected\n")
    switched = load_study(write_study(HEAD + base + TAIL, profile)).variants[0].config.model.queries
    assert switched == SelectedQueries(num_queries=7)
    kept = load_study(write_study(HEAD + base + TAIL)).variants[0].config.model.queries
    assert kept == LearnedQueries(num_queries=7, reference="box")


def test_part_that_may_be_absent(write_study):
    """An empty mapping makes a part with its defaults, null takes it away, and a key brings it back."""
    study = HEAD + "set: {model.encoder_supervision: %s}\n" + TAIL
    options = ("model.encoder_supervision.labels=class_aware",)
    assert load_study(write_study(study % "{}")).variants[0].config.model.encoder_supervision.labels == "binary"
    assert load_study(write_study(study % "null")).variants[0].config.model.encoder_supervision is None
    found = (
        load_study(write_study(study % "null"), Selection(sets=options)).variants[0].config.model.encoder_supervision
    )
    assert found is not None
    assert found.labels == "class_aware"
    off = load_study(write_study(study % "{}"), Selection(sets=("model.encoder_supervision=null",))).variants[0].config
    assert off.model.encoder_supervision is None


def test_selection_of_variants(write_study):
    """A profile's block may narrow the variants, --variants overrides it, and the baseline is always first."""
    path = write_study(HEAD + TAIL + "profiles: {laptop: {variants: [third]}}\n")
    assert [variant.name for variant in load_study(path).variants] == ["base", "third"]
    assert load_study(path).claims[0].missing == ("other",)
    chosen = load_study(path, Selection(variants=("other",)))
    assert [variant.name for variant in chosen.variants] == ["base", "other"]
    assert chosen.claims[0].missing == ()
    assert len(load_study(path, Selection(variants=("all",))).variants) == 3


def test_looks_seeds_and_budget(write_study):
    """The profile plans the looks; --seeds asks for one look at alpha .05, and --budget replaces the profile's."""
    path = write_study(HEAD + TAIL, SCALE + "budget: 1h30m\n")
    study = load_study(path)
    assert study.looks == (Look(seeds=5, alpha=0.03), Look(seeds=10, alpha=0.02))
    assert study.seeds == tuple(range(10))
    assert study.budget_seconds == 5400.0
    study = load_study(path, Selection(seeds=2, budget="10m"))
    assert study.looks == (Look(seeds=2, alpha=0.05),)
    assert study.seeds == (0, 1)
    assert study.budget_seconds == 600.0


def test_plus_and_minus_are_two_terms(write_study):
    """The sugar stands for weights 1 and -1; the margin comes from the profile unless the claim names one."""
    claim = load_study(write_study(HEAD + TAIL)).claims[0]
    assert claim.terms == (
        Term(variant="other", metric="ap", weight=1.0, parameters="averaged"),
        Term(variant="base", metric="ap", weight=-1.0, parameters="averaged"),
    )
    assert claim.margin == 0.02
    own = load_study(write_study(HEAD + TAIL.replace("kind: superiority", "kind: superiority, margin: 0.005"))).claims[
        0
    ]
    assert own.margin == 0.005


def test_terms_spell_out_any_contrast(write_study):
    """Each term has its weight, its metric or the claim's, and its parameters or those its variant is scored with."""
    first, rest = (
        "{variant: other, weight: 1, parameters: raw}",
        "{variant: base, weight: -2}, {variant: third, weight: 1}",
    )
    terms = f"terms: [{first}, {rest}]"
    text = TAIL.replace("plus: other, minus: base", terms)
    claim = load_study(write_study(HEAD + "set: {evaluation.parameters: averaged}\n" + text)).claims[0]
    assert [(term.variant, term.weight, term.parameters) for term in claim.terms] == [
        ("other", 1.0, "raw"),
        ("base", -2.0, "averaged"),
        ("third", 1.0, "averaged"),
    ]
    raw = load_study(write_study(HEAD + "set: {evaluation.parameters: raw}\n" + TAIL)).claims[0]
    assert {term.parameters for term in raw.terms} == {"raw"}


def test_data_folder_chooses_pictures_and_becomes_absolute(write_study, tmp_path, monkeypatch):
    """--data alone chooses the profile `pictures` and sets data.root; with drawn pictures it is an error."""
    path = write_study(HEAD + TAIL)
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


def test_smoke_gives_no_verdicts(write_study):
    """A profile may say that it never gives a verdict."""
    assert load_study(write_study(HEAD + TAIL, SCALE + "verdicts: false\n")).gives_verdicts is False
    assert load_study(write_study(HEAD + TAIL)).gives_verdicts is True


def test_profiles_beside_the_study_go_before_the_shipped_ones(write_study, tmp_path):
    """A study elsewhere can use the shipped profiles, and its own files replace them."""
    path = write_study(HEAD + TAIL)
    assert {"laptop", "smoke", "coco"} <= set(profile_names(path))
    assert load_study(path).variants[0].config.data.side == 64
    assert load_study(path, Selection(profile="smoke")).gives_verdicts is False
