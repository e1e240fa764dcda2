"""The files of `cluster/` and the lines of docs/cluster.md: they cannot name what does not exist, and signals work."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from workbench import attempts
from workbench.cli import build_parser
from workbench.durable import EventReader
from workbench.ray_executor import tuner

ROOT = Path(__file__).parent.parent.parent
FILES = [*sorted((ROOT / "cluster").iterdir()), ROOT / "docs" / "cluster.md"]
SLURM = ROOT / "cluster" / "slurm.sh"
PATIENCE = 60


def commands(path):
    """Return the arguments of each `python -m workbench` in a file that names a study or more."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    lines = [line.partition("python -m workbench ")[2] for line in text.splitlines() if "python -m workbench " in line]
    lines += [line.partition("sbatch cluster/slurm.sh ")[2] for line in text.splitlines() if "slurm.sh run" in line]
    found = [shlex.split(line.split("`")[0].rstrip(',"'), comments=True) for line in lines]
    return [arguments for arguments in found if arguments and re.fullmatch("[a-z]+", arguments[0])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_are_ours(path):
    """Every line that calls the workbench has options that it takes and studies that there are."""
    found = commands(path)
    assert found
    for arguments in found:
        options = build_parser().parse_args(arguments)
        if getattr(options, "study", None) is not None and "docs" not in str(path):
            assert (ROOT / options.study).is_file()


def test_the_scripts_are_bash():
    """Bash can read them; shellcheck, where it is installed, has nothing to say."""
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SLURM)], check=True)
    assert SLURM.stat().st_mode & stat.S_IXUSR
    head = SLURM.read_text().split("set -euo")[0]
    assert re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", head, re.M)[1] == "180"
    assert re.search(r"^#SBATCH --requeue$", head, re.M)


def test_ray_up_is_what_ray_takes():
    """The configuration has the keys of Ray's own schema."""
    plain = yaml.safe_load((ROOT / "cluster" / "ray_up.yaml").read_text())
    schema = json.loads((Path(ray.__path__[0]) / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(plain, schema)
    told = " ".join(plain["head_start_ray_commands"] + plain["worker_start_ray_commands"])
    assert told.count("RAY_AUTH_MODE=token") == 2
    assert "--dashboard-host=127.0.0.1" in told
    assert set(plain["file_mounts"].values()) == {"~/.ray/auth_token", "constraints.txt"}


def test_the_ray_job_is_complete():
    """All containers have the token and one image; head and workers share runs and data; Ray is the pinned one."""
    job = yaml.safe_load((ROOT / "cluster" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    containers = [pod["spec"]["containers"][0] for pod in (*pods, job["spec"]["submitterPodTemplate"])]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        names = {item["name"]: item for item in container["env"]}
        assert names["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in names["RAY_AUTH_TOKEN"]["valueFrom"]
        assert int(names["RAY_JOB_STOP_WAIT_TIME_S"]["value"]) > tuner.GRACE_SECONDS
    mounts = [
        {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} for container in containers[:2]
    ]
    assert mounts[0] == mounts[1]
    for pod in pods:
        assert {volume["name"] for volume in pod["spec"]["volumes"]} == mounts[0].keys()
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 120
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert cluster["rayVersion"] == pinned
    arguments = shlex.split(job["spec"]["entrypoint"])
    assert arguments[arguments.index("--runs") + 1] == mounts[0]["runs"]
    assert Path(mounts[0]["data"]) in Path(arguments[arguments.index("--data") + 1]).parents


FAKES = {
    # Runs what comes after the options, here.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >>"$FAKE_LOG"; fi',
    # The workbench as it is, without the cluster; Ray's head only waits, as it would.
    "python": """
case "$*" in
    *ray.scripts.scripts*)
        echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $*" >>"$FAKE_LOG"
        exec sleep 300 ;;
    *workbench.ray_executor.wait*) exit 0 ;;
    *"-m workbench"*) exec "$REAL_PYTHON" "${@:1:$#-2}" --executor inline ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac""",
}


@pytest.fixture
def slurm(toy_study, tmp_path):
    """Return a maker of Slurm jobs, on one node, whose Slurm only pretends."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "REAL_PYTHON": sys.executable,
        "FAKE_LOG": str(tmp_path / "log"),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node1",
        "OMP_NUM_THREADS": "1",
    }
    sets = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4")
    told = ["run", str(toy_study), "--profile", "smoke", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    told += [part for item in sets for part in ("--set", item)]

    def start(epochs, **more):
        return subprocess.Popen(
            ["bash", str(SLURM), *told, "--tracking-uri", "http://127.0.0.1:9", "--set", f"training.epochs={epochs}"],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def stop_under_way(job, tmp_path, *, attempt=1):
    """Send the signal that Slurm sends, once a trial is under way; return exit code and standard error."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        events = list((tmp_path / "runs").glob("trials/*/events.jsonl"))
        if any(item.event.step and item.attempt == attempt for path in events for item in EventReader(path).poll()):
            break
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=PATIENCE)
    return job.returncode, err


def members(group):
    """Return the processes of a group, zombies aside."""
    told = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in told.splitlines()]
    return [args for pgid, state, args in rows if pgid == str(group) and not state.startswith("Z")]


@pytest.mark.ci
def test_before_the_wall_time_the_job_checkpoints_and_is_requeued(slurm, tmp_path):
    """TERM to the batch script reaches the driver, which leaves with 143 after a checkpoint; then the job is requeued.

    Ray asked for a token that only the user may read, and nothing of it is left behind. The next allocation goes on.
    """
    code, err = stop_under_way(slurm(60), tmp_path)
    assert code == 143, err
    ray_started, requeued = (tmp_path / "log").read_text().splitlines()
    assert ray_started.startswith("token 600 ")
    assert "--head --node-ip-address=127.0.0.1 --port=24711 --block" in ray_started
    assert requeued == "requeue 4711"
    (folder,) = (tmp_path / "runs" / "trials").iterdir()
    assert [attempt.outcome for attempt in attempts.read(folder)] == ["interrupted"]
    assert list((folder / "checkpoints").iterdir())
    assert not list((tmp_path / ".workbench").iterdir())
    code, err = stop_under_way(slurm(60, SLURM_RESTART_COUNT="1", WORKBENCH_RESTARTS="1"), tmp_path, attempt=2)
    assert code == 143
    assert "Not requeued" in err
    assert len(attempts.read(folder)) == 2


@pytest.mark.ci
def test_a_job_that_ends_is_not_requeued(slurm, tmp_path):
    """When the study has ended the job ends with its exit code, takes Ray along and asks Slurm for nothing."""
    job = slurm(1)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up and members(job.pid):
        time.sleep(0.1)
    assert members(job.pid) == []
