"""A user's own part: `kind: custom` of the configuration becomes an object."""

import importlib
from typing import Any

from core.config import Custom


def build_custom(part: Custom, **values: Any) -> Any:
    """Build the class that `part.target` names with `values`, what built-in parts of its place receive, and its args.

    Raises:
        ValueError: if the module, the class or one of its arguments is not as named.
    """
    module_name, class_name = part.target.split(":")
    try:
        build = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target {part.target} cannot be found ({error}): name an importable module:Class") from error
    try:
        return build(**values, **part.args)
    except TypeError as error:
        given = ", ".join(sorted({*values, *part.args})) or "nothing"
        raise ValueError(f"target {part.target} cannot be built with {given}: {error}") from error
