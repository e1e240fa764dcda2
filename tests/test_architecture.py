"""Who may import whom, read from the source and seen in fresh interpreters. docs/design.md gives the reasons."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("core", "workbench", "dashboard") for path in (ROOT / package).rglob("*.py"))

# Everything under the first name must not import anything under the second.
FORBIDDEN = [
    ("core", "workbench"),
    ("core", "dashboard"),
    ("workbench", "dashboard"),
    ("core.model", "core.loss"),
    ("core.loss", "core.model"),
]

# Only the files under the second name may import the first: one place to change when the library does.
ONE_IMPORTER = [
    ("ray", "workbench.ray_executor"),
    ("mlflow", "workbench.mlflow_mirror"),
    ("pycocotools", "core.evaluation.coco_ap"),
    ("hotcoco", "core.evaluation.coco_ap"),
    ("streamlit", "dashboard"),
]

# Reading a study, a plan or results must not cost the seconds that these need.
HEAVY = ("torch", "ray", "mlflow")
SLOW = (*HEAVY, "pandas", "scipy.stats", "scipy.optimize", "statsmodels")  # a second and more, in all
LIGHT = [
    "core.config",
    "core.events",
    "core.metrics",
    "core.numerics",
    "core.parts",
    "workbench.study_file",
    "workbench.plan",
    "workbench.store",
    "workbench.verdict",
    "dashboard.load",
]

STUDY = "studies/refinement_detach.yaml"

# A longer file usually owns two ideas, and a reader can no longer hold it. The house size is 300.
MOST_LINES = 400
LONGER = {"core/config.py": "every toggle in one place is the manual of what a study may set"}


def name_of(path: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return every name that a file imports, also inside functions: `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def under(name: str, package: str) -> bool:
    """Say whether a dotted name is the package or something in it."""
    return name == package or name.startswith(f"{package}.")


IMPORTS = {name_of(path): imports_of(path) for path in FILES}


@pytest.mark.parametrize(("importer", "imported"), FORBIDDEN)
def test_package_does_not_know_the_other(importer, imported):
    """The packages form layers, and model and loss meet only in core.types: each can be read and replaced alone."""
    wrong = {
        module: names
        for module, imports in IMPORTS.items()
        if under(module, importer) and (names := {name for name in imports if under(name, imported)})
    }
    assert any(under(module, importer) for module in IMPORTS)
    assert not wrong


@pytest.mark.parametrize(("library", "owner"), ONE_IMPORTER)
def test_library_has_one_importer(library, owner):
    """A library that may change under us is imported in one place, and there it is imported."""
    importers = {module for module, names in IMPORTS.items() if any(under(name, library) for name in names)}
    assert importers
    assert all(under(module, owner) for module in importers)


def test_no_files_import_each_other_in_a_circle():
    """Each file can be read after those that it stands on, also where an import waits inside a function."""
    used = {
        module: {
            name
            for name in imports & IMPORTS.keys()
            if not any(under(longer, name) for longer in imports & IMPORTS.keys() - {name})
        }
        for module, imports in IMPORTS.items()
    }
    assert list(TopologicalSorter(used).static_order())


def test_dashboard_meets_the_workbench_in_one_file():
    """Pages and charts draw; only dashboard.load knows where the numbers come from."""
    importers = {
        module
        for module, names in IMPORTS.items()
        if under(module, "dashboard") and any(under(name, "workbench") for name in names)
    }
    assert importers == {"dashboard.load"}


@pytest.mark.parametrize("module", LIGHT)
def test_module_loads_without_the_heavy_libraries(module):
    """--help, check, plan, status and the dashboard answer at once because torch, ray and mlflow are not loaded."""
    assert loaded_after(f"import {module}", HEAVY) == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["check", STUDY], ["plan", STUDY, "--runs", "{runs}"], ["status", STUDY, "--runs", "{runs}"]],
    ids=lambda arguments: arguments[0],
)
def test_command_loads_no_heavy_library(arguments, tmp_path):
    """What a user types before and between runs answers at once."""
    filled = [argument.format(runs=tmp_path) for argument in arguments]
    run_command = (
        "import runpy, sys\n"
        f"sys.argv = {['workbench', *filled]!r}\n"
        "try:\n"
        "    runpy.run_module('workbench', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
    )
    assert loaded_after(run_command, SLOW) == []


def test_core_loads_nothing_of_the_studies():
    """The detector can be used without the workbench: training it loads neither Ray, MLflow nor Streamlit."""
    assert loaded_after("import core.training", ("ray", "mlflow", "streamlit", "workbench", "dashboard")) == []


def test_files_can_be_read_in_one_sitting():
    """A file that grows beyond the limit is split where its second idea begins."""
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {file for file, lines in lengths.items() if lines > MOST_LINES} == LONGER.keys()


def loaded_after(code: str, libraries: tuple[str, ...]) -> list[str]:
    """Run code in a fresh interpreter and return those of the libraries that it loaded."""
    report = f"{code}\nimport sys\nprint(*sorted(set({libraries!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()
