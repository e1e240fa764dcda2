"""A user's own part: from `module:Class` to an object.

A module is imported as usual, or was given as text (`given_as_text`): so it can come from another machine, and two
texts of one name never mix in a process.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from core.config import Custom

_given: dict[str, ModuleType] = {}


class CustomProblem(ValueError):  # noqa: N818 - a flaw of the user's part, not of the program
    """A custom part cannot be built. The message names its target, what was found and what to do."""


def build_custom(part: Custom, **values: Any) -> Any:
    """Build the class that `part.target` names with `values`, what built-in parts of its place receive, and its args.

    Raises:
        CustomProblem: if the module, the class or one of its arguments is not as named. What the user's own code
            raises comes through as it is.
    """
    target = part.target
    build = _find(target)
    if clash := sorted(part.args.keys() & values.keys()):
        names = ", ".join(clash)
        raise CustomProblem(f"target {target} cannot be built: args may not set {names}, which its place decides")
    arguments = {**values, **part.args}
    if wrong := _wrong_arguments(build, arguments):
        given = ", ".join(sorted(arguments)) or "nothing"
        raise CustomProblem(f"target {target} cannot be built with {given}: {wrong}")
    return build(**arguments)


def _wrong_arguments(build: Any, given: Mapping[str, Any]) -> str:
    """Say what a call with these names lacks and has too much, by the signature; "" where it fits or has none."""
    try:
        signature = inspect.signature(build)
    except ValueError:  # of a class that is not written in Python
        return ""
    takes = signature.parameters
    named = {name for name, item in takes.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    takes_any = any(item.kind is item.VAR_KEYWORD for item in takes.values())
    unknown = [] if takes_any else [repr(name) for name in given if name not in named]
    lacking = [
        repr(name) for name in takes if name in named - given.keys() and takes[name].default is inspect.Parameter.empty
    ]
    told = [f"it takes no {', '.join(unknown)}"] * bool(unknown) + [f"it needs {', '.join(lacking)}"] * bool(lacking)
    return f"{' and '.join(told)}; its signature is {signature}" if told else ""


def _find(target: str) -> Any:
    module_name, class_name = target.split(":")
    module = _given[module_name] if module_name in _given else _import(target, module_name)
    build = getattr(module, class_name, None)
    if not callable(build):
        names = [name for name in vars(module) if not name.startswith("_")]
        near = get_close_matches(class_name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(names)}"
        found = f"{module_name} has no class {class_name}; {hint}"
        raise CustomProblem(f"target {target} cannot be found ({found}): name an importable module:Class")
    return build


def _import(target: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _missing_library(module_name, error) from error
        looked = ", ".join(path or "." for path in sys.path)
        found = f"no module {error.name}; looked in {looked}"
        raise CustomProblem(f"target {target} cannot be found ({found}): name an importable module:Class") from error


def _missing_library(module_name: str, error: ModuleNotFoundError) -> CustomProblem:
    return CustomProblem(
        f"{module_name} imports {error.name}, which is not installed here: install it on every machine that runs "
        "trials, or write the part without it"
    )


class _TextLoader(InspectLoader):
    """Loads one module from its text. `path` is what tracebacks call it; the text is kept there for them."""

    def __init__(self, text: str, path: Path) -> None:
        self._text, self._path = text, path

    def get_source(self, fullname: str) -> str:  # noqa: ARG002 - the signature of loaders
        return self._text

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002 - the signature of loaders
        return self.source_to_code(self._text, str(self._path))


@contextmanager
def given_as_text(modules: Mapping[str, str], *, folder: Path) -> Iterator[None]:
    """Run modules from their text (name -> text), so that `build_custom` finds them within the block.

    A module is known to Python by its name and a hash of its text, and forgotten at the end. A copy of each text is
    written into `folder`, for tracebacks and debuggers.

    Raises:
        CustomProblem: if a module imports what is not installed. What else the code raises comes through as it is.
    """
    loaded: list[str] = []
    before = dict(_given)
    try:
        for name, text in modules.items():
            known_as = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            loaded.append(known_as)
            _given[name] = _load(name, known_as, text, folder)
        yield
    finally:
        _given.clear()
        _given.update(before)
        for known_as in loaded:
            sys.modules.pop(known_as, None)


def given_texts() -> dict[str, str]:
    """Return the modules that are given as text at this moment, for another process that is to have them, too."""
    texts: dict[str, str] = {}
    for name, module in _given.items():
        assert isinstance(module.__loader__, _TextLoader)
        texts[name] = module.__loader__.get_source(name)
    return texts


def _load(name: str, known_as: str, text: str, folder: Path) -> ModuleType:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    loader = _TextLoader(text, path)
    spec = importlib.util.spec_from_file_location(known_as, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path}: has no module specification")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known_as] = module  # as an import does: dataclasses look there for the names of a class
    try:
        loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise _missing_library(name, error) from error
    return module
