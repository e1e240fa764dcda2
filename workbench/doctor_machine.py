"""The checks of `doctor` on the machine itself: cores, memory, folders, disk, clock, ports, network."""

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from workbench import filesystem, provenance
from workbench.findings import GIGABYTE, Finding, State, by_state, note, ok, problem
from workbench.labels import size

MEMORY_A_CORE = 1.5 * GIGABYTE  # of a trial of the laptop profile, with torch
LEAST_SHARED_MEMORY, ENOUGH_SHARED_MEMORY = 128 * 1024**2, 1024**3
LEAST_DISK, ENOUGH_DISK = 1 * GIGABYTE, 10 * GIGABYTE
CLOCK_NOTE_SECONDS, CLOCK_PROBLEM_SECONDS = 2.0, 300.0  # leases bear five minutes
LONGEST_SOCKET = 107  # characters of the path of a Unix socket
RAY_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store"
PORTS = {5000: "mlflow ui (--port names another)", 8501: "streamlit (--server.port names another)"}
RAY_PORTS = {6379: "ray start --head (--port)", 8265: "Ray's dashboard (--dashboard-port)"}

_CGROUP = Path("/sys/fs/cgroup")
_SHARED_MEMORY = Path("/dev/shm")


def cores(_runs: Path) -> Finding:
    """Say how many cores a run gets, and what holds it to fewer than there are."""
    usable, there = provenance.available_cores(), os.cpu_count() or 1
    limited = "" if usable == there else f" of {there}, by affinity or a container's quota"
    return ok("cores", f"{usable}{limited}")


def memory(_runs: Path) -> Finding:
    """Compare the free memory with what as many trials as there are cores need."""
    free = _free_memory()
    if free is None:
        return note("memory", "how much is free cannot be told here")
    needed = MEMORY_A_CORE * provenance.available_cores()
    state = _state_of(free, least=MEMORY_A_CORE, enough=needed)
    short = "" if state == "ok" else f", and as many trials as there are cores want {size(needed)}"
    remedy = "end what fills it, or run fewer at once (training.threads, taskset)"
    return by_state("memory", state, f"{size(free)} free{short}", remedy)


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


def shared_memory(_runs: Path) -> Finding:
    """Look at /dev/shm, through which Ray and data workers hand over what is large."""
    if not _SHARED_MEMORY.is_dir():
        found = "there is no /dev/shm; Ray then uses the temporary folder"
        return note("shared memory", found)
    free = shutil.disk_usage(_SHARED_MEMORY).free
    state = _state_of(free, least=LEAST_SHARED_MEMORY, enough=ENOUGH_SHARED_MEMORY)
    remedy = "docker run --shm-size=2g, or in Kubernetes a volume of medium Memory on /dev/shm"
    return by_state("shared memory", state, f"{size(free)} free in /dev/shm", remedy)


def _state_of(free: float, *, least: float, enough: float) -> State:
    return "problem" if free < least else "note" if free < enough else "ok"


def runs_folder(runs: Path) -> Finding:
    """See whether records can be written, renamed and linked, which claims of trials need."""
    place = nearest(runs)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as folder:
            first = Path(folder) / "first"
            first.write_bytes(b"1")
            first.rename(first.with_name("second"))
            (Path(folder) / "third").hardlink_to(first.with_name("second"))
    except OSError as error:
        return problem(
            "records",
            f"{place}: files cannot be made, renamed and linked there ({error.strerror})",
            "name another folder with --runs",
        )
    return ok("records", f"{runs} can be written")


def nearest(path: Path) -> Path:
    """Return the path, or the nearest folder around it that is there."""
    return next((place for place in (path.absolute(), *path.absolute().parents) if place.is_dir()), Path("/"))


def disk(runs: Path) -> Finding:
    """Tell how much room the records have."""
    free = shutil.disk_usage(nearest(runs)).free
    state = _state_of(free, least=LEAST_DISK, enough=ENOUGH_DISK)
    remedy = "make room, name another folder with --runs, or set execution.quota"
    return by_state("disk", state, f"{size(free)} free for the records", remedy)


def file_system(runs: Path) -> Finding:
    """Tell what the kind of file system means for the records."""
    kind = filesystem.type_of(nearest(runs))
    if kind is None:
        return note("file system", "its kind cannot be told here")
    if filesystem.is_network(kind):
        found = f"{kind}: records may be shared between machines, but an SQLite database may not"
        return note(
            "file system", found, "where several machines run studies, name an MLflow server with --tracking-uri"
        )
    if kind in ("tmpfs", "ramfs", "overlay", "overlayfs"):
        whose = "a container's own layer" if kind.startswith("overlay") else "memory"
        return note("file system", f"{kind}: records go with {whose}", "name a folder on a disk with --runs")
    return ok("file system", kind)


def clock(runs: Path) -> Finding:
    """Compare this machine's clock with that of the file system, which stamps the records."""
    with tempfile.NamedTemporaryFile(dir=nearest(runs), prefix=".doctor-") as file:
        before = time.time()
        file.write(b"1")
        file.flush()
        stamped, after = Path(file.name).stat().st_mtime, time.time()
    ahead = stamped - (before + after) / 2
    state = _state_of(-abs(ahead), least=-CLOCK_PROBLEM_SECONDS, enough=-CLOCK_NOTE_SECONDS)
    found = f"{abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} the file system's"
    return by_state("clock", state, found, "let both follow a time server (chrony, systemd-timesyncd)")


def home(_runs: Path) -> Finding:
    """See whether the home folder can be written, where caches and Ray's token are kept."""
    folder = Path.home()
    if why := unwritable(folder):
        return note(
            "home",
            f"{folder}: {why}; trials on this machine run, and what is kept there is made anew each time",
            "set XDG_CACHE_HOME to a folder for the compiled kernel; on a cluster RAY_AUTH_TOKEN_PATH",
        )
    return ok("home", f"{folder} can be written")


def temporary_folder(_runs: Path) -> Finding:
    """See whether the temporary folders can be written, and Ray's sockets have names short enough."""
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    if why := unwritable(folder):
        remedy = "set TMPDIR to a folder that can be written"
        return problem("temporary files", f"{folder}: {why}", remedy)
    ray = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    longest = LONGEST_SOCKET - len(RAY_SOCKET)
    if len(os.fsencode(ray)) > longest:
        return problem(
            "temporary files",
            f"{ray} has {len(os.fsencode(ray))} characters, and Ray's sockets below it allow {longest}",
            "set RAY_TMPDIR=/tmp, or run --executor inline",
        )
    return ok("temporary files", f"{folder} can be written")


def unwritable(folder: Path) -> str:
    """Say why no file can be made in a folder; "" where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def ports(_runs: Path) -> Finding:
    """See which of the usual ports are taken on loopback; only there does anything of this project listen."""
    taken = [f"{port}, of {whose}" for port, whose in {**PORTS, **RAY_PORTS}.items() if not _free(port)]
    if taken:
        found = f"in use: {'; '.join(taken)}"
        return note("ports", found, "what listens there may be what you want to see")
    return ok("ports", f"{', '.join(map(str, {**PORTS, **RAY_PORTS}))} are free")


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def network(_runs: Path) -> Finding:
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
            return problem("network", found, remedy)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way_out:
        try:
            way_out.connect(("192.0.2.1", 9))  # an address that nobody has; of a datagram socket this sends nothing
        except OSError:
            found = "none but this machine's own; studies run, and pretrained weights must be files"
            return note("network", found)
    return ok("network", "loopback, and a way out")
