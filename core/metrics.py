"""COCO's twelve numbers, and one of the mechanism. A leaf: loads without torch.

All values are fractions in [0, 1]; None where nothing can be scored.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Average precision and recall as pycocotools defines them, with the sizes that the data set declares.

    `ar50_proposals`: share of the true boxes that overlap an encoder proposal that became a query by an IoU of .5 or
    more, whatever its class; None where no query is selected from the encoder. `per_class` maps a class name to its
    {"ap": ..., "ap50": ...}.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    ar50_proposals: float | None = None
    per_class: dict[str, dict[str, float | None]] = field(default_factory=dict[str, dict[str, float | None]])
    num_pictures: int = 0
    num_boxes: int = 0

    def numbers(self) -> dict[str, float]:
        """Return the scored numbers by name, without the None."""
        return {name: value for name in NUMBER_NAMES if (value := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Rebuild from `to_json`, ignoring keys of later versions."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in plain.items() if key in known})


NUMBER_NAMES = tuple(item.name for item in fields(Metrics) if item.name.startswith(("ap", "ar")))
COCO_NAMES = NUMBER_NAMES[:12]  # in the order of pycocotools
