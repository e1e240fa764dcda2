"""The verdict on a claim. The rule is `docs/statistics.md`."""

from dataclasses import dataclass
from typing import Literal

Word = Literal["supported", "refuted", "equivalent", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the evidence says of one claim. Effects are fractions (AP .02), differences plus - minus.

    `low`, `high`: the two-sided interval at this look's alpha; `inner_low`, `inner_high`: the one-sided pair that
    decides equivalence. `differences` are the dots: seed -> contrast. All numbers are None when fewer than two pairs
    are finished.
    """

    claim: str
    text: str
    kind: str
    verdict: Word
    reason: str  # one sentence a user can act on
    effect: float | None
    low: float | None
    high: float | None
    inner_low: float | None
    inner_high: float | None
    margin: float
    alpha: float
    look_seeds: int
    n_pairs: int
    sd: float | None  # of the paired differences
    correlation: float | None  # between the two sides over seeds; None unless the claim has two terms
    p_value: float | None
    strong: bool  # supported beyond the margin
    seeds_needed: int | None  # for 80 % power at the margin; only when undecided for want of seeds
    still_rising: tuple[str, ...]  # variants whose curves had not flattened: "learns faster", not "is better"
    post_hoc: bool
    differences: dict[int, float]
    notes: tuple[str, ...] = ()
