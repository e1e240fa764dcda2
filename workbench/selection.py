"""What the command line chooses of a study, and the settings that it lays over all others."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workbench import yaml12
from workbench.overrides import Assignment, Layer, read_layer
from workbench.problems import Place, Problems
from workbench.study import SELECTION_OPTIONS
from workbench.tracking import problem_with as problem_with_uri
from workbench.yaml12 import Document


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the command line chooses of a study; None leaves it to the profile. `sets` are KEY=VALUE texts."""

    profile: str | None = None
    data: Path | None = None
    variants: tuple[str, ...] | None = None  # ("all",) for every variant
    seeds: int | None = None
    sets: tuple[str, ...] = ()
    budget: str | None = None
    tracking_uri: str | None = None

    def profile_name(self) -> str:
        """Return the profile: the one named, `pictures` for a folder of pictures, else `laptop`."""
        return self.profile or ("laptop" if self.data is None else "pictures")

    def words(self) -> tuple[str, ...]:
        """Return the options as the command line has them, name and value in turn, for plans that anybody may read.

        An address in which a password stands is left out.
        """
        uri, variants = self.tracking_uri, self.variants and ",".join(self.variants)
        values = (
            [self.profile],
            [self.data],
            [variants],
            [self.seeds],
            self.sets,
            [self.budget],
            [None if uri is None or problem_with_uri(uri) else uri],
        )
        given = [(option, one) for option, own in zip(SELECTION_OPTIONS, values, strict=True) for one in own]
        return tuple(word for option, value in given if value is not None for word in (option, str(value)))


def read_options(sets: Iterable[str], problems: Problems) -> Layer:
    """Return the layer of the `--set` options; their values are read as YAML."""
    found: list[Assignment] = []
    for text in sets:
        place = Place(f"--set {text}")
        key, equals, value = text.partition("=")
        told = Problems()
        read = yaml12.read_text(value, str(place), told)
        if not equals or not key or told:
            reason = told.lines()[0].removeprefix(f"{place}").lstrip(":0123456789 ") if equals and told else ""
            problems.add(place, "", reason or "must have the form KEY=VALUE")
            continue
        option = Document(source=str(place), value={"set": {key: read.value}}, keys={(): place})
        found += read_layer("--set", option, ("set",), problems).assignments
    return Layer(label="--set", place=Place("--set"), assignments=tuple(found))
