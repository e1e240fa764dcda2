"""The `search` of a study file: what may be searched, and whether each value of the space is legal in each variant."""

import math
from collections.abc import Iterable, Mapping, Sequence

from core.config import ExperimentConfig
from core.parts import flatten, scientific
from workbench.overrides import Assignment, Layer, read_layer, resolve
from workbench.problems import Place, Problems, shown
from workbench.study import Dimension, Search, Value, Variant
from workbench.study_schema import DimensionPart, SearchPart
from workbench.yaml12 import Document, Path_

SPLIT = "tune"
MOST_TRIED = 5_000  # values of the space in all variants: each is checked
_PATH: Path_ = ("search",)
_LENGTH = ("training.epochs", "training.epoch_pictures")
_FIXED = "every configuration has the same pictures, length and scoring: search another key"


class SearchReader:
    """Reads the section into a `Search`; what is wrong with it goes to `problems`."""

    def __init__(self, document: Document, part: SearchPart, problems: Problems) -> None:
        self._document, self._part, self._problems = document, part, problems
        self.space = read_layer("search", document, (*_PATH, "space"), problems)

    def refuse(self, *, seeds: int | None) -> None:
        """Tell what has no place beside a search."""
        refused = {
            "claims": "a search makes no claims; its trials choose the settings, so they can judge nothing: write the "
            "claims into a study that names the result of this one under tuned",
            "tuned": "has no place beside search: remove one of them",
        }
        for key, text in refused.items():
            if self._document.at((key,)) not in (None, []):
                self._tell((key,), text)
        if seeds is not None:
            self._problems.add(Place(f"--seeds {seeds}"), "", "a search has one seed of its own: leave --seeds out")

    def split(self, below: Iterable[Layer]) -> Layer:
        """Return the layer by which every configuration is scored on tune; tell the layers that say otherwise."""
        for layer in below:
            for item in layer.assignments:
                if item.key == "data.split" and item.value != SPLIT:
                    text = f"a search scores on {SPLIT}, apart from the comparison that follows: remove it"
                    self._problems.add(item.place, item.key, text)
        place = self._document.place(_PATH)
        split = Assignment(key="data.split", value=SPLIT, place=place)
        return Layer(label="search", place=place, assignments=(split,))

    def read(self, variants: Sequence[Variant], layers: Mapping[str, Sequence[Layer]]) -> Search | None:
        """Return the search; None where anything in its space is wrong.

        Args:
            variants: the study's, resolved.
            layers: of each variant, lowest first.
        """
        num_tried = len(variants) * sum(len(part.values or ("low", "high")) for part in self._part.space.values())
        if num_tried > MOST_TRIED:
            self._tell((*_PATH, "space"), f"has {num_tried} values to check, of all variants; allowed: {MOST_TRIED}")
            return None
        space = {
            key: self._dimension(key, self._part.space[key], variants, layers)
            for key in dict.fromkeys(item.key for item in self.space.assignments)
            if key in self._part.space and self._may_be_searched(key, variants)
        }
        self._check_length(space, variants)
        if self._problems:
            return None
        return Search(
            space=space,
            method=self._part.method,
            scheduler=self._part.scheduler,
            configurations=self._part.configurations,
            metric=self._part.metric,
            mode=self._part.mode,
        )

    def _may_be_searched(self, key: str, variants: Sequence[Variant]) -> bool:
        """Tell whether a key is a plain value of every variant that leaves pictures, length and scoring alike."""
        text = ""
        if key.startswith(("data.", "evaluation.")) or key in _LENGTH:
            text = _FIXED
        elif key.endswith(".kind"):
            text = "chooses a part, and so a variant: make two variants of it, which are searched apart"
        else:
            for variant in variants:
                if key not in flatten(scientific(variant.config)):
                    operational = key in flatten(variant.config.model_dump(mode="json"))
                    why = "changes no score" if operational else f"is no plain value in variant {variant.name}"
                    text = text or f"{why}: search another key"
        if text:
            self._tell((*_PATH, "space", key), text)
        return not text

    def _dimension(
        self, key: str, part: DimensionPart, variants: Sequence[Variant], layers: Mapping[str, Sequence[Layer]]
    ) -> Dimension:
        """Return one dimension after trying its ends, or each of its values, in every variant."""
        at: Path_ = (*_PATH, "space", key)
        tried: list[tuple[Path_, Value]] = [((*at, "values", place), v) for place, v in enumerate(part.values or ())]
        if part.values is None:
            tried = [((*at, "low"), part.low), ((*at, "high"), part.high)]
        configs = [self._try(key, value, path, layers[variant.name]) for variant in variants for path, value in tried]
        if part.values is not None:
            return Dimension(values=tuple(part.values))
        taken = [flatten(config.model_dump(mode="json"))[key] for config in configs if config]
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in taken):
            self._tell(at, f"is no number, but {shown(taken[0])}: name its values instead of a range")
        whole = all(isinstance(value, int) for value in taken)
        return Dimension(low=part.low, high=part.high, log=part.log, whole=whole)

    def _try(self, key: str, value: Value, path: Path_, layers: Sequence[Layer]) -> ExperimentConfig | None:
        place = self._document.value_place(path)
        top = Layer(label="search", place=place, assignments=(Assignment(key=key, value=value, place=place),))
        return resolve([*layers, top], self._problems)[0]

    def _check_length(self, space: Mapping[str, Dimension], variants: Sequence[Variant]) -> None:
        """Tell a budget that the space cannot fill, and a scheduler that has nothing to compare."""
        num = math.prod(count_values(dimension) for dimension in space.values())
        if self._part.configurations > num and space:
            at = (*_PATH, "configurations")
            self._tell(at, f"found {self._part.configurations}; the space has {num:g} configurations: ask for fewer")
        short = [variant.name for variant in variants if variant.config.training.epochs < 2]
        if self._part.scheduler == "asha" and short:
            text = f"asha compares after each epoch, and {', '.join(short)} trains for one: set scheduler to fifo"
            self._tell((*_PATH, "scheduler"), text)

    def _tell(self, at: Path_, text: str) -> None:
        key = ".".join(str(part) for part in at if part not in ("search", "space")) or "search"
        self._problems.add(self._document.place(at), key, text)


def count_values(dimension: Dimension) -> float:
    """Return how many values a dimension has: infinitely many where they are not whole."""
    if dimension.low is None or dimension.high is None:
        return len(dimension.values)
    return dimension.high - dimension.low + 1 if dimension.whole else math.inf
