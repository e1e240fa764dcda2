"""Read the claims of a study file: what they compare, and by which margin."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from workbench.problems import Problems, as_key
from workbench.study import Claim, Term, Variant
from workbench.study_schema import ClaimPart, TermPart
from workbench.yaml12 import Document, Path_

ROUNDING = 1e-9  # of a sum of weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimReader:
    """What claims are read against. That the variants they name exist is checked by `study_file`."""

    document: Document
    problems: Problems
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
            terms = [self._term(at, term, part) for term in part.terms]
        elif part.terms is None and part.plus is not None and part.minus is not None:
            plus, minus = TermPart(variant=part.plus, weight=1.0), TermPart(variant=part.minus, weight=-1.0)
            terms = [self._term(at, plus, part), self._term(at, minus, part)]
        else:
            self._tell(at, "needs plus and minus, or terms instead of them")
            return ()
        if len({(term.variant, term.metric, term.parameters) for term in terms}) < len(terms):
            self._tell(at, "compares a score with itself")
        elif abs(sum(term.weight for term in terms)) > ROUNDING or not any(term.weight for term in terms):
            self._tell((*at, "terms"), "compares nothing: the weights must add up to 0 and not all be 0")
        return tuple(terms)

    def _term(self, at: Path_, term: TermPart, claim: ClaimPart) -> Term:
        metric = term.metric or claim.metric
        if metric is None:
            self._tell(at, "needs a metric")
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
        """Return the claim's own margin or the profile's for its metric; 0 where a problem is told."""
        if part.margin is not None:
            return part.margin
        metrics = sorted({term.metric for term in terms if term.metric})
        if len(metrics) > 1:
            self._tell(at, f"needs a margin of its own: its terms differ in metric ({', '.join(metrics)})")
        elif metrics and metrics[0] not in self.margins:
            self._tell(at, f"needs a margin: neither it nor the profile's margins name one for {metrics[0]}")
        elif metrics:
            return self.margins[metrics[0]]
        return 0.0

    def _tell(self, at: Path_, text: str) -> None:
        self.problems.add(self.document.value_place(at), as_key(at), text)
