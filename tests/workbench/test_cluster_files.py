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
import tempfile
import time
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from workbench import attempts
from workbench.cli import build_parser
from workbench.durable import EventReader
from workbench.ray_executor import tuner, wait

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
    # Runs what comes after the options, here, once for each node, whose folder of Ray it takes from $FAKE_NODES.
    "srun": """
echo "srun $*" >>"$FAKE_LOG"
node=node1
for option in "$@"; do case $option in --exclude=node1 | --nodelist=node2) node=node2 ;; esac; done
export RAY_TMPDIR="$FAKE_NODES/$node-${RAY_TMPDIR##*/}"
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@" """,
    "scontrol": """
case "$*" in
    "show hostnames "*) printf 'node1\\nnode2\\n' ;;
    *"show node node1") echo "NodeName=node1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=node1 Version=22.05" ;;
    *"show job "*) echo "JobId=4711 JobState=$FAKE_STATE Reason=None" ;;
    *) echo "$@" >>"$FAKE_LOG"; exit "$FAKE_REQUEUE" ;;
esac""",
    # The workbench as it is, without the cluster, or what a test names; Ray's nodes only wait, as they would.
    "python": """
case "$*" in
    *ray.scripts.scripts*)
        echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(stat -c %a "$RAY_TMPDIR") $*" >>"$FAKE_LOG"
        eval "$FAKE_RAY" ;;
    *workbench.ray_executor.wait*) eval "$FAKE_WAIT" ;;
    *"-m workbench"*) eval "$FAKE_DRIVER" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac""",
}


@pytest.fixture
def slurm(toy_study, tmp_path):
    """Return a maker of Slurm jobs whose Slurm only pretends, on one node unless told otherwise."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "nodes").mkdir()
    (tmp_path / "log").touch()
    for name, text in FAKES.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "REAL_PYTHON": sys.executable,
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_NODES": str(tmp_path / "nodes"),
        "FAKE_STATE": "RUNNING",
        "FAKE_REQUEUE": "0",
        "FAKE_RAY": "exec sleep 300",
        "FAKE_WAIT": "exit 0",
        "FAKE_DRIVER": 'exec "$REAL_PYTHON" "${@:1:$#-2}" --executor inline',
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "OMP_NUM_THREADS": "1",
    }
    sets = ("data.side=32", "data.num_train=16", "data.num_val=8", "evaluation.training_subset=4")
    told = ["run", str(toy_study), "--profile", "smoke", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    told += [part for item in sets for part in ("--set", item)]

    def start(epochs=1, **more):
        return subprocess.Popen(
            ["bash", str(SLURM), *told, "--tracking-uri", "http://127.0.0.1:9", "--set", f"training.epochs={epochs}"],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def short_folder():
    """Return a folder with so short a name that sockets have room in it."""
    with tempfile.TemporaryDirectory(prefix="wb", dir="/tmp") as folder:
        yield Path(folder)


def log_of(tmp_path, word):
    """Return the lines of what the tools were told that have a word."""
    return [line for line in (tmp_path / "log").read_text().splitlines() if word in line]


DRIVER = """
trap 'echo "driver stopped" >>"$FAKE_LOG"; stopped=1' TERM
echo "driver began" >>"$FAKE_LOG"
while [ -z "$stopped" ]; do sleep .1; done
sleep 2 & wait  # for checkpoints; a second signal ends it
exit """


@pytest.mark.parametrize(
    ("code", "slurm_says", "requeued", "told"),
    [
        pytest.param(143, {}, "requeue 4711", "", id="stopped"),
        pytest.param(134, {}, "requeue 4711", "", id="before-it-could-listen"),
        pytest.param(143, {"FAKE_REQUEUE": "1"}, "requeue 4711", "same sbatch line", id="requeue-is-refused"),
        pytest.param(143, {"FAKE_STATE": "COMPLETING"}, None, "Slurm itself is ending", id="cancelled"),
        pytest.param(
            143,
            {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"},
            "requeue 4711_2",
            "",
            id="a-task-of-an-array-alone",
        ),
        *(pytest.param(code, {}, None, "", id=f"ended-with-{code}") for code in range(5)),
    ],
)
def test_only_an_unfinished_study_is_requeued(slurm, tmp_path, code, slurm_says, requeued, told):
    """A job whose driver ended by the signal is requeued; not one that ended by itself, nor one that was cancelled.

    Of two signals the driver gets one, since a second one would end it before the checkpoints; when the job is
    cancelled it gets that, too. Nothing is left behind.
    """
    job = slurm(FAKE_DRIVER=f"{DRIVER}{code}", **slurm_says)
    wait_for(lambda: log_of(tmp_path, "driver began"), job)
    for _ in range(2):
        job.send_signal(signal.SIGTERM)
        wait_for(lambda: log_of(tmp_path, "driver stopped"), job)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == code, err
    assert len(log_of(tmp_path, "driver stopped")) == (2 if "FAKE_STATE" in slurm_says else 1)
    assert log_of(tmp_path, "requeue") == ([requeued] if requeued else [])
    assert told in err
    assert bool(told) is ("Not requeued" in err)
    assert not list((tmp_path / ".workbench").iterdir())
    assert not list((tmp_path / "nodes").iterdir())


def test_a_cancelled_driver_that_hangs_is_killed(slurm, tmp_path):
    """So that the script can clean up before Slurm kills it, too."""
    job = slurm(FAKE_DRIVER=DRIVER.replace("stopped=1", ""), FAKE_STATE="COMPLETING")
    wait_for(lambda: log_of(tmp_path, "driver began"), job)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=PATIENCE / 2)
    assert job.returncode == 128 + signal.SIGKILL, err
    assert not list((tmp_path / ".workbench").iterdir())
    assert not list((tmp_path / "nodes").iterdir())


def test_a_stop_before_ray_is_there_is_a_stop(slurm, tmp_path):
    """The signal does not wait for Ray's nodes; the job is requeued without its driver having worked."""
    job = slurm(FAKE_WAIT='echo waiting >>"$FAKE_LOG"; exec sleep 300', FAKE_DRIVER="exec sleep 300")
    wait_for(lambda: log_of(tmp_path, "waiting"), job)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 128 + signal.SIGTERM, err
    assert log_of(tmp_path, "requeue") == ["requeue 4711"]


def test_each_node_gets_ray_in_a_folder_of_its_own(slurm, tmp_path):
    """The others join the first where they see it; a step gets all cores of the job, and only the user its folder."""
    both = 'until [ "$(grep -c ^token "$FAKE_LOG")" -eq 2 ]; do sleep .1; done'
    job = slurm(FAKE_DRIVER=both, SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="8")
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    head, worker = sorted(log_of(tmp_path, "token 600 700 "), key=lambda line: "--head" not in line)
    assert "--head --node-ip-address=127.0.0.1 --port=24711 --include-dashboard=false --block --num-cpus=8" in head
    assert "start --address=127.0.0.1:24711 --block --num-cpus=8" in worker
    steps = log_of(tmp_path, "srun ")
    where = ("--exclude=node1", "--nodelist=node1", "--nodelist=node2")
    assert sorted(re.search("--(nodelist|exclude)=.....", step)[0] for step in steps) == list(where)
    assert all("--cpus-per-task=8 " in step for step in steps)
    assert not list((tmp_path / "nodes").iterdir())


def test_why_ray_did_not_start_is_told(slurm, tmp_path):
    """The job ends with what Ray printed, as soon as what starts Ray has ended; no study begins."""
    job = slurm(
        FAKE_RAY="echo no such port; exit 1",
        FAKE_WAIT='[ "$3 $4" = "127.0.0.1:24711 1" ] && tail --pid="$5" -f /dev/null; exit 1',
        FAKE_DRIVER='echo "driver began" >>"$FAKE_LOG"',
    )
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    assert "no such port" in err
    assert not log_of(tmp_path, "driver began")


def test_nodes_are_not_waited_for_when_nothing_starts_them(capsys):
    """The wait ends with the process that starts Ray, and says how many nodes came."""
    with subprocess.Popen(["true"]) as starter:
        pass
    assert wait.main(["127.0.0.1:9", "2", str(starter.pid)]) == 1
    assert re.match(r"0 of 2 nodes came to 127.0.0.1:9 in \d+ s\.", capsys.readouterr().err)


def wait_for(met, job):
    """Wait for something of a job that is to go on until then."""
    give_up = time.monotonic() + PATIENCE
    while not met():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.1)


def stop_under_way(job, tmp_path, *, attempt=1):
    """Send the signal that Slurm sends, once a trial is under way; return exit code and standard error."""

    def under_way():
        events = list((tmp_path / "runs").glob("trials/*/events.jsonl"))
        return any(item.event.step and item.attempt == attempt for path in events for item in EventReader(path).poll())

    wait_for(under_way, job)
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

    The next allocation goes on, until there have been as many as are allowed.
    """
    code, err = stop_under_way(slurm(60), tmp_path)
    assert code == 143, err
    assert log_of(tmp_path, "requeue") == ["requeue 4711"]
    (folder,) = (tmp_path / "runs" / "trials").iterdir()
    assert [attempt.outcome for attempt in attempts.read(folder)] == ["interrupted"]
    assert list((folder / "checkpoints").iterdir())
    code, err = stop_under_way(slurm(60, SLURM_RESTART_COUNT="1", WORKBENCH_RESTARTS="1"), tmp_path, attempt=2)
    assert code == 143
    assert "Not requeued" in err
    assert len(attempts.read(folder)) == 2


@pytest.mark.ci
def test_a_job_that_ends_is_not_requeued(slurm, tmp_path):
    """When the study has ended the job ends with its exit code, takes Ray along and asks Slurm for nothing."""
    job = slurm()
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert not log_of(tmp_path, "requeue")
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up and members(job.pid):
        time.sleep(0.1)
    assert members(job.pid) == []


@pytest.mark.ci
def test_ray_takes_what_two_nodes_tell_it(slurm, short_folder):
    """With Ray as it is, both nodes come before the driver begins; no folder of Ray is left on either."""
    real = 'exec "$REAL_PYTHON" "$@"'
    job = slurm(
        SLURM_JOB_NUM_NODES="2",
        FAKE_NODES=str(short_folder),
        FAKE_RAY=real,
        FAKE_WAIT=real,
        FAKE_DRIVER='ls "$FAKE_NODES"',
    )
    out, err = job.communicate(timeout=2 * PATIENCE)
    assert job.returncode == 0, err
    assert out.split() == [f"node{number}-ray-{os.getuid()}-4711" for number in (1, 2)]
    assert not list(short_folder.iterdir())
