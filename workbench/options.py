"""How `run` goes about a plan."""

from dataclasses import dataclass
from typing import Literal

from workbench.trainers import Trainer

Executor = Literal["ray", "inline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How `run` goes about a plan; nothing of it enters a trial's identity."""

    executor: Executor = "ray"  # `ray` runs trials as processes, `inline` one after another in this one
    until_decided: bool = False  # go on look by look while a claim is undecided for want of seeds
    budget_seconds: float | None = None  # wall time within which a further look must fit; None: the study's own
    tracking_uri: str | None = None  # MLflow's; None: the study's own, or the embedded database
    address: str | None = None  # of a Ray cluster; None: this machine
    allow_code: bool = False  # run the code of custom parts; without it a study that has some is refused
    wait: bool = False  # for another driver of the same plan to end, rather than leave at once
    on_end: str | None = None  # a command or URL that is told how the run ended
    gpu_hours: float | None = None  # limit of the study at its profile, all attempts counted; None: the study's own
    without_gate: bool = False  # go on without a passed gate, and whatever the baseline's first epoch says
    trainer: Trainer | None = None  # the detector's code, which travels to the trials' processes; None: `core`
