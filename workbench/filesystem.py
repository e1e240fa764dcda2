"""What kind of file system a folder lies on, as far as the machine tells."""

from pathlib import Path

NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "afs",
    "9p",
    "pvfs2",
    "wekafs",
)
_MOUNTS = Path("/proc/mounts")
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


def network_type(path: Path, *, mounts: Path = _MOUNTS) -> str | None:
    """Return the type of the network file system that `path` lies on, as `nfs4`; None on others, and where unknown."""
    found = type_of(path, mounts=mounts)
    return found if found is not None and is_network(found) else None


def is_network(kind: str) -> bool:
    """Tell whether a type of file system is one that machines share."""
    return kind in NETWORK or kind.startswith("fuse.")


def type_of(path: Path, *, mounts: Path = _MOUNTS) -> str | None:
    """Return the type of the file system that `path` lies on, whether it exists or not; None where unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    place, best, found = path.resolve(), -1, None
    for line in lines:
        _, point, kind, *_ = [*line.split(" "), "", "", ""]
        for escaped, plain in _ESCAPES.items():
            point = point.replace(escaped, plain)
        # Of two on one point the later covers the other.
        if point and place.is_relative_to(point) and len(point) >= best:
            best, found = len(point), kind
    return found
