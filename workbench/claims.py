"""Read the claims of a study file: what they refer to must exist, and their margins must be fractions."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from core.metrics import NUMBER_NAMES
from workbench.problems import Place, Problems, as_key, did_you_mean
from workbench.study import Claim, Term, Variant
from workbench.study_schema import ClaimPart, TermPart
from workbench.yaml12 import Document, Path_

LARGEST_MARGIN = 0.2  # of a fraction: above it somebody wrote points
ROUNDING = 1e-9  # of a sum of weights


def check_metric(metric: str, place: Place, key: str, problems: Problems) -> None:
    """Tell a metric that does not exist."""
    if metric not in NUMBER_NAMES:
        hint = f"{did_you_mean(metric, NUMBER_NAMES)}allowed: {', '.join(NUMBER_NAMES)}"
        problems.add(place, key, f"no such metric: {metric!r}; {hint}")


def check_margin(margin: float, place: Place, key: str, problems: Problems) -> None:
    """Tell a margin in points."""
    if margin > LARGEST_MARGIN:
        text = (
            f"{margin:g} is above {LARGEST_MARGIN}: margins are fractions, not points; did you mean {margin / 100:g}?"
        )
        problems.add(place, key, text)


def check_margins(margins: Mapping[str, float], document: Document, path: tuple[str, ...], problems: Problems) -> None:
    """Tell what is wrong with the margins by metric that stand at `path`."""
    for metric, margin in margins.items():
        key = ".".join((*path, metric))
        check_metric(metric, document.place((*path, metric)), key, problems)
        check_margin(margin, document.value_place((*path, metric)), key, problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimReader:
    """What claims are read against: `names` are all variants written, `variants` those that could be resolved."""

    document: Document
    problems: Problems
    names: Collection[str]
    variants: Mapping[str, Variant]
    selected: Collection[str]
    margins: Mapping[str, float]

    def read(self, parts: Iterable[tuple[int, ClaimPart]]) -> tuple[Claim, ...]:
        """Read the claims, each with its position in the file."""
        claims: list[Claim] = []
        for position, part in parts:
            at = ("claims", position)
            if any(claim.id == part.id for claim in claims):
                self._tell((*at, "id"), f"two claims have the id {part.id}")
            claims.append(self._claim(at, part))
        return tuple(claims)

    def _claim(self, at: Path_, part: ClaimPart) -> Claim:
        terms = self._terms(at, part)
        named = dict.fromkeys(term.variant for term in terms)
        return Claim(
            id=part.id,
            text=part.text,
            kind=part.kind,
            terms=terms,
            margin=self._margin(at, part, terms),
            family=part.family,
            missing=tuple(name for name in named if name not in self.selected),
        )

    def _terms(self, at: Path_, part: ClaimPart) -> tuple[Term, ...]:
        """Return the contrast, with `plus` and `minus` spelt out."""
        if part.terms is not None and (part.plus, part.minus) == (None, None):
            terms = [
                self._term((*at, "terms", position, "variant"), term, part) for position, term in enumerate(part.terms)
            ]
        elif part.terms is None and part.plus is not None and part.minus is not None:
            plus, minus = TermPart(variant=part.plus, weight=1.0), TermPart(variant=part.minus, weight=-1.0)
            terms = [self._term((*at, "plus"), plus, part), self._term((*at, "minus"), minus, part)]
        else:
            self._tell(at, "needs plus and minus, or terms instead of them")
            return ()
        if len({(term.variant, term.metric, term.parameters) for term in terms}) < len(terms):
            self._tell(at, "compares a score with itself")
        elif abs(sum(term.weight for term in terms)) > ROUNDING or not any(term.weight for term in terms):
            self._tell((*at, "terms"), "compares nothing: the weights must add up to 0 and not all be 0")
        return tuple(terms)

    def _term(self, at: Path_, term: TermPart, claim: ClaimPart) -> Term:
        """Read one term whose variant is named at `at`."""
        if term.variant not in self.names:
            hint = f"{did_you_mean(term.variant, self.names)}there are: {', '.join(self.names)}"
            self._tell(at, f"no such variant: {term.variant!r}; {hint}")
        metric = term.metric or claim.metric
        if metric is None:
            self._tell(at[:2], "needs a metric")
        else:
            path = (*at[:2], "metric") if term.metric is None else (*at[:-1], "metric")
            check_metric(metric, self.document.value_place(path), as_key(path), self.problems)
        variant = self.variants.get(term.variant)
        return Term(
            variant=term.variant,
            metric=metric or "",
            weight=term.weight,
            parameters=term.parameters
            or claim.parameters
            or (variant.config.evaluation.parameters if variant else "averaged"),
        )

    def _margin(self, at: Path_, part: ClaimPart, terms: tuple[Term, ...]) -> float:
        """Return the claim's own margin or the profile's for its metric; LARGEST_MARGIN where a problem is told."""
        if part.margin is not None:
            path = (*at, "margin")
            check_margin(part.margin, self.document.value_place(path), as_key(path), self.problems)
            return part.margin
        metrics = sorted({term.metric for term in terms} & set(NUMBER_NAMES))
        if len(metrics) > 1:
            self._tell(at, f"needs a margin of its own: its terms differ in metric ({', '.join(metrics)})")
        elif metrics and metrics[0] not in self.margins:
            self._tell(at, f"needs a margin: neither it nor the profile's margins name one for {metrics[0]}")
        elif metrics:
            return self.margins[metrics[0]]
        return LARGEST_MARGIN

    def _tell(self, at: Path_, text: str) -> None:
        self.problems.add(self.document.value_place(at), as_key(at), text)
