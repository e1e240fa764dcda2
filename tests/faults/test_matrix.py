"""Every fault of the matrix is there."""

import re
from pathlib import Path

FAULTS = 28


def test_no_fault_is_missing():
    """F1 to F28 each have a scenario and a control, in some file beside this one."""
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*_faults.py"))
    found = {int(number) for number in re.findall(r'number="F(\d+)', text)}
    assert found == set(range(1, FAULTS + 1))
