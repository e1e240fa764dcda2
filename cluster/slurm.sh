#!/usr/bin/env bash
# A study on the nodes of a Slurm job: Ray on each, the driver on the first, and a requeue before the wall time.
#
#     sbatch cluster/slurm.sh run studies/refinement_detach.yaml --profile coco12 --data /shared/coco --runs /shared/runs
#
# Everything after the script's name goes to `python -m workbench`, and `--address` is added. Set nodes, GPUs and time
# below or on sbatch's command line. See docs/cluster.md.
#
# WORKBENCH_PYTHON    the Python that has the workbench; the same path on every node. Default: python
# WORKBENCH_STATE     a folder on a shared file system for the token of this job. Default: ~/.workbench
# WORKBENCH_RESTARTS  after how many requeues to give up. Default: 100
#
#SBATCH --job-name=workbench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=workbench-%j.log

set -euo pipefail

PYTHON=${WORKBENCH_PYTHON:-python}
STATE=${WORKBENCH_STATE:-$HOME/.workbench}/job-$SLURM_JOB_ID
RESTARTS=${WORKBENCH_RESTARTS:-100}
NODES=${SLURM_JOB_NUM_NODES:-1}
JOB=$SLURM_JOB_ID # to Slurm the number of one task of an array means all of them
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

child=
code=0
asked_to_stop=
job_goes_on() { # not so once it is cancelled, preempted, or has lost a node: Slurm then ends all its processes itself
    scontrol --oneliner show job "$JOB" | grep ' JobState=RUNNING ' >/dev/null
}
# shellcheck disable=SC2317 # called by the trap
stop() { # Slurm sends TERM three minutes before the wall time. A second one ends the driver at once, without checkpoints
    if [ -n "$asked_to_stop" ]; then return 0; fi
    asked_to_stop=1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
    if ! job_goes_on; then # and Ray is being ended, too, on which the driver may hang: there is nothing to wait for
        sleep 1
        kill -TERM "$child" 2>/dev/null || true
        sleep 2
        kill -KILL "$child" 2>/dev/null || true
    fi
}
attend() { # COMMAND...: run it to its end and keep its exit code. A signal ends `wait`, not what is waited for
    "$@" &
    child=$!
    if [ -n "$asked_to_stop" ]; then kill -TERM "$child" 2>/dev/null || true; fi
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" && code=0 || code=$?
    child=
}
leave() { # USR1 goes through srun to the nodes, which clean up; upon TERM srun would kill what they do at once
    # shellcheck disable=SC2046 # one number a line
    kill -USR1 $(jobs -p) 2>/dev/null || true
    wait
    rm -rf "$STATE"
}
trap stop TERM
trap leave EXIT

# Sessions of Ray: of this user and job alone, and short, since the names of Unix sockets have a limit of 107 bytes.
export RAY_TMPDIR=/tmp/ray-$UID-$SLURM_JOB_ID
export RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # nothing is left to drain, and Slurm kills after KillWait, 30 s as a rule

# Who has no token can neither join nor ask. It lies in a file of this user, so no log and no environment shows it.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$STATE/token
mkdir -p "$STATE"
chmod 700 "$STATE"
(umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

on_nodes() { # COUNT, which, COMMAND...: become the srun of as many tasks, with all that the job has there
    local count=$1 which=$2
    shift 2
    exec srun --overlap --export=ALL --kill-on-bad-exit=0 --wait=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --nodes="$count" --ntasks="$count" "$which" "$@"
}

# What a node does: Ray in a new folder that only this user can enter, and nothing of it left at the end.
# shellcheck disable=SC2016 # for the shell on the node
ON_NODE='
rm -rf "$RAY_TMPDIR" && mkdir -m 700 "$RAY_TMPDIR" || exit 1
trap "kill -TERM \$ray 2>/dev/null" TERM USR1
ulimit -S -n "$(ulimit -H -n)" # the head holds some files open for each process of the cluster
"$@" &
ray=$!
while kill -0 $ray 2>/dev/null; do wait $ray; done
wait $ray
code=$?
rm -rf "$RAY_TMPDIR"
exit $code'

start_ray() { # COUNT, which, what `ray start` is told...
    local count=$1 which=$2
    shift 2
    on_nodes "$count" "$which" bash -c "$ON_NODE" ray "$PYTHON" -m ray.scripts.scripts start "$@" --block \
        --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" >>"$STATE/ray.log" 2>&1 &
    started=$!
}
await_nodes() { # COUNT
    attend "$PYTHON" -m workbench.ray_executor.wait "$address" "$1" "$started"
    if [ "$code" -ne 0 ] && [ -z "$asked_to_stop" ]; then
        echo "Ray did not start. The end of what it printed:" >&2
        tail -n 20 "$STATE/ray.log" >&2
        exit 1
    fi
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=127.0.0.1 # for one node: nothing has to be seen from outside
if [ "$NODES" -gt 1 ]; then # as another node sees it; many a machine calls itself 127.0.1.1
    head_name=$(scontrol --oneliner show node "${nodes[0]}" | sed 's/.* NodeAddr=\([^ ]*\) .*/\1/')
    head_ip=$(on_nodes 1 "--nodelist=${nodes[1]}" \
        "$PYTHON" -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "$head_name")
fi
port=$((20000 + SLURM_JOB_ID % 12000)) # below those that systems give to outgoing connections
address=$head_ip:$port

start_ray 1 "--nodelist=${nodes[0]}" --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false
await_nodes 1
if [ "$NODES" -gt 1 ]; then
    start_ray $((NODES - 1)) "--exclude=${nodes[0]}" --address="$address"
    await_nodes "$NODES"
fi
attend "$PYTHON" -m workbench "$@" --address "$address"
trap - EXIT
leave

# Above 128: stopped as asked, with a checkpoint of each trial. The same command goes on in the next allocation.
if [ -n "$asked_to_stop" ] && [ "$code" -gt 128 ]; then
    if ! job_goes_on; then
        echo "Not requeued by this script: Slurm itself is ending the job (scancel, preemption, a lost node)." >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
        echo "Not requeued: this job has been requeued $RESTARTS times (WORKBENCH_RESTARTS)." >&2
    elif ! scontrol requeue "$JOB"; then
        echo "Not requeued, for what scontrol says; the same sbatch line goes on." >&2
    fi
fi
exit "$code"
