"""What a report says, before any layout: tables of text, and what is told of each claim."""

from dataclasses import dataclass, replace

from workbench.records import StudyResults, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text under a header. `bold` rows are stressed; after the first `left` columns come numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    bold: frozenset[int] = frozenset()
    left: int = 1

    def without(self, name: str) -> "Table":
        """Return the table without the column of that name, one of the words; as it is where there is none."""
        if name not in self.header:
            return self
        index = self.header.index(name)
        rows = tuple((*row[:index], *row[index + 1 :]) for row in self.rows)
        return replace(self, header=(*self.header[:index], *self.header[index + 1 :]), rows=rows, left=self.left - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimLines:
    """What is said of one claim besides its row: the statement, why the verdict, what to do, what else to know."""

    claim: str
    text: str
    verdict: Verdict
    details: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """Everything a report says, before any layout."""

    title: str
    question: str
    claims: Table
    lines: tuple[ClaimLines, ...]
    scores: tuple[Table, ...]
    facts: tuple[str, ...]  # cost, data left out, hardware, revision
    results: StudyResults
    verdicts: tuple[Verdict, ...]
