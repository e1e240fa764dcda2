"""The code of `kind: custom` parts: found and read, never imported here, and refused unless the user allows it.

A part's module is one file, beside the study file or in a folder of Python's path. Its text goes into the trial's id
and into spec.json, so it is this text that runs, wherever the trial does.
"""

import ast
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from core.config import Custom, ExperimentConfig
from core.parts import Part
from core.paths import is_file
from workbench import durable
from workbench.errors import WorkbenchError
from workbench.problems import did_you_mean
from workbench.study import Plan, Study

FLAG = "--allow-code"


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomPart:
    """A custom part: its dotted key, the module and the class that it names."""

    key: str
    module: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.key}: {self.module}:{self.class_name}"


def custom_parts(part: Part, prefix: str = "") -> Iterator[CustomPart]:
    """Yield every custom part of a configuration."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Custom):
            module, class_name = value.target.split(":")
            yield CustomPart(key=f"{prefix}{name}", module=module, class_name=class_name)
        elif isinstance(value, Part):
            yield from custom_parts(value, f"{prefix}{name}.")


def source_file(module: str, *, beside: Path) -> Path | None:
    """Return the file of a module without importing anything: in the folder `beside`, else on Python's path."""
    file = f"{module.replace('.', '/')}.py"
    return next((folder / file for folder in (beside, *map(Path, sys.path)) if is_file(folder / file)), None)


def problem_with(part: CustomPart, *, beside: Path) -> str | None:
    """Say why a custom part cannot be built, as far as its file tells without being run; None when it looks sound."""
    path = source_file(part.module, beside=beside)
    if path is None:
        file = f"{part.module.replace('.', '/')}.py"
        looked = f"looked for {beside / file}, then for {file} on Python's path"
        return (
            f"there is no module {part.module}: {looked}; name the file that holds {part.class_name}, not its package"
        )
    try:
        names = _top_level_names(path.read_bytes())
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two of nesting without end
        where = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        return f"{path}{where}: is not Python ({error.msg if isinstance(error, SyntaxError) else error})"
    if part.class_name in names or "*" in names:
        return None
    return f"{path} defines no {part.class_name}; {did_you_mean(part.class_name, names)}there are: {', '.join(names)}"


def _top_level_names(source: bytes) -> list[str]:
    """Return the names that a module defines or imports at its top level, also within `if` and `try`; * for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user hears of them when the code runs
        waiting: list[ast.AST] = [ast.parse(source)]
    names: dict[str, None] = {}
    while waiting:
        node = waiting.pop(0)
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names[name] = None
            case ast.Import(names=found) | ast.ImportFrom(names=found):
                names |= {alias.asname or alias.name: None for alias in found}
            case ast.Name(id=name, ctx=ast.Store()):
                names[name] = None
            case _:
                waiting += ast.iter_child_nodes(node)
    return list(names)


def sources(config: ExperimentConfig, *, beside: Path) -> dict[str, str]:
    """Return the text of each module that the custom parts name.

    Raises:
        WorkbenchError: a file is missing or cannot be read, since the study file was checked.
    """
    found: dict[str, str] = {}
    for part in custom_parts(config):
        path = source_file(part.module, beside=beside)
        try:
            found[part.module] = (path or beside / part.module).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkbenchError(f"{part}: its file cannot be read ({error}): restore it") from error
    return found


def code_of_trial(checkpoint: Path, targets: Iterable[str]) -> dict[str, str]:
    """Return the text of each module that a trial's checkpoint names, from the trial's spec.json.

    Args:
        checkpoint: a file in `checkpoints/` of the trial's folder.
        targets: the `module:Class` of its custom parts.

    Raises:
        WorkbenchError: there is no spec.json, or it lacks a text.
    """
    modules = {target.split(":")[0]: target for target in targets}
    if not modules:
        return {}
    path = checkpoint.resolve().parent.parent / "spec.json"
    code = (durable.read_json(path) or {}).get("code", {})
    if missing := [target for module, target in modules.items() if module not in code]:
        found = "holds no such text" if path.is_file() else "is not there"
        raise WorkbenchError(
            f"--checkpoint {checkpoint}: uses code of your own ({', '.join(missing)}), whose text is looked for in the "
            f"record of its trial; {path} {found}: name the checkpoint where its trial wrote it, "
            "runs/trials/ID/checkpoints/"
        )
    return {module: code[module] for module in modules}


def asked_to_run(study: Study) -> list[str]:
    """Return one line for each custom part of the variants: where it is set, what it names and which file would run."""
    lines: dict[str, None] = {}
    for variant in study.variants:
        for part in custom_parts(variant.config):
            where = study.layers[variant.name].get(f"{part.key}.target", (None, f"variant {variant.name}"))[1]
            lines[f"{part} ({where}) runs {source_file(part.module, beside=study.path.parent)}"] = None
    return list(lines)


def refuse_code(plan: Plan) -> None:
    """Refuse a plan whose trials would run a user's code.

    Raises:
        WorkbenchError: with one line for each part: its key, target and file, and the flag that allows it.
    """
    if lines := asked_to_run(plan.study):
        remedy = f"this study runs code of your own; read it, then allow it with run {FLAG}"
        raise WorkbenchError("\n".join([*lines, remedy]))
