"""The first losses of a recipe.

Run as a program, it writes the golden file again:

    python tests/core/golden_losses.py

Do that only in a commit that means to change numerics, and bump `core.numerics.VERSION` in it.
"""

import json
from pathlib import Path

import torch

from core import numerics
from core.data.splits import open_data
from core.trainer import Trainer
from workbench.study_file import Selection, load_study

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "refinement_detach_laptop.json"
STEPS = 50
PICTURES = 200


def losses() -> list[float]:
    """Train the baseline of the first study's laptop profile for fifty steps, on a few of its pictures."""
    study = load_study(ROOT / "studies" / "refinement_detach.yaml", Selection(profile="laptop"))
    config = study.variants[0].config
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_train": PICTURES, "num_val": 1})})
    data = open_data(config.data, root=None, cache=None)
    trainer = Trainer(config, seed=0, data=data, device=torch.device("cpu"))
    return [trainer.step()[0]["total"] for _ in range(STEPS)]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {"numerics_version": numerics.VERSION, "torch": torch.__version__, "losses": losses()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
