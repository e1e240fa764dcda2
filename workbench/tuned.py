"""Settings that a search has chosen, as a file: small enough to be committed beside the study that names it.

    tuned: tuned/refinement_search.laptop.yaml

Its values are laid over the settings of each variant. Every variant must have been searched with the same budget, and
must be the one that was searched: the same keys set to the same values.
"""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from core.paths import is_file
from workbench import yaml12
from workbench.errors import WorkbenchError
from workbench.overrides import Layer, read_layer
from workbench.problems import Problems, did_you_mean
from workbench.records import StudyResults
from workbench.search import Outcome, outcomes, own_variants
from workbench.search_file import SPLIT
from workbench.study import SEARCH_SEED, Tuned
from workbench.study_schema import FilePart, Name, Overrides, read_part
from workbench.yaml12 import Document, Path_

_HEADER = """\
# The best settings of each variant, by a search on the {split} split. A study takes them by naming this file:
#     tuned: {name}
# Written by: {command}
"""
_UNREAD = {"format": 1, "search": "unread", "profile": "unread", "plan": "unread", "variants": {"": None}}


class TunedVariantPart(FilePart):
    """What one variant was given. `of` are the keys in which it differs from the base, as it was searched."""

    set: Overrides
    of: Overrides = Field(default_factory=dict[str, Any])
    score: float | None = None
    own_score: float | None = Field(default=None, description="of the variant's own settings")
    configurations: int = Field(ge=1)
    epochs: int = Field(ge=0, description="trained in all")


class TunedPart(FilePart):
    """A file of tuned settings."""

    format: Literal[1]
    search: Name
    profile: str
    plan: str
    method: str = ""
    scheduler: str = ""
    metric: str = ""
    mode: str = ""
    seed: int = SEARCH_SEED
    variants: dict[str, TunedVariantPart | None] = Field(min_length=1)


class TunedFile:
    """The file that a study names; what is wrong with it goes to `problems`."""

    def __init__(self, study: Document, named: str, problems: Problems) -> None:
        self._study, self._named, self._problems = study, named, problems
        path = Path(study.source).parent / named
        self._document, self._hash = Document(source=str(path), value=None), ""
        try:
            if path.exists() and not is_file(path):
                raise OSError(errno.EINVAL, "it is no file")  # a pipe or a device might never end
            raw = yaml12.beginning(path)
        except OSError as error:
            remedy = f"a search writes it: report SEARCH_STUDY --format tuned --out {path}"
            text = f"{path}: cannot be read ({error.strerror}); {remedy}"
            problems.add(study.value_place(("tuned",)), "tuned", text)
        else:
            self._hash = hashlib.sha256(raw).hexdigest()
            self._document = yaml12.read_bytes(raw, str(path), problems)
        self._file, wrong = read_part(TunedPart, self._document, problems, stand_in=_UNREAD)
        self._sound = not wrong and self._document.value is not None

    def layers(self, own: dict[str, Layer]) -> dict[str, Layer]:
        """Return a layer for each variant of the study; tell those that were not searched, or not alike."""
        if not self._sound:
            return {}
        found: dict[str, Layer] = {}
        for name, layer in own.items():
            part = self._file.variants.get(name)
            if part is None:
                known = [*self._file.variants]
                text = (
                    f"{self._named} has no settings for variant {name}; {did_you_mean(name, known)}it has: "
                    f"{', '.join(known)}. A tuned variant may only be compared with variants tuned alike"
                )
                self._problems.add(self._study.value_place(("tuned",)), "tuned", text)
                continue
            path: Path_ = ("variants", name)
            found[name] = read_layer("tuned", self._document, (*path, "set"), self._problems)
            asked = json.loads(json.dumps(layer.asked()))
            if part.of != asked:
                differ = sorted(key for key in {*part.of, *asked} if part.of.get(key) != asked.get(key))
                text = f"was searched with other settings of {', '.join(differ)} than {self._study.source} gives it"
                remedy = "search again, or give the variant another name"
                self._problems.add(self._document.place((*path, "of")), f"variants.{name}", f"{text}: {remedy}")
        self._check_budgets(found)
        return found

    def _check_budgets(self, used: dict[str, Layer]) -> None:
        budgets = {name: part.configurations for name, part in self._file.variants.items() if part and name in used}
        if len(set(budgets.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in budgets.items())
            place = self._document.place(("variants",))
            text = f"searched with different budgets ({told} configurations), which favours one of them: search again"
            self._problems.add(place, "variants", text)

    def provenance(self) -> Tuned | None:
        """Return where the settings come from; None where the file is wrong."""
        counts = [part.configurations for part in self._file.variants.values() if part]
        if not self._sound or not counts:
            return None
        return Tuned(
            path=self._named,
            sha256=self._hash,
            study=self._file.search,
            profile=self._file.profile,
            plan_hash=self._file.plan,
            configurations=min(counts),
        )


def render(results: StudyResults, *, out: Path | None, command: str) -> str:
    """Return the file of a search's results.

    Raises:
        WorkbenchError: the study is no search, or its search is not complete.
    """
    study = results.plan.study
    search = study.search
    if search is None:
        raise WorkbenchError(f"{study.path}: has no search, so it has no tuned settings to write")
    found = outcomes(results)
    for name, outcome in found.items():
        if outcome.over < search.configurations:
            text = f"{outcome.over} of {search.configurations} configurations of {name} are over"
            raise WorkbenchError(f"{study.name} ({study.profile}): {text}: run the search to its end first")
        if outcome.best is None:
            raise WorkbenchError(f"{study.name} ({study.profile}): no configuration of {name} was scored")
    own = {variant.name: variant for variant in own_variants(results.plan)}
    lines = [_HEADER.format(split=SPLIT, name=out.name if out else "FILE", command=command).rstrip()]
    head = {
        "format": 1,
        "search": study.name,
        "profile": study.profile,
        "plan": results.plan.plan_hash,
        "method": search.method,
        "scheduler": search.scheduler,
        "metric": search.metric,
        "mode": search.mode,
        "seed": SEARCH_SEED,
    }
    lines += [f"{key}: {_plain(value)}" for key, value in head.items()]
    lines.append("variants:")
    for name, outcome in found.items():
        lines += [f"  {_plain(name)}:", *_variant_lines(outcome, own[name].overrides)]
    return "\n".join(lines) + "\n"


def _variant_lines(outcome: Outcome, of: dict[str, Any]) -> list[str]:
    best, first = outcome.best, outcome.own_score
    assert best is not None  # the caller has looked
    facts = {
        "score": best.score,
        "own_score": first,
        "configurations": outcome.over,
        "epochs": outcome.epochs,
        "set": best.values,
        "of": of,
    }
    return [f"    {key}: {_plain(value)}" for key, value in facts.items() if value not in (None, {})]


def _plain(value: Any) -> str:
    """Return a value as JSON, which is YAML, too; a name only in quotes where YAML needs them."""
    if isinstance(value, str) and yaml12.read_text(value, "", Problems()).value == value and value.isidentifier():
        return value
    return json.dumps(value)
