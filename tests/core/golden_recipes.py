"""What each published recipe is, in numbers: its parameters at full size, its start, outputs and losses when small.

Made when the forward passes agreed with an independent implementation (test_parity.py). Run as a program, it writes the
golden file again:

    python tests/core/golden_recipes.py

Do that only in a commit that means to change numerics, and bump `core.numerics.VERSION` in it.
"""

import hashlib
import json
from pathlib import Path

import torch
from toggles import put, small

from core import numerics
from core.data.batching import training_batch
from core.data.splits import open_data
from core.detector import build_detector
from core.recipes import RECIPES
from core.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden" / "recipes.json"
STEPS = 50
NUM_CLASSES = 91
NAMES = [name for name in RECIPES if name != "faster_rcnn"]


def describe(name: str) -> dict:
    """Return the numbers of one recipe: keys and shapes at full size, all else at the size of `toggles.small`."""
    with torch.device("meta"):  # shapes without memory
        full = build_detector(RECIPES[name], num_classes=NUM_CLASSES, seed=0)
    config = put(small(name), (("training", "epochs"), STEPS // 2))
    trainer = Trainer(config, seed=0, data=open_data(config.data, root=None, cache=None), device=torch.device("cpu"))
    start = torch.cat([parameter.detach().flatten() for parameter in trainer.detector.parameters()]).double()
    batch = training_batch(trainer.data, config, seed=0, step=0)
    with torch.no_grad():
        last = trainer.detector.model(batch)[-1]
    losses = [trainer.step()[0]["total"] for _ in range(STEPS)]
    return {
        "trainable_parameters": sum(p.numel() for p in full.parameters() if p.requires_grad),
        "tensors": len(full.state_dict()),
        "keys_and_shapes": _hash([f"{key} {tuple(value.shape)}" for key, value in full.state_dict().items()]),
        "start": [start.mean().item(), start.std().item()],
        "outputs": [number.item() for x in (last.logits, last.boxes) for number in (x.mean(), x.std())],
        "losses": losses,
    }


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


if __name__ == "__main__":
    golden = {
        "numerics_version": numerics.VERSION,
        "torch": torch.__version__,
        "recipes": {name: describe(name) for name in NAMES},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
