"""The checks of `doctor` on the machine itself: cores, memory, folders, disk, clock, ports, network."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from workbench import provenance
from workbench.findings import GIGABYTE, Finding
from workbench.labels import size

MEMORY_A_CORE = 1.5 * GIGABYTE  # of a trial of the laptop profile, with torch
LEAST_SHARED_MEMORY, ENOUGH_SHARED_MEMORY = 128 * 1024**2, 1024**3
LEAST_DISK, ENOUGH_DISK = 1 * GIGABYTE, 10 * GIGABYTE
CLOCK_NOTE_SECONDS, CLOCK_PROBLEM_SECONDS = 2.0, 300.0  # leases bear five minutes
LONGEST_SOCKET = 107  # characters of the path of a Unix socket
RAY_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store"
PORTS = {5000: "mlflow ui (--port names another)", 8501: "streamlit (--server.port names another)"}
RAY_PORTS = {6379: "ray start --head (--port)", 8265: "Ray's dashboard (--dashboard-port)"}
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "fuse.", "glusterfs", "wekafs")

_CGROUP = Path("/sys/fs/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_SHARED_MEMORY = Path("/dev/shm")


def cores(_runs: Path) -> Iterator[Finding]:
    """Say how many cores a run gets, and what holds it to fewer than there are."""
    usable, there = provenance.available_cores(), os.cpu_count() or 1
    limited = "" if usable == there else f" of {there}, by affinity or a container's quota"
    yield Finding(what="cores", state="ok", found=f"{usable}{limited}")


def memory(_runs: Path) -> Iterator[Finding]:
    """Compare the free memory with what as many trials as there are cores need."""
    free = _free_memory()
    if free is None:
        yield Finding(what="memory", state="note", found="how much is free cannot be told here")
        return
    needed = MEMORY_A_CORE * provenance.available_cores()
    if free >= needed:
        yield Finding(what="memory", state="ok", found=f"{size(free)} free")
        return
    yield Finding(
        what="memory",
        state="problem" if free < MEMORY_A_CORE else "note",
        found=f"{size(free)} free, and as many trials as there are cores want {size(needed)}",
        remedy="end what fills it, or run fewer at once (training.threads, taskset)",
    )


def _free_memory() -> int | None:
    """Return the free bytes, within the container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((_CGROUP / "memory.max").read_text("ascii"))
        return min(free, limit - int((_CGROUP / "memory.current").read_text("ascii")))
    except (OSError, ValueError):  # no container, or "max"
        return free


def shared_memory(_runs: Path) -> Iterator[Finding]:
    """Look at /dev/shm, through which Ray and data workers hand over what is large."""
    if not _SHARED_MEMORY.is_dir():
        found = "there is no /dev/shm; Ray then uses the temporary folder"
        yield Finding(what="shared memory", state="note", found=found)
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    state = "problem" if free < LEAST_SHARED_MEMORY else "note" if free < ENOUGH_SHARED_MEMORY else "ok"
    remedy = "" if state == "ok" else "docker run --shm-size=2g, or in Kubernetes a volume of medium Memory on /dev/shm"
    yield Finding(what="shared memory", state=state, found=f"{size(free)} free in /dev/shm", remedy=remedy)


def runs_folder(runs: Path) -> Iterator[Finding]:
    """See whether records can be written, renamed and linked, which claims of trials need."""
    place = nearest(runs)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as folder:
            first = Path(folder) / "first"
            first.write_bytes(b"1")
            first.rename(first.with_name("second"))
            (Path(folder) / "third").hardlink_to(first.with_name("second"))
    except OSError as error:
        yield Finding(
            what="records",
            state="problem",
            found=f"{place}: files cannot be made, renamed and linked there ({error.strerror})",
            remedy="name another folder with --runs",
        )
        return
    yield Finding(what="records", state="ok", found=f"{runs} can be written")


def nearest(path: Path) -> Path:
    """Return the path, or the nearest folder around it that is there."""
    return next((place for place in (path.absolute(), *path.absolute().parents) if place.is_dir()), Path("/"))


def disk(runs: Path) -> Iterator[Finding]:
    """Tell how much room the records have."""
    free = shutil.disk_usage(nearest(runs)).free
    state = "problem" if free < LEAST_DISK else "note" if free < ENOUGH_DISK else "ok"
    remedy = "" if state == "ok" else "make room, name another folder with --runs, or set execution.quota"
    yield Finding(what="disk", state=state, found=f"{size(free)} free for the records", remedy=remedy)


def file_system(runs: Path) -> Iterator[Finding]:
    """Tell what the kind of file system means for the records."""
    kind = file_system_of(nearest(runs))
    if kind is None:
        yield Finding(what="file system", state="note", found="its kind cannot be told here")
    elif kind.startswith(NETWORK_FILE_SYSTEMS):
        yield Finding(
            what="file system",
            state="note",
            found=f"{kind}: records may be shared between machines, but an SQLite database may not",
            remedy="where several machines run studies, name an MLflow server with --tracking-uri",
        )
    elif kind in ("tmpfs", "ramfs", "overlay", "overlayfs"):
        whose = "a container's own layer" if kind.startswith("overlay") else "memory"
        remedy = "name a folder on a disk with --runs"
        yield Finding(what="file system", state="note", found=f"{kind}: records go with {whose}", remedy=remedy)
    else:
        yield Finding(what="file system", state="ok", found=kind)


def file_system_of(path: Path) -> str | None:
    """Return the kind of file system that a folder is on, as Linux names it."""
    try:
        lines = _MOUNTS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found, longest = None, -1
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if path.resolve().is_relative_to(point) and len(point.parts) >= longest:  # of two on one point the later one
            found, longest = after.split()[0], len(point.parts)
    return found


def clock(runs: Path) -> Iterator[Finding]:
    """Compare this machine's clock with that of the file system, which stamps the records."""
    with tempfile.NamedTemporaryFile(dir=nearest(runs), prefix=".doctor-") as file:
        before = time.time()
        file.write(b"1")
        file.flush()
        stamped, after = Path(file.name).stat().st_mtime, time.time()
    ahead = stamped - (before + after) / 2
    state = "ok"
    if abs(ahead) > CLOCK_NOTE_SECONDS:
        state = "problem" if abs(ahead) > CLOCK_PROBLEM_SECONDS else "note"
    remedy = "" if state == "ok" else "let both follow a time server (chrony, systemd-timesyncd)"
    found = f"{abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} the file system's"
    yield Finding(what="clock", state=state, found=found, remedy=remedy)


def home(_runs: Path) -> Iterator[Finding]:
    """See whether the home folder can be written, where caches and Ray's token are kept."""
    folder = Path.home()
    if problem := unwritable(folder):
        yield Finding(
            what="home",
            state="note",
            found=f"{folder}: {problem}; trials on this machine run, and what is kept there is made anew each time",
            remedy="set XDG_CACHE_HOME to a folder for the compiled kernel; on a cluster RAY_AUTH_TOKEN_PATH",
        )
    else:
        yield Finding(what="home", state="ok", found=f"{folder} can be written")


def temporary_folder(_runs: Path) -> Iterator[Finding]:
    """See whether the temporary folders can be written, and Ray's sockets have names short enough."""
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    if problem := unwritable(folder):
        remedy = "set TMPDIR to a folder that can be written"
        yield Finding(what="temporary files", state="problem", found=f"{folder}: {problem}", remedy=remedy)
        return
    ray = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    longest = LONGEST_SOCKET - len(RAY_SOCKET)
    if len(os.fsencode(ray)) > longest:
        yield Finding(
            what="temporary files",
            state="problem",
            found=f"{ray} has {len(os.fsencode(ray))} characters, and Ray's sockets below it allow {longest}",
            remedy="set RAY_TMPDIR=/tmp, or run --executor inline",
        )
        return
    yield Finding(what="temporary files", state="ok", found=f"{folder} can be written")


def unwritable(folder: Path) -> str:
    """Say why no file can be made in a folder; "" where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def ports(_runs: Path) -> Iterator[Finding]:
    """See which of the usual ports are taken on loopback; only there does anything of this project listen."""
    taken = [f"{port}, of {whose}" for port, whose in {**PORTS, **RAY_PORTS}.items() if not _free(port)]
    if taken:
        found = f"in use: {'; '.join(taken)}"
        yield Finding(what="ports", state="note", found=found, remedy="what listens there may be what you want to see")
    else:
        yield Finding(what="ports", state="ok", found=f"{', '.join(map(str, {**PORTS, **RAY_PORTS}))} are free")


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def network(_runs: Path) -> Iterator[Finding]:
    """See whether this machine reaches itself, which Ray needs, and whether a way out is there; nothing is sent out."""
    with socket.socket() as listener, socket.socket() as caller:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            caller.settimeout(5)
            caller.connect(listener.getsockname())
        except OSError as error:
            found = f"this machine cannot reach itself at 127.0.0.1 ({error.strerror})"
            remedy = "bring up its loopback interface, or run --executor inline"
            yield Finding(what="network", state="problem", found=found, remedy=remedy)
            return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way_out:
        try:
            way_out.connect(("192.0.2.1", 9))  # an address that nobody has; of a datagram socket this sends nothing
        except OSError:
            found = "none but this machine's own; studies run, and pretrained weights must be files"
            yield Finding(what="network", state="note", found=found)
            return
    yield Finding(what="network", state="ok", found="loopback, and a way out")
