"""Where numbers come from: code, versions and hardware. Stored with every result, outside a trial's identity."""

import hashlib
import os
import platform
import shlex
import shutil
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import core
from workbench import code_state

_CODE = {".py", ".cpp", ".h"}
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "hotcoco",
    "pycocotools",
    "opencv-python-headless",
    "pydantic",
)

COMPARED = ("code_hash", "torch", "threads", "kernel", "device", "gpu", "precision", "world_size")
"""The facts in which trials of one claim, and attempts at one trial, must not differ unseen."""


def collect(*, threads: int, device: str, precision: str) -> dict[str, Any]:
    """Return what a result of this process depends on, as plain JSON values, as far as it is known before a step."""
    revision, dirty = git()
    return {
        "git_revision": revision,
        "git_dirty": dirty,
        **code_state.current().to_json(),
        "code_hash": code_hash(),
        "torch": installed("torch"),
        "versions": {name: installed(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": available_cores(),
        "gpus": list(visible_gpus()) if device != "cpu" else [],
        "threads": threads,
        "device": device,
        "precision": precision,
    }


def computed(device: str) -> dict[str, Any]:
    """Return what is known of the numbers only where they were computed: the kernel, the GPU and torch's switches."""
    return {"kernel": kernel(), "gpu": _gpu(device), "switches": _switches()}


def _gpu(device: str) -> str | None:
    """Return the type of the GPU that this process computes on; None on a CPU."""
    if device == "cpu":
        return None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(device))
    names = dict.fromkeys(visible_gpus())
    return " + ".join(names) or None


def _switches() -> dict[str, Any]:
    """Return the settings of torch that decide how sums are done, where it is loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def kernel() -> str | None:
    """Return which form of deformable attention has computed in this process (`torch`, `cpp`); None if none has."""
    sampling = sys.modules.get("core.model.sampling")  # where no detector was loaded, torch need not be, either
    return "+".join(sorted(sampling.used)) or None if sampling is not None else None


@cache
def code_hash() -> str:
    """Return a hash of the source of `core`: two results with the same hash ran the same detector code."""
    folder = Path(core.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _CODE):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def git() -> tuple[str | None, bool | None]:
    """Return the revision of the working tree that `core` lies in, and whether it has changes; None without git."""
    revision = code_state.git("rev-parse", "HEAD")
    if revision is None:
        return None, None
    status = code_state.git("status", "--porcelain")
    return revision, None if status is None else bool(status)


def available_cores() -> int:
    """Return how many cores this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


@cache
def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that a trial may use, without importing torch."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown in ("", "-1") or shutil.which("nvidia-smi") is None:
        return ()
    listed = code_state.said_by("nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader") or ""
    found = [line.split(", ", 2) for line in listed.splitlines() if line.count(", ") >= 2]
    if shown is None:
        return tuple(name for _, _, name in found)
    asked = [word.strip() for word in shown.split(",")]
    chosen = [name for word in asked for index, uuid, name in found if word == index or uuid.startswith(word)]
    return tuple(chosen) or tuple(name for _, _, name in found[: len(asked)])  # a part of a GPU has a name of its own


def tool(name: str) -> str:
    """Return how to call a program that was installed beside this Python: by name where the shell finds it."""
    return name if shutil.which(name) else f"{shlex.quote(sys.executable)} -m {name}"


def installed(library: str) -> str | None:
    """Return the version of a library; None where it is not there."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
