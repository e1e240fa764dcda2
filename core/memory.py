"""The memory of a trial: what it keeps, and the largest amount, also where trials share a process one after another."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MALLOPT = {-1: 2**31 - 1, -3: 32 * 2**20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (32 MiB is the most): man mallopt


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next step, where it is glibc; blocks from 32 MiB on are returned.

    Else every step gets its memory from the system anew, page by page, which costs a small model a tenth of its time.
    The largest memory stays the same, and `reset_peak_memory` returns all.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def reset_peak_memory(device: torch.device) -> None:
    """Free what an earlier trial left behind and start to measure anew.

    What is there now, libraries above all, Python's collector does not look through again until the next call: that
    would take it a fifth of a second, in the middle of a step.

    On a CPU this needs Linux's /proc; elsewhere `peak_memory_bytes` goes on telling the largest memory since the
    process began.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _can_reset():
        _return_free_memory()
        _CLEAR.write_text("5", encoding="ascii")  # sets VmHWM to the present VmRSS: man proc_pid_clear_refs


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory since `reset_peak_memory`: allocated on the GPU, or resident on the CPU.

    Resident memory counts the loaded libraries (some 0.5 GB), and not the processes that read pictures ahead.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _can_reset():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _return_free_memory() -> None:
    """Give what the C library keeps for later back to the system, where it is glibc: else it counts as resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _can_reset() -> bool:
    return _CLEAR.exists() and _STATUS.exists()
