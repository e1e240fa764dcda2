"""A user's own part: from `module:Class` to an object."""

from importlib import import_module
from typing import Any

from core.config import Custom


def build_custom(part: Custom, **values: Any) -> Any:
    """Build the class that `part` names with the values of its place and the arguments of its own."""
    module, _, name = part.target.partition(":")
    return getattr(import_module(module), name)(**values, **part.args)
