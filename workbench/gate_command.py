"""`doctor --profile`: run a gate, or record the band that it compares with."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from core.recipes import DEFAULT
from workbench import bands
from workbench.gate import Asked, as_json, as_text, gate, training, training_name
from workbench.store import Store


def doctor(options: Namespace, *, write: Callable[[dict[str, Any], str], None], tell: Callable[[str], None]) -> int:
    """Run what the options ask for and return the exit code: 1 where the gate is not passed.

    Raises:
        WorkbenchError: an option, the checkpoint or the pictures cannot be used.
    """
    asked = Asked(**{name: getattr(options, name) for name in Asked.__dataclass_fields__})
    store = Store(options.runs)
    if options.record_band is None:
        result = gate(asked, store, tell=tell)
        write(as_json(result), as_text(result))
        return 0 if result.passed else 1
    recipe = options.recipe or DEFAULT
    band = bands.record(
        store,
        training(asked, recipe),
        name=training_name(asked, recipe),
        epoch=options.record_band == "epoch",
        device=options.device,
        tell=tell,
    )
    text = f"{band.name}: " + ", ".join(map(_told, band.windows)) + f" in windows of {bands.WINDOW} steps"
    if band.first_epoch is not None:
        text += f", {_told(band.first_epoch)} over the first epoch"
    write(asdict(band), f"{text}; kept in {bands.own_file(store)}\n")
    return 0


def _told(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:.4g} to {high:.4g}"
