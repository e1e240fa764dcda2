"""The form of a study file and of a profile: pydantic models, how documents are read by them, the schema for editors.

What names refer to and what values lead to is checked in `study_file`.
"""

import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import ErrorDetails

from core.config import ExperimentConfig
from core.metrics import NUMBER_NAMES
from core.parts import dotted_keys
from core.recipes import DEFAULT, RECIPES
from workbench.contacts import server
from workbench.problems import Problems, as_key, did_you_mean, in_words, shown
from workbench.yaml12 import Document, Path_

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
Overrides = dict[str, Any]  # keys of ExperimentConfig, dotted or nested
LARGEST_MARGIN = 0.2  # above it somebody wrote points
MOST_VARIANTS, MOST_CLAIMS, MOST_PROFILES, MOST_TERMS = 200, 200, 50, 50  # else a file is checked for minutes


def _known(metric: str) -> str:
    if metric not in NUMBER_NAMES:
        hint = f"{did_you_mean(metric, NUMBER_NAMES)}allowed: {', '.join(NUMBER_NAMES)}"
        raise ValueError(f"no such metric: {metric!r}; {hint}")
    return metric


def _published(recipe: str) -> str:
    if recipe not in RECIPES:
        hint = f"{did_you_mean(recipe, RECIPES)}allowed: {', '.join(RECIPES)}"
        raise ValueError(f"no such recipe: {recipe!r}; {hint}")
    return recipe


def _fraction(margin: float) -> float:
    if margin > LARGEST_MARGIN:
        remedy = f"margins are fractions, not points; did you mean {margin / 100:g}?"
        raise ValueError(f"{margin:g} is above {LARGEST_MARGIN}: {remedy}")
    return margin


def _share_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(
            f"{gpus:g} is neither a share of one GPU nor a number of GPUs; allowed: up to 1, or 2, 3, 4, ..."
        )
    return gpus


def _can_be_selected(name: str) -> str:
    if not name or name != name.strip() or name == "all" or set(name) & set(",\n\t"):
        raise ValueError("the name of a variant is on one line, without commas, and not 'all': --variants names it")
    return name


Gpus = Annotated[float, Field(gt=0, le=64), AfterValidator(_share_or_whole)]
VariantName = Annotated[str, AfterValidator(_can_be_selected)]
Metric = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(NUMBER_NAMES)})]
Recipe = Annotated[
    str,
    AfterValidator(_published),
    Field(
        description="the published detector that the settings start from, schedule included",
        json_schema_extra={"enum": list(RECIPES)},
    ),
]
Margin = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False, description="smallest difference that matters; AP .02, not 2"),
    AfterValidator(_fraction),
]


def seconds_of(duration: object) -> float:
    """Return a duration in seconds: 90, "90s", "10m", "1h30m", "2d". Raises ValueError for anything else."""
    text = str(duration)
    parts = re.fullmatch(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text)
    if isinstance(duration, bool) or parts is None or not text:
        raise ValueError(f"found {shown(duration)}; allowed: a duration such as 90s, 10m, 1h30m or 2d")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


Duration = Annotated[
    float,
    BeforeValidator(seconds_of),
    WithJsonSchema({"type": ["string", "integer"], "description": "seconds, or 90s, 10m, 1h30m, 2d"}),
]


TrackingUri = Annotated[str, AfterValidator(server)]


class FilePart(BaseModel):
    """A mapping of a study file: refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class VariantPart(FilePart):
    """One way to build or train the detector, as differences to the base."""

    why: str = ""
    set: Overrides = {}


class TermPart(FilePart):
    """One addend of a contrast: weight times the metric of a variant."""

    variant: str
    metric: Metric | None = Field(default=None, description="null: the claim's metric")
    weight: float = Field(allow_inf_nan=False)
    parameters: Literal["averaged", "raw"] | None = Field(
        default=None, description="averaged or raw weights; null: the variant's evaluation.parameters"
    )


class ClaimPart(FilePart):
    """A statement declared before the runs. `plus` and `minus` name two variants; `terms` spell any contrast out."""

    id: Name
    text: str = Field(min_length=1)
    plus: str | None = None
    minus: str | None = None
    terms: list[TermPart] | None = Field(default=None, max_length=MOST_TERMS)
    metric: Metric | None = None
    parameters: Literal["averaged", "raw"] | None = None
    kind: Literal["superiority", "equivalence"]
    margin: Margin | None = Field(default=None, description="null: the profile's margin for the metric")
    family: str | None = Field(default=None, description="claims whose errors are controlled together")


class LooksPart(FilePart):
    """The planned numbers of seeds at which verdicts may be given, and the share of alpha spent at each."""

    seeds: list[Annotated[int, Field(ge=1, le=1000)]] = Field(min_length=1)
    alpha: list[Annotated[float, Field(gt=0, lt=1)]] = Field(min_length=1)


def bytes_of(size: object) -> int:
    """Return a size in bytes: 2000000, "500MB", "20GB", "1TB". Raises ValueError for anything else."""
    parts = re.fullmatch(r"(\d{1,15})(?:([KMGT])B)?", str(size))
    if isinstance(size, bool) or parts is None:
        raise ValueError(f"found {shown(size)}; allowed: a size such as 500MB, 20GB or 1TB")
    return int(parts[1]) * 1000 ** " KMGT".index(parts[2] or " ")


Size = Annotated[
    int,
    BeforeValidator(bytes_of),
    WithJsonSchema({"type": ["string", "integer"], "description": "bytes, or 500MB, 20GB, 1TB"}),
]


class ExecutionPart(FilePart):
    """How trials are run, which changes no number. What is left out is as the profile or the default says."""

    retries: int | None = Field(default=None, ge=0, le=20, description="of a trial whose failure may pass; default: 2")
    stall_after: Duration | None = Field(default=None, description="without a step a trial is tried anew; default: 15m")
    gpus: Gpus | None = Field(default=None, description="a trial, on a node; .5: two trials a GPU")
    nodes: int | None = Field(default=None, ge=1, le=64, description="a trial; default: 1")
    gpu_hours: float | None = Field(default=None, gt=0, description="hard limit of all attempts at this profile")
    quota: Size | None = Field(default=None, description="of checkpoints and predictions in the runs folder")


class ProfilePart(FilePart):
    """A scale: `studies/profiles/NAME.yaml`, or a study's own `profiles.NAME`, which is laid over that file."""

    why: str = ""
    verdicts: bool | None = Field(default=None, description="false: plumbing only, never a verdict")
    variants: list[str] | None = Field(default=None, description="those that run; null: all")
    looks: LooksPart | None = None
    margins: dict[Metric, Margin] = {}
    budget: Duration | None = None
    tracking_uri: TrackingUri | None = Field(default=None, description="of an MLflow server: http://HOST:PORT")
    execution: ExecutionPart = ExecutionPart()
    set: Overrides = {}


class DimensionPart(FilePart):
    """What a search tries of one key: a range, both ends included and whole where the key is, or values."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = Field(default=False, description="as many small values as large ones: for rates")
    values: list[bool | int | float | str | None] | None = Field(default=None, min_length=2)

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.low is None) == (self.values is None) or (self.low is None) != (self.high is None):
            raise ValueError("needs low and high, or values instead of them")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs a range above 0")
        if self.values is not None and len({repr(value) for value in self.values}) < len(self.values):
            raise ValueError("names a value twice")
        return self


class SearchPart(FilePart):
    """Settings are searched for each variant by itself, with the same budget, on the tune split; nothing is claimed."""

    space: dict[str, DimensionPart] = Field(min_length=1, description="dotted key: what is tried of it")
    configurations: int = Field(
        ge=2, le=1000, description="tried for each variant; the first are the variant's own settings"
    )
    method: Literal["random", "optuna"] = Field(default="optuna", description="optuna: TPE, which learns from scores")
    scheduler: Literal["fifo", "asha"] = Field(
        default="fifo", description="fifo: all train to the end; asha: the worst two of three are stopped early"
    )
    metric: Metric = "ap"
    mode: Literal["max", "min"] = "max"


class StudyPart(FilePart):
    """One question, its variants and its claims."""

    version: Literal[1]
    study: Name
    question: str = Field(min_length=1)
    why: str = ""
    recipe: Recipe = DEFAULT
    set: Overrides = {}
    baseline: str = Field(description="the variant that the others are compared to")
    variants: dict[VariantName, VariantPart | None] = Field(min_length=1, max_length=MOST_VARIANTS)
    claims: list[ClaimPart] = Field(default=[], max_length=MOST_CLAIMS)
    scope: Literal["seeds"] = Field(description="what the verdict generalises over: seeds, on this validation set")
    profiles: dict[str, ProfilePart | None] = Field(default={}, max_length=MOST_PROFILES)
    execution: ExecutionPart = Field(
        default=ExecutionPart(), description="at every profile, unless that says otherwise"
    )
    search: SearchPart | None = None
    tuned: str | None = Field(default=None, description="file of `report SEARCH --format tuned`, beside this one")


PartT = TypeVar("PartT", bound=FilePart)

ENTRIES: dict[str, type[FilePart]] = {"variants": VariantPart, "claims": ClaimPart, "profiles": ProfilePart}
"""The sections whose entries are judged one by one: a wrong one does not hide what is wrong with the others."""
_PARTS: dict[int | str, type[FilePart]] = {"looks": LooksPart, "execution": ExecutionPart, "search": SearchPart}
_INNER: dict[int | str, type[FilePart]] = {**ENTRIES, "terms": TermPart, "space": DimensionPart}


def read_part(
    model: type[PartT], document: Document, problems: Problems, *, stand_in: dict[str, Any]
) -> tuple[PartT, set[Path_]]:
    """Read a whole document as `model`; return it with the paths of the entries that were wrong and are left out.

    Every problem of form is told. `stand_in` takes the place of what is required and cannot be read.
    """
    tree = document.value
    if not isinstance(tree, dict):
        if document.values:
            problems.add(document.place(()), "", "the file must hold a mapping of keys")
        return model.model_validate(stand_in), set()
    try:
        return model.model_validate(tree), set()
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:
        _tell(model, detail, document, problems)
    wrong = {_entry(detail["loc"]) for detail in details}
    sound = {key: _sound(key, value, wrong) for key, value in tree.items() if (key,) not in wrong}
    return model.model_validate(stand_in | {key: value for key, value in sound.items() if value != {}}), wrong


def _entry(loc: Path_) -> Path_:
    """Return the path of what is left out for an error: one variant, claim or profile, else a whole key."""
    return loc[:2] if loc[0] in ENTRIES else loc[:1]


def _sound(section: str, value: Any, wrong: set[Path_]) -> Any:
    """Return a section without its wrong entries."""
    if section in ENTRIES and isinstance(value, dict):
        return {key: entry for key, entry in value.items() if (section, key) not in wrong}
    if section in ENTRIES and isinstance(value, list):
        return [entry for position, entry in enumerate(value) if (section, position) not in wrong]
    return value


def _tell(model: type[FilePart], detail: ErrorDetails, document: Document, problems: Problems) -> None:
    path = tuple(part for part in detail["loc"] if part != "[key]")  # pydantic's mark of a key that is wrong
    if detail["type"] == "missing":
        if path not in document.keys:  # else its value was refused, and that is told
            problems.add(document.place(path[:-1]), as_key(path), "is missing")
        return
    about_key = detail["type"] == "extra_forbidden" or path != detail["loc"]
    place = document.place(path) if about_key else document.value_place(path)
    problems.add(place, as_key(path), in_words(detail, _keys_beside(model, path)))


def _keys_beside(model: type[FilePart], path: Path_) -> list[str]:
    """Return the keys that the mapping around `path` may have."""
    names = iter(path[:-1])
    for name in names:
        if name in _PARTS:
            model = _PARTS[name]
        elif name in _INNER:
            model = _INNER[name]
            next(names, None)  # the entry's own name or position
    return list(model.model_fields)


class _Partial(GenerateJsonSchema):
    """A mapping that sets some keys of a part fits several members of a union: `anyOf`, not `oneOf`."""

    def tagged_union_schema(self, schema: Any) -> JsonSchemaValue:
        plain = super().tagged_union_schema(schema)
        return {"anyOf": plain["oneOf"]} if "oneOf" in plain else plain


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a study file. Under `set` it completes and checks every key of the configuration."""
    template = "#/$defs/{model}"
    study = TypeAdapter(StudyPart).json_schema(ref_template=template)
    parts = TypeAdapter(ExperimentConfig).json_schema(ref_template=template, schema_generator=_Partial)
    definitions = {**parts.pop("$defs"), **study.pop("$defs")}
    overrides = {
        key: found for key in dotted_keys(ExperimentConfig) if (found := _schema_at(key.split("."), parts, definitions))
    }
    definitions["Overrides"] = {"type": "object", "additionalProperties": False, "properties": overrides}
    for part in (study, definitions["VariantPart"], definitions["ProfilePart"]):
        part["properties"]["set"] = {"$ref": "#/$defs/Overrides"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **study, "$defs": definitions}


def schema_text() -> str:
    """Return the JSON schema as the text of `studies/study.schema.json`."""
    return json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"


def _schema_at(path: list[str], schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return what a dotted key may be set to, in any member of the unions that it passes."""
    if not path:
        return {key: value for key, value in schema.items() if key not in ("default", "operational")}
    options = [schema, *schema.get("anyOf", []), *schema.get("allOf", [])]
    found: list[dict[str, Any]] = []
    for option in options:
        part = definitions[option["$ref"].rsplit("/", 1)[-1]] if "$ref" in option else option
        if path[0] in part.get("properties", {}):
            here = _schema_at(path[1:], part["properties"][path[0]], definitions)
            found += [here] if here and here not in found else []
    return found[0] if len(found) == 1 else {"anyOf": found} if found else {}
