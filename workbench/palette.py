"""One colour for each variant and each verdict, the same in every figure and on every page. A leaf."""

from collections.abc import Sequence

# Okabe and Ito's colours, which most colour-blind readers can tell apart, in an order that keeps neighbours far apart;
# their yellow is left out, since a line of it cannot be seen on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")

VERDICT_COLOURS = {"supported": "#009E73", "refuted": "#D55E00", "equivalent": "#0072B2", "undecided": "#7F7F7F"}


def variant_colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour (#rrggbb) for each name, by its place in the study; after seven they repeat."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
