"""Where the time of the laptop recipe's step goes.

    python benchmarks/phases.py [--steps 200]

The baseline of `refinement_detach` at `laptop`, one thread, data included: 200 drawn pictures, as in the golden losses.
Medians of CPU time over the steps, with least and most, each phase by a clock around it; `rest` is what none covers.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import spread, table

import core.trainer
from core.data.splits import open_data
from core.detector import DetrDetector
from core.trainer import Trainer
from workbench.study_file import Selection, load_study

STUDY = Path(__file__).parents[1] / "studies" / "refinement_detach.yaml"
WARM_UP = 10
OPTIMISER = "clipping, AdamW and average"


def laptop_trainer() -> Trainer:
    """Build the trainer of the laptop recipe."""
    config = load_study(STUDY, Selection(profile="laptop")).variants[0].config
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_train": 200, "num_val": 1})})
    return Trainer(config, seed=0, data=open_data(config.data, root=None, cache=None), device=torch.device("cpu"))


def phases(trainer: Trainer, steps: int) -> dict[str, list[float]]:
    """Take steps; return the CPU seconds of each phase in each of them, and of the whole `step`."""
    detector = trainer.detector
    assert isinstance(detector, DetrDetector)
    assert trainer.averaged is not None
    model = detector.model
    spent: dict[str, float] = defaultdict(float)
    detector.criterion = _clocked(detector.criterion, spent, "matching and loss")  # type: ignore[assignment]
    for owner, method, phase in (
        (trainer, "_next_parts", "data"),
        (model.backbone, "forward", "backbone"),
        (model.neck, "forward", "neck and encoder"),
        (model.encoder, "forward", "neck and encoder"),
        (model.decoder, "forward", "decoder"),
        (torch.Tensor, "backward", "backward"),
        (trainer.optimizer, "zero_grad", OPTIMISER),
        (core.trainer, "gradient_norm", OPTIMISER),
        (core.trainer, "shorten", OPTIMISER),
        (trainer.scaler, "step", OPTIMISER),
        (trainer.averaged, "update", OPTIMISER),
        (trainer, "step", "step"),
    ):
        setattr(owner, method, _clocked(getattr(owner, method), spent, phase))
    taken: list[dict[str, float]] = []
    for _ in range(WARM_UP + steps):
        spent.clear()
        trainer.step()
        taken.append(dict(spent))
    return {name: [step[name] for step in taken[WARM_UP:]] for name in taken[-1]}


def _clocked(run: Callable[..., Any], spent: dict[str, float], phase: str) -> Callable[..., Any]:
    def timed(*inputs: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return run(*inputs, **named)
        finally:
            spent[phase] += time.process_time() - began

    return timed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    found = phases(laptop_trainer(), parser.parse_args().steps)
    whole = found.pop("step")
    found["rest"] = [step - sum(parts) for step, *parts in zip(whole, *found.values(), strict=True)]
    rows = [
        [name, spread(values, digits=2), f"{100 * median(values) / median(whole):.0f} %"]
        for name, values in [*found.items(), ("step", whole)]
    ]
    print(table(["phase", "CPU ms", "share"], rows))


if __name__ == "__main__":
    main()
