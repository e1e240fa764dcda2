"""What curves are made of the events of a training."""

from dataclasses import replace

from core.events import StepsTaken
from workbench.series import numbers

EVENT = StepsTaken(
    step=7,
    epoch=0.5,
    losses={"total": 2.0},
    grad_norm=0.5,
    learning_rate=1e-3,
    pictures_per_s=90.0,
    seconds=3.0,
    data_share=0.25,
)


def test_the_share_of_time_spent_waiting_for_pictures_is_a_curve():
    """It stands beside the pictures a second; records from before it was measured have no such curve."""
    assert numbers(EVENT)["", "data_share"] == 0.25
    assert numbers(EVENT)["", "pictures_per_s"] == 90.0
    assert ("", "data_share") not in numbers(replace(EVENT, data_share=None))
