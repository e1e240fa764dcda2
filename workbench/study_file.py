"""Read a study file with its profile and the command line's choices into a `Study`, or say everything that is wrong.

Precedence, lowest first: the study's recipe (by default the defaults of `ExperimentConfig`), its `set`, the profile's
`set` (`profiles/NAME.yaml`, then the study's own `profiles.NAME`), the variant's `set`, `--set`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config import ExperimentConfig
from core.metrics import NUMBER_NAMES
from workbench import yaml12
from workbench.claims import ClaimReader
from workbench.differences import check_differences
from workbench.overrides import (
    Assignment,
    Layer,
    Settings,
    apply,
    clashes,
    explain,
    read_layer,
    resolve,
    without_wrong_values,
)
from workbench.problems import DEFAULT, LONGEST_SHOWN, Place, Problems, as_key, did_you_mean
from workbench.recipes import recipe_layer
from workbench.search_file import SearchReader
from workbench.selection import Selection, read_options
from workbench.study import SEARCH_SEED, Claim, Execution, Look, Study, Variant
from workbench.study_schema import (
    MOST_PROFILES,
    MOST_VARIANTS,
    ExecutionPart,
    ProfilePart,
    StudyPart,
    read_part,
    seconds_of,
)
from workbench.tracking import problem_with as problem_with_uri
from workbench.tuned import TunedFile
from workbench.user_code import custom_parts, problem_with
from workbench.yaml12 import Document, Path_

SHIPPED_PROFILES = Path(__file__).resolve().parent.parent / "studies" / "profiles"
ONE_LOOK_ALPHA = 0.05
MOST_SEEDS = 1000
MOST_TRIALS = 10_000
_EXECUTION_NAMES = {"stall_after": "stall_seconds", "quota": "quota_bytes"}
UNREAD = {
    "version": 1,
    "study": "unread",
    "question": "unread",
    "baseline": "",
    "scope": "seeds",
    "variants": {"unread": None},
}


def load_study(path: Path, selection: Selection | None = None) -> Study:
    """Read a study at the scale that the selection names.

    Raises:
        StudyFileError: with every problem of the file, its profile and the selection, one a line.
    """
    problems = Problems()
    study = _Loader(path, selection or Selection(), problems).load()
    problems.raise_if_any()
    assert study is not None  # whatever leaves it None is a problem
    return study


def profile_names(path: Path) -> list[str]:
    """Return the profiles that a study file can use: those in `profiles/` beside it, and the shipped ones."""
    folders = (path.parent / "profiles", SHIPPED_PROFILES)
    return sorted({found.stem for folder in folders for found in folder.glob("*.yaml")})


def profile_file(path: Path, name: str) -> Path:
    """Return the file of a profile: beside the study file, else the shipped one."""
    beside = path.parent / "profiles" / f"{name}.yaml"
    return beside if beside.is_file() else SHIPPED_PROFILES / f"{name}.yaml"


class _Loader:
    """The steps from files to a `Study`; each tells its problems and leaves the others their chance."""

    def __init__(self, path: Path, selection: Selection, problems: Problems) -> None:
        self.path = path
        self.selection = selection
        self.problems = problems
        self.profile_name = selection.profile_name()
        self.document = yaml12.read_file(path, problems)
        self.file, self.wrong = read_part(StudyPart, self.document, problems, stand_in=UNREAD)
        self.search = SearchReader(self.document, self.file.search, problems) if self.file.search else None
        self.tuned = TunedFile(self.document, self.file.tuned, problems) if self.file.tuned else None
        self.names = self._names("variants", MOST_VARIANTS)  # also those left out of `file` because they are wrong
        self.blocks = self._names("profiles", MOST_PROFILES)

    def _names(self, section: str, most: int) -> list[str]:
        """Return the names in a section; none where there are too many to look at, which the form's check has told."""
        names = self.document.names(section)
        return names if len(names) <= most else []

    def load(self) -> Study | None:
        """Return the study, or None where anything is wrong."""
        profile, profile_document = self._profile()
        if ("recipe",) in self.wrong:  # what the keys mean is not known
            self._check_references()
            return None
        layers = self._layers(profile_document)
        variants, settings = self._variants(layers)
        check_differences(variants, self.file.baseline, self.document, self.problems)
        self._check_references()
        selected = self._selected(profile)
        claims = self._claims(profile, variants, selected)
        looks = self._looks(profile, profile_document)
        search = self.search.read(variants, layers) if self.search and variants else None
        budget = self._budget(profile)
        uri = self._tracking_uri(profile)
        num_trials = len(selected) * looks[-1].seeds if looks else 0
        if num_trials > MOST_TRIALS:
            asked = f"{len(selected)} variants with {looks[-1].seeds} seeds are {num_trials} trials"
            text = f"{asked}; allowed: {MOST_TRIALS}"
            self.problems.add(Place(str(self.path)), "", text)
        if self.problems or not looks:
            return None
        chosen = [variant for variant in variants if variant.name in selected]
        chosen.sort(key=lambda variant: variant.name != self.file.baseline)
        block = self.file.profiles.get(self.profile_name)
        return Study(
            name=self.file.study,
            question=self.file.question,
            path=self.path,
            selection=self.selection.words(),
            profile=self.profile_name,
            gives_verdicts=profile.verdicts is not False and search is None,
            baseline=self.file.baseline,
            variants=tuple(chosen),
            claims=claims,
            looks=looks,
            seeds=(SEARCH_SEED,) if search else tuple(range(looks[-1].seeds)),
            scope=self.file.scope,
            budget_seconds=budget,
            tracking_uri=uri,
            layers={variant.name: explain(variant.config, settings[variant.name]) for variant in chosen},
            execution=_execution(profile.execution, self.file.execution, block.execution if block else None),
            search=search,
            tuned=self.tuned.provenance() if self.tuned else None,
        )

    def _profile(self) -> tuple[ProfilePart, Document]:
        """Return the profile's file with the study's own block laid over it, and the document of the file."""
        known = profile_names(self.path)
        for block in self.blocks:
            at = ("profiles", block)
            self._check_name(block, known, "profile", self.document.place(at), as_key(at))
        document = Document(source=self.profile_name, value={})
        place = Place(f"--profile {self.profile_name}")
        self.profile_known = self._check_name(self.profile_name, known, "profile", place)
        if self.profile_known:
            document = yaml12.read_file(profile_file(self.path, self.profile_name), self.problems)
        file, wrong = read_part(ProfilePart, document, self.problems, stand_in={})
        self.wrong |= wrong
        block = self.file.profiles.get(self.profile_name) or ProfilePart()
        laid = {name: getattr(block, name) for name in block.model_fields_set - {"execution"}}
        return file.model_copy(update=laid | {"margins": {**file.margins, **block.margins}}), document

    def _tracking_uri(self, profile: ProfilePart) -> str | None:
        given = self.selection.tracking_uri
        uri = given or profile.tracking_uri
        if uri is not None and (problem := problem_with_uri(uri)):
            place = Place("--tracking-uri" if given else f"profile {self.profile_name}")
            self.problems.add(place, "" if given else "tracking_uri", problem)
        return uri

    def _layers(self, profile_document: Document) -> dict[str, list[Layer]]:
        """Return the layers of each variant, lowest first."""
        recipe = recipe_layer(self.file.recipe, self.document.value_place(("recipe",)))
        study = self._layer("study", ())
        blocks = {name: self._layer(f"profile {name}", ("profiles", name)) for name in self.blocks}
        own = {name: self._layer(f"variant {name}", ("variants", name)) for name in self.names}
        scale = [read_layer(f"profile {self.profile_name}", profile_document, ("set",), self.problems)]
        scale += [blocks[self.profile_name]] if self.profile_name in blocks else []
        options = read_options(self.selection.sets, self.problems)
        for layer in (*blocks.values(), *own.values()):  # a variant keeps its wrong values, or it would equal another
            without_wrong_values(layer, self.problems)
        shared = [without_wrong_values(layer, self.problems) for layer in (study, *scale, options)]
        study, *scale, options = [shared[0], *(self._without_clashes(layer, own.values()) for layer in shared[1:])]
        scale = [replace(layer, scales=True) for layer in scale]
        explicit = [*scale[1:], options]  # a scale of the study's own, and the command line
        tuned = self.tuned.layers(own) if self.tuned else {}
        for layer in tuned.values():
            self._without_clashes(layer, [*explicit, *own.values()])
        self.asked = {name: layer.asked() for name, layer in own.items()}
        for name, layer in tuned.items():
            self.asked[name] |= layer.asked()
        top = [options]
        if self.search:
            self.search.refuse(seeds=self.selection.seeds)
            self._without_clashes(self.search.space, [*explicit, *own.values()])
            top.append(self.search.split([study, *explicit, *own.values()]))
        return {
            name: [recipe, study, *scale, layer, *([tuned[name]] if name in tuned else []), *top]
            for name, layer in own.items()
        }

    def _layer(self, label: str, path: Path_) -> Layer:
        return read_layer(label, self.document, (*path, "set"), self.problems)

    def _without_clashes(self, layer: Layer, varied: Iterable[Layer]) -> Layer:
        """Tell the keys that a profile or an option sets although the variants differ in them, and leave them out."""
        asked = [(variant.label, item) for variant in varied for item in variant.assignments]
        kept: list[Assignment] = []
        told: list[str] = []
        for item in layer.assignments:
            found = next(((label, other) for label, other in asked if clashes(item.key, other.key)), None)
            if found is None:
                kept.append(item)
            elif not any(clashes(item.key, key) for key in told):
                label, other = found
                remedy = f", or set {other.key}.kind alone, which keeps the other keys" if other.replaces else ""
                text = f"{label} sets {other.key} ({other.place}), so {layer.label} may not: remove one of them{remedy}"
                self.problems.add(item.place, item.key, text)
                told.append(item.key)
        return replace(layer, assignments=tuple(kept))

    def _variants(self, layers: dict[str, list[Layer]]) -> tuple[list[Variant], dict[str, Settings]]:
        """Resolve every variant of the file, also those that do not run: a wrong one is wrong at every scale."""
        variants: list[Variant] = []
        settings: dict[str, Settings] = {}
        for name, part in ((name, part) for name, part in self.file.variants.items() if name in layers):
            config, settings[name] = resolve(self._with_data(layers[name]), self.problems)
            if config:
                why = part.why if part else ""
                variants.append(Variant(name=name, why=why, overrides=self.asked[name], config=config))
                self._check_code(config, settings[name])
        return variants, settings

    def _check_code(self, config: ExperimentConfig, settings: Settings) -> None:
        """Tell the custom parts whose code is not there, without running any."""
        for part in custom_parts(config):
            if text := problem_with(part, beside=self.path.parent):
                target, kind = settings[f"{part.key}.target"], settings[f"{part.key}.kind"]
                place = kind.place if target.place == DEFAULT else target.place
                self.problems.add(place, f"{part.key}.target", text)

    def _with_data(self, layers: list[Layer]) -> list[Layer]:
        """Append the folder of `--data`, which drawn pictures have no use for."""
        folder = self.selection.data
        if folder is None:
            return layers
        place = Place(f"--data {folder}")
        if apply(layers)["data.kind"].value == "shapes":
            self.problems.add(place, "", f"profile {self.profile_name} draws its pictures: drop --profile or --data")
            return layers
        root = Assignment(key="data.root", value=str(folder.expanduser().resolve()), place=place)
        return [*layers, Layer(label=str(place), place=place, assignments=(root,))]

    def _selected(self, profile: ProfilePart) -> set[str]:
        """Return the variants that run: those asked for and the baseline, which every comparison needs."""
        asked = profile.variants if self.selection.variants is None else self.selection.variants
        for name in self.selection.variants or ():
            if name != "all":
                self._check_name(name, self.names, "variant", Place(f"--variants {name}"))
        return set(self.names) if asked is None or "all" in asked else {self.file.baseline, *asked}

    def _check_references(self) -> None:
        """Tell the names of variants that do not exist, also in entries that are wrong otherwise."""
        found: list[Path_] = [("baseline",)]
        for block in self.blocks:
            listed = self.document.at(("profiles", block, "variants"))
            found += [
                ("profiles", block, "variants", at) for at in range(len(listed) if isinstance(listed, list) else 0)
            ]
        claims = self.document.at(("claims",))
        for position, claim in enumerate(claims if isinstance(claims, list) else []):
            at = ("claims", position)
            terms = claim.get("terms") if isinstance(claim, dict) else None
            found += [(*at, "plus"), (*at, "minus")]
            found += [(*at, "terms", term, "variant") for term in range(len(terms) if isinstance(terms, list) else 0)]
        for path in found:
            name = self.document.at(path)
            if isinstance(name, str):
                self._check_name(name, self.names, "variant", self.document.value_place(path), as_key(path))

    def _check_name(self, name: str, known: list[str], what: str, place: Place, key: str = "") -> bool:
        """Tell a name that is not among the known ones; say whether it is."""
        if name not in known and known:
            text = f"no such {what}: {name[:LONGEST_SHOWN]!r}; {did_you_mean(name, known)}there are: {', '.join(known)}"
            self.problems.add(place, key, text)
        return name in known

    def _claims(self, profile: ProfilePart, variants: list[Variant], selected: set[str]) -> tuple[Claim, ...]:
        reader = ClaimReader(
            document=self.document,
            problems=self.problems,
            variants={variant.name: variant for variant in variants},
            selected=selected,
            margins=dict.fromkeys(NUMBER_NAMES, 0.0) if self._is_wrong("margins") else profile.margins,
        )
        num_written = len(self.file.claims) + sum(path[0] == "claims" and len(path) > 1 for path in self.wrong)
        positions = (position for position in range(num_written) if ("claims", position) not in self.wrong)
        return reader.read(zip(positions, self.file.claims, strict=True))

    def _is_wrong(self, key: str) -> bool:
        """Whether a key of the profile could not be read, which is told and must not be told again as its absence."""
        return bool(self.wrong & {(key,), ("profiles", self.profile_name)}) or not self.profile_known

    def _looks(self, profile: ProfilePart, profile_document: Document) -> tuple[Look, ...]:
        """Return the planned looks: one of `--seeds` seeds, else the profile's."""
        asked = 1 if self.search else self.selection.seeds
        if asked is not None:
            if not 1 <= asked <= MOST_SEEDS:
                self.problems.add(Place(f"--seeds {asked}"), "", f"allowed: 1 to {MOST_SEEDS}")
            return (Look(seeds=asked, alpha=ONE_LOOK_ALPHA),)
        looks = profile.looks
        block = self.file.profiles.get(self.profile_name)
        own = block is not None and block.looks is not None
        at: Path_ = ("profiles", self.profile_name, "looks") if own else ("looks",)
        place = (self.document if own else profile_document).place(at)
        if looks is None:
            if not self._is_wrong("looks"):
                self.problems.add(place, "looks", "the profile plans no looks: add them, or give --seeds N")
            return ()
        if len(looks.seeds) != len(looks.alpha) or sorted(set(looks.seeds)) != looks.seeds:
            self.problems.add(place, as_key(at), "needs rising numbers of seeds, and one alpha for each")
        return tuple(Look(seeds=seeds, alpha=alpha) for seeds, alpha in zip(looks.seeds, looks.alpha, strict=False))

    def _budget(self, profile: ProfilePart) -> float | None:
        if self.selection.budget is None:
            return profile.budget
        try:
            return seconds_of(self.selection.budget)
        except ValueError as error:
            self.problems.add(Place(f"--budget {self.selection.budget}"), "", str(error))
            return None


def _execution(*parts: ExecutionPart | None) -> Execution:
    """Return how trials are run: of each key the last part that has it counts."""
    laid: dict[str, Any] = {}
    for part in parts:
        laid |= part.model_dump(exclude_none=True) if part else {}
    named = {_EXECUTION_NAMES.get(name, name): value for name, value in laid.items()}
    return Execution(**named)
