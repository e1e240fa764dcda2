"""Holds trials back until something has happened to them. In a module of its own, which their processes import."""

import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Lets no trial beyond a step until a file is there: then whatever is to happen meanwhile has happened."""

    step: int
    file: Path
    kind: str = "gate"

    def strike(self, step: int, _seed: int) -> None:
        """Wait where it is time to."""
        while step == self.step and not self.file.exists():
            time.sleep(0.05)
