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

driver=
asked_to_stop=
stop() { # Slurm sends TERM three minutes before the wall time, and when the job is preempted
    asked_to_stop=1
    if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi
}
leave() {
    # shellcheck disable=SC2046 - one number a line
    kill $(jobs -p) 2>/dev/null || true
    rm -rf "$STATE" "$RAY_TMPDIR"
}
trap stop TERM
trap leave EXIT

# Sessions of Ray: of this user and job alone, and short, since the names of Unix sockets have a limit of 107 bytes.
export RAY_TMPDIR=/tmp/ray-$UID-$SLURM_JOB_ID
export RAY_USAGE_STATS_ENABLED=0

# Who has no token can neither join nor ask. It lies in a file of this user, so no log and no environment shows it.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$STATE/token
mkdir -p "$STATE"
chmod 700 "$STATE"
(umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ "$NODES" -eq 1 ]; then
    head_ip=127.0.0.1 # nothing has to be seen from outside
else
    head_ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | cut -d ' ' -f 1)
fi
port=$((20000 + SLURM_JOB_ID % 20000))
address=$head_ip:$port

start_ray() { # NODES, then how srun names them, then what `ray start` is told
    local count=$1 where=$2
    shift 2
    # shellcheck disable=SC2086 - `where` is one option, or none
    srun --overlap --nodes="$count" --ntasks="$count" $where mkdir -p "$RAY_TMPDIR"
    # shellcheck disable=SC2086
    srun --overlap --nodes="$count" --ntasks="$count" $where \
        "$PYTHON" -m ray.scripts.scripts start "$@" --block --include-dashboard=false \
        --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" >>"$STATE/ray.log" 2>&1 &
}

start_ray 1 "--nodelist=$head_node" --head --node-ip-address="$head_ip" --port="$port"
"$PYTHON" -m workbench.ray_executor.wait "$address" 1
if [ "$NODES" -gt 1 ]; then
    start_ray $((NODES - 1)) "--exclude=$head_node" --address="$address"
    "$PYTHON" -m workbench.ray_executor.wait "$address" "$NODES"
fi

if [ -z "$asked_to_stop" ]; then
    "$PYTHON" -m workbench "$@" --address "$address" &
    driver=$!
fi
code=143
while [ -n "$driver" ]; do
    wait "$driver" && code=0 || code=$?
    if ! kill -0 "$driver" 2>/dev/null; then break; fi # a signal ends `wait`, not the driver
done

# 143: stopped in good order, with a checkpoint of each trial. The same command goes on in the next allocation.
if [ -n "$asked_to_stop" ] && [ "$code" -eq 143 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "Not requeued: this job has been requeued $RESTARTS times (WORKBENCH_RESTARTS)." >&2
    fi
fi
exit "$code"
