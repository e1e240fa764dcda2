"""A Ray cluster of several nodes on this machine, in a process of its own that is told over its input what to do.

Run as a program it is that process: a line of JSON in, a line of JSON out.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Nodes:
    """Nodes as a test sees them. Each is a raylet with what it starts; the first one also has the GCS."""

    def __init__(self, cores: tuple[int, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray")  # short: the names of sockets have a limit
        self._log = Path(self._folder.name, "log").open("wb")  # noqa: SIM115 - as long as the nodes live
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nodes.py"), self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        self.address = self._ask("start", cores=cores)

    def add(self, *, cores: int, gpus: int = 0, path: Path | None = None) -> int:
        """Add a node, whose Python looks into `path` first; return its number. GPUs are only said to be there."""
        return self._ask("add", cores=cores, gpus=gpus, path=str(path or ""))

    def kill(self, number: int) -> None:
        """Kill a node and all that it runs, without a word to anybody."""
        self._ask("kill", number=number)

    def kill_gcs(self) -> None:
        """Kill the process that knows the cluster."""
        self._ask("kill_gcs")

    def close(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(OSError):  # it may have been killed
            self._ask("stop")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, what: str, **rest: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **rest}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the cluster is gone: {Path(self._folder.name, 'log').read_text()[-2000:]}")
        return json.loads(line)


def environment() -> dict[str, str]:
    """Return the environment of nodes and drivers: they find the toys, and notice soon that a head is gone."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *(path for path in sys.path if path)]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }


def serve(folder: str) -> None:
    """Be the cluster."""
    from ray.cluster_utils import Cluster

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints goes to the log
    cluster, nodes = Cluster(), []

    def add(cores: int, gpus: int = 0, path: str = "") -> None:
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ["PYTHONPATH"]]))}
        nodes.append(
            cluster.add_node(
                num_cpus=cores,
                num_gpus=gpus,
                include_dashboard=False,
                env_vars=environment,
                object_store_memory=80 * 1024**2,
                **({} if nodes else {"temp_dir": folder}),
            )
        )

    for line in sys.stdin:
        told = json.loads(line)
        answer: Any = None
        match told.pop("what"):
            case "start":
                for cores in told["cores"]:
                    add(cores)
                answer = cluster.address
            case "add":
                add(**told)
                answer = len(nodes) - 1
            case "kill":
                cluster.remove_node(nodes[told["number"]], allow_graceful=False)
            case "kill_gcs":
                nodes[0].kill_gcs_server()
            case _:
                with contextlib.suppress(Exception):  # what was killed cannot be ended in good order
                    cluster.shutdown()
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
