"""The compiled form of deformable attention on CPUs: built from `deformable.cpp` on first use, kept, and checked.

`WORKBENCH_KERNEL` chooses: `auto` (the default) takes the compiled form where it can be had, and says in one line where
it cannot; `torch` never takes it; `cpp` insists on it.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "WORKBENCH_KERNEL"
CHOICES = ("auto", "torch", "cpp")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("deformable.cpp", "deformable.h"))
DTYPES = {"float32": "float32", "bfloat16": "float32", "float64": "float64"}  # of the values, and of all else
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC")
_NATIVE = "-march=native"  # unknown to some compilers
_BUILD_SECONDS = 120


class KernelProblem(RuntimeError):  # noqa: N818 - of the machine, not of the program
    """The compiled form cannot be had here. The message says why and what to do."""


class Kernel:
    """The functions of the library, by the dtype of the values: each takes addresses and returns 0 if all went well."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.forward = {dtype: self._function(library, f"forward_{dtype}", 5) for dtype in DTYPES}
        self.backward = {dtype: self._function(library, f"backward_{dtype}", 9) for dtype in DTYPES}
        openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)  # torch's own: two pools would fight for the cores
        self.has_threads = openmp is not None
        library.use_threads_of.argtypes = (ctypes.c_void_p,)
        library.use_threads_of(ctypes.cast(openmp, ctypes.c_void_p) if openmp is not None else None)

    @staticmethod
    def _function(library: ctypes.CDLL, name: str, tensors: int) -> Callable[..., int]:
        function = library[name]
        function.argtypes = (ctypes.c_void_p, ctypes.c_int) + (ctypes.c_void_p,) * tensors
        return function


def to_stderr(line: str) -> None:
    """Write a line."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def choose(check: Callable[[Kernel], None], *, tell: Callable[[str], None] = to_stderr) -> Kernel | None:
    """Return the compiled form, or None for the PyTorch form; `check` raises `KernelProblem` if it computes wrongly.

    `tell` takes the line that says why the compiled form cannot be had, or not be kept.

    Raises:
        ValueError: `WORKBENCH_KERNEL` is none of its values.
        KernelProblem: `WORKBENCH_KERNEL=cpp`, and it cannot be had.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}: found {wanted!r}, allowed are {', '.join(CHOICES)}: correct or unset it")
    if wanted == "torch":
        return None
    try:
        kernel = Kernel(_library(tell))
        check(kernel)
    except KernelProblem as problem:
        if wanted == "cpp":
            raise KernelProblem(f"{VARIABLE}=cpp: {problem}") from problem
        first = str(problem).partition("\n")[0]
        tell(
            f"Deformable attention runs in its PyTorch form, several times slower: {first} ({VARIABLE}=torch: silence)"
        )
        return None
    return kernel


def _library(tell: Callable[[str], None]) -> ctypes.CDLL:
    """Load the library of this source, compiler and processor, and build it if it is not in the cache.

    Raises:
        KernelProblem: there is no compiler, it fails, or the library does not load.
    """
    compiler = _compiler()
    identity = [
        *(path.read_bytes() for path in SOURCES),
        *(text.encode() for text in (*compiler, *_FLAGS, _version(compiler), _processor())),
    ]
    kept = _cache_folder() / f"{hashlib.sha256(bytes(1).join(identity)).hexdigest()[:16]}.so"
    if kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:
            pass  # not whole: built anew
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:  # complete, or not there: others build it, too
            _build(compiler, Path(folder, kept.name)).replace(kept)
        return _load(kept)
    except OSError as error:
        tell(f"The kernel of deformable attention is compiled anew for each process: {kept.parent}: {error.strerror}")
    with tempfile.TemporaryDirectory() as folder:
        return _load(_build(compiler, Path(folder, kept.name)))


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelProblem(f"the compiled kernel does not load: {error}") from error


def _build(compiler: tuple[str, ...], target: Path) -> Path:
    """Compile for this processor, or for its family where the compiler does not know how; return `target`."""
    for flags in ((*_FLAGS, _NATIVE), _FLAGS):
        command = [*compiler, *flags, str(SOURCES[0]), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelProblem(f"the C++ compiler does not run: {error}: repair it, or name another in CXX") from error
        if done.returncode == 0 and target.exists():
            return target
    said = done.stderr.strip() or f"exit status {done.returncode}"
    raise KernelProblem(f"the C++ compiler ({shlex.join(compiler)}) fails: repair it, or name another in CXX\n{said}")


def _compiler() -> tuple[str, ...]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return (found, *command[1:])
    if named:
        raise KernelProblem(f"CXX names {named[0]!r}, which is not there: correct or unset it")
    raise KernelProblem("no C++ compiler: install one (Debian and Ubuntu: apt-get install g++)")


def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelProblem(f"the C++ compiler does not run: {error}: repair it, or name another in CXX") from error
    return done.stdout


def _processor() -> str:
    """Return what tells processors apart for which other code is made."""
    told = [platform.machine(), platform.processor()]
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name = line.partition(":")[0].strip()
                if name in ("model name", "flags", "Features"):
                    told.append(line)
                elif not name and len(told) > 2:
                    break  # the other cores are alike
    except OSError:
        pass  # not Linux: what platform says must do
    return "".join(told)


def _cache_folder() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named or Path("~/.cache").expanduser()) / "detr-ablation-workbench" / "kernels"
