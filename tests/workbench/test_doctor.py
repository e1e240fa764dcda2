"""What `doctor` finds, each thing once as it should be and once not."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from workbench import doctor, doctor_machine, doctor_software
from workbench.findings import Finding, check

ROOT = Path(__file__).parent.parent.parent
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    """Begin without what this machine's own environment says."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("RAY_") or name in ("TMPDIR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)


def only(look, runs=Path()):
    """Return the finding of a check; a problem says what to do."""
    finding = look(runs)
    assert (finding.state == "problem") <= bool(finding.remedy or finding.what == "kernel")
    return finding


def test_command_tells_everything_once_and_its_exit_code_counts_problems(tmp_path):
    """One line for each check, as text and as JSON; exit code 1 where there is a problem; nothing is left."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HOME": str(tmp_path), "WORKBENCH_KERNEL": "torch"}
    command = [sys.executable, "-m", "workbench", "doctor", "--runs", str(tmp_path / "runs"), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert len(told["checks"]) == len(doctor.CHECKS)
    assert told["problems"] == sum(item["state"] == "problem" for item in told["checks"])
    assert done.returncode == (1 if told["problems"] else 0)
    assert list(tmp_path.iterdir()) == []


def test_text_has_one_line_a_finding_and_a_sum():
    """A problem comes with its remedy on the same line."""
    findings = (
        Finding(what="disk", state="ok", found="enough"),
        Finding(what="ports", state="problem", found="taken", remedy="free them"),
    )
    assert doctor.as_text(findings).splitlines() == [
        "ok      disk            enough",
        "problem ports           taken: free them",
        "1 problem found.",
    ]


def test_a_check_that_fails_is_a_finding():
    """What cannot be looked at stops no other check."""

    def broken(_runs):
        raise PermissionError(13, "Permission denied")

    finding = check(broken, Path())
    assert (finding.what, finding.state) == ("broken", "note")
    assert "could not be looked at" in finding.found


@pytest.mark.parametrize(("free", "state"), [(64 << 20, "problem"), (512 << 20, "note"), (4 << 30, "ok")])
def test_shared_memory(monkeypatch, tmp_path, free, state):
    """Docker's 64 MB stop Ray and data workers."""
    monkeypatch.setattr(doctor_machine, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert only(doctor_machine.shared_memory).state == state


@pytest.mark.parametrize(("free", "state"), [(10**8, "problem"), (5 * 10**9, "note"), (10**11, "ok")])
def test_disk(monkeypatch, tmp_path, free, state):
    """Records need room, also in a folder that is still to be made."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert only(doctor_machine.disk, tmp_path / "a" / "b").state == state


@pytest.mark.parametrize(("free", "state"), [(10**9, "problem"), (2 * 10**9, "note"), (10**10, "ok")])
def test_memory(monkeypatch, free, state):
    """Less than a trial needs is a problem, less than the cores could use a note."""
    monkeypatch.setattr(doctor_machine, "_free_memory", lambda: free)
    monkeypatch.setattr(doctor_machine.provenance, "available_cores", lambda: 4)
    assert only(doctor_machine.memory).state == state


def test_memory_within_a_containers_limit(monkeypatch, tmp_path):
    """A container's limit counts where it is lower than what the machine has."""
    monkeypatch.setattr(doctor_machine, "_CGROUP", tmp_path)
    whole = doctor_machine._free_memory()
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert doctor_machine._free_memory() == 2_000_000
    assert whole is None or whole > 2_000_000


def test_cores_of_a_container_are_told(monkeypatch):
    """Fewer cores than the machine has come with the reason."""
    monkeypatch.setattr(doctor_machine.provenance, "available_cores", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert only(doctor_machine.cores).found == "2 of 64, by affinity or a container's quota"


def test_records_that_cannot_be_written(tmp_path):
    """A runs folder is tried, also one that is still to be made; a place where nothing can be made is a problem."""
    assert only(doctor_machine.runs_folder, tmp_path / "runs").state == "ok"
    assert only(doctor_machine.runs_folder, Path("/proc/1/runs")).state == "problem"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "state", "word"),
    [
        ("ext4", "ok", "ext4"),
        ("nfs4", "note", "may be shared"),
        ("lustre", "note", "may be shared"),
        ("fuse.sshfs", "note", "may be shared"),
        ("overlay", "note", "container"),
        ("tmpfs", "note", "memory"),
    ],
)
def test_file_system(monkeypatch, tmp_path, kind, state, word):
    """What a kind of file system means for the records is said; the innermost mount counts."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / xfs rw 0 0\nhost:/x {tmp_path} {kind} rw 0 0\n")
    type_of = doctor_machine.filesystem.type_of
    monkeypatch.setattr(doctor_machine.filesystem, "type_of", lambda path: type_of(path, mounts=mounts))
    finding = only(doctor_machine.file_system, tmp_path / "runs")
    assert finding.state == state
    assert word in finding.found


@pytest.mark.parametrize(("offset", "state"), [(0, "ok"), (10, "note"), (-4000, "problem")])
def test_clock(monkeypatch, tmp_path, offset, state):
    """A clock that is far from the file system's makes leases mean nothing."""
    now = doctor_machine.time.time
    monkeypatch.setattr(doctor_machine.time, "time", lambda: now() + offset)
    assert only(doctor_machine.clock, tmp_path).state == state


def test_home_that_cannot_be_written(monkeypatch, tmp_path):
    """A home folder that is none is a note: trials on one machine run without."""
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert only(doctor_machine.home).state == "note"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only(doctor_machine.home).state == "ok"


def test_long_temporary_folder(monkeypatch, tmp_path):
    """A folder that makes Ray's sockets too long is a problem unless Ray has another; so is one that is not there."""
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    finding = only(doctor_machine.temporary_folder)
    assert finding.state == "problem"
    assert "Ray's sockets below it allow 39" in finding.found
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert only(doctor_machine.temporary_folder).state == "ok"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert only(doctor_machine.temporary_folder).state == "problem"


def test_ports(monkeypatch):
    """A port that somebody listens on is named with whose it usually is."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        monkeypatch.setattr(doctor_machine, "PORTS", {port: "mlflow ui"})
        monkeypatch.setattr(doctor_machine, "RAY_PORTS", {})
        finding = only(doctor_machine.ports)
        assert (finding.state, finding.found) == ("note", f"in use: {port}, of mlflow ui")
    assert only(doctor_machine.ports).state == "ok"


def test_no_network(monkeypatch):
    """Without a way out studies still run, and it is said what they lack."""

    class Alone(socket.socket):
        def connect(self, address):
            if address[0] != "127.0.0.1":
                raise OSError(101, "Network is unreachable")
            super().connect(address)

    monkeypatch.setattr(doctor_machine.socket, "socket", Alone)
    finding = only(doctor_machine.network)
    assert finding.state == "note"
    assert "pretrained weights must be files" in finding.found


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({}, "ok"),
        ({"http_proxy": "http://proxy:3128"}, "problem"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, "problem"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.1"}, "ok"),
        ({"http_proxy": "http://me:hunter2@proxy:3128", "no_proxy": "*"}, "ok"),
    ],
)
def test_proxies(monkeypatch, environment, state):
    """A proxy must leave this machine's talk to itself alone; its address, where a password may stand, is not told."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = only(doctor_software.proxies)
    assert finding.state == state
    assert "hunter2" not in str(finding)


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        ("torch>=2.14", ""),
        ("torch >= 99, < 100", "torch 2.14.1+cpu, needs >=99"),
        ("ray[tune]>=2.60", ""),
        ("never-heard-of", "never-heard-of is not installed"),
        ("ruff==0.1", "ruff 0.17.6, needs ==0.1"),
    ],
)
def test_requirements(monkeypatch, requirement, told):
    """Lower bounds and exact versions of pyproject.toml are compared with what is installed."""
    there = {"torch": "2.14.1+cpu", "ray": "2.60.0", "ruff": "0.17.6"}
    monkeypatch.setattr(doctor_software, "installed", there.get)
    assert doctor_software.unmet(requirement) == told


def test_versions_are_compared_number_by_number():
    """2.9 is below 2.14, and a local version counts as its release."""
    assert doctor_software.below("2.9", "2.14")
    assert not doctor_software.below("2.14.1+cpu", "2.14")


def test_kernel(monkeypatch):
    """What the kernel says of itself is passed on."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "torch")
    assert only(doctor_software.kernel_of_attention).found == "the PyTorch form, as WORKBENCH_KERNEL says"
    monkeypatch.setenv("WORKBENCH_KERNEL", "wrong")
    assert only(doctor_software.kernel_of_attention).state == "problem"
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    finding = only(doctor_software.kernel_of_attention)
    assert finding.state == "note"
    assert "CXX names '/no/such/compiler', which is not there" in finding.found


@pytest.mark.parametrize(
    ("listed", "usable", "state"),
    [((), 0, "ok"), (("A",), 0, "problem"), (("A", "A"), 2, "ok"), (("A", "B"), 2, "note")],
)
def test_gpus(monkeypatch, listed, usable, state):
    """GPUs that torch cannot use, and GPUs of several types, are told apart from those that serve."""
    cuda = SimpleNamespace(is_available=lambda: usable > 0, device_count=lambda: usable)
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=None), __version__="2.14.1+cpu")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(doctor_software.provenance, "visible_gpus", lambda: listed)
    finding = only(doctor_software.gpus)
    assert finding.state == state
    assert ("built without CUDA" in finding.remedy) == (state == "problem")


def test_ray_token(monkeypatch, tmp_path):
    """Where the token is, whether others can read it, and a cluster without one; never the token itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only(doctor_software.ray_token).state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert only(doctor_software.ray_token).state == "problem"
    path = tmp_path / "token"
    path.write_text("very-secret-token")
    path.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert only(doctor_software.ray_token).state == "ok"
    monkeypatch.setattr(doctor_software, "_read_by_others", lambda _: True)
    finding = only(doctor_software.ray_token)
    assert (finding.state, finding.remedy) == ("problem", f"chmod 600 {path}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret-token")
    assert "very-secret" not in str(finding) + str(only(doctor_software.ray_token))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "whoever reaches the cluster's port" in only(doctor_software.ray_token).remedy


def test_others_read_what_permissions_let_them(tmp_path):
    """A file is safe behind a closed folder, whatever its own permissions."""
    path = tmp_path / "closed" / "token"
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o644)
    path.parent.chmod(0o700)
    assert not doctor_software._read_by_others(path)
