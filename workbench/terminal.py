"""Text that others wrote, on a terminal: what would steer it is shown as an escape and does nothing."""

import re

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls of a terminal, marks that turn the direction of writing, halves of characters; not tabs and new lines."""


def visible(text: str) -> str:
    r"""Return a text that can be printed anywhere: `\x1b[2J` instead of an empty screen."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)
