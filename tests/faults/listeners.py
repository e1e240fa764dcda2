"""Start Ray as a study on this machine does, and print which of its programs listens where, one a line."""

import os
import sys
from pathlib import Path

import ray

from workbench.ray_executor.cluster import join

LISTENING = "0A"  # as /proc/net/tcp has it


def sockets() -> dict[str, str]:
    """Return the address of every listening socket of the machine by its inode."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[9]: line[1] for line in lines if line[3] == LISTENING}


def is_ours(number: int) -> bool:
    """Tell whether a process descends from this one."""
    while number > 1 and number != os.getpid():
        stat = Path(f"/proc/{number}/stat").read_text()
        number = int(stat.rpartition(")")[2].split()[1])
    return number > 1


def main() -> None:
    """Print the listeners."""
    join(None, cores=1)
    ray.get(ray.remote(lambda: None).remote())  # so that a worker listens, too
    listening = sockets()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [str(link.readlink()) for link in (process / "fd").iterdir()] if is_ours(int(process.name)) else []
            name = (process / "comm").read_text().strip()
        except OSError:  # it has ended
            continue
        for link in links:
            inode = link.removeprefix("socket:[").removesuffix("]")
            if inode in listening:
                sys.stdout.write(f"{listening[inode]} {name}\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
