#!/bin/bash
# Pretrain, or continue, a run on a Slurm cluster.
#   sbatch slurm/pretrain.sh CONFIG [--section.key VALUE ...]
# Edit these lines, or give their options to sbatch before the name of this file; everything else is derived.
#SBATCH --account=my-account
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00

#SBATCH --job-name=exlm-pretrain
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300

# A container for everything: a .sif file (apptainer), or a .sqsh file or name of an image (pyxis); and the
# folders that it must see beside this one: data, runs, targets of symbolic links. See containers/README.md.
image=
mounts=()

set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2
say() { printf '%(%F %T)T  %s\n' -1 "$*"; }
fail() { say "error: $*"; exit 2; }

# The container sees these folders under the paths that they have outside: a configuration is valid in both.
container=()
if [ -n "$image" ]; then
    case $image in
        *.sif | *.sqsh)
            [ -f "$image" ] || fail "no image at $image, as $HOSTNAME sees it"
            image=$(realpath "$image") ;;
    esac
    folders=("$PWD" /tmp "${mounts[@]}")
    for folder in "${folders[@]}"; do
        [ -e "$folder" ] || fail "the container is to see $folder, which $HOSTNAME does not have: correct mounts=(...)"
    done
    # Files that the user has installed at home, or a temporary folder that is not there, must not change what runs.
    export PYTHONNOUSERSITE=1 TMPDIR=/tmp
    if [[ $image = *.sif ]]; then
        runtime=$(command -v apptainer || command -v singularity) || fail "apptainer is not installed on $HOSTNAME"
        container=("$runtime" exec --nv --pwd "$PWD")
        for folder in "${folders[@]}"; do container+=(--bind "$folder"); done
        container+=("$image")
    else
        [[ $(srun --help) = *--container-image* ]] ||
            fail "srun has no --container-image here (pyxis is not installed); a .sif file runs under apptainer"
        pairs=$(for folder in "${folders[@]}"; do printf ',%s:%s' "$folder" "$folder"; done)
        container=(--container-image="$image" --container-workdir="$PWD" --container-mounts="${pairs#,}"
            --container-name="exlm-$SLURM_JOB_ID") # unpacked once per node, not at every start of the ranks
    fi
fi

# Python: EXLM_PYTHON, else that of the container, else that of the environment EXLM_VENV (default: .venv in the folder
# where sbatch was called).
python=${EXLM_VENV:-.venv}/bin/python
[ -z "$image" ] && [ -x "$python" ] || python=python3
exlm=("${EXLM_PYTHON:-$python}" -m exlm_dist.cli)

# sbatch --array=1-8: each task appends its line of the file EXLM_SWEEP to the arguments (a sweep, many evaluations).
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "${EXLM_SWEEP:?must name the file of the arguments, a line per array task}")
    [ -n "$line" ] || { say "error: $EXLM_SWEEP has no line $SLURM_ARRAY_TASK_ID"; exit 2; }
    mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"$line")
    set -- "$@" "${words[@]}"
fi

job=$SLURM_JOB_ID # as scontrol names it: a task of an array is 12_1
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
refuse() { say "error: $*"; exit 2; }

# Ranks: one for each GPU that a step has on a node, whichever option has asked for them (--gpus-per-node, --gres,
# --gpus, --gpus-per-task); without GPUs as many as --ntasks-per-node or --ntasks say, else one.
nodes=$SLURM_JOB_NUM_NODES
per_node=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-0} / nodes))}
[ "${SLURM_NTASKS:-$((per_node * nodes))}" = $((per_node * nodes)) ] ||
    refuse "$SLURM_NTASKS tasks (--ntasks) on $nodes nodes: give --ntasks-per-node instead"
if [ -n "${SLURM_GPUS_PER_TASK:-}" ]; then
    [ "${SLURM_GPUS_PER_TASK##*:}" = 1 ] || refuse "--gpus-per-task=$SLURM_GPUS_PER_TASK, but a rank uses 1 GPU"
    [ "$per_node" -gt 0 ] || refuse "--gpus-per-task without the number of tasks: give --ntasks-per-node"
else
    gpus=${SLURM_GPUS_PER_NODE:-} # with the other options a step may have other GPUs than this script is told of
    gpus=${gpus##*:}
    for pause in 1 2 4 8 16 0; do # a node that is busy may not answer at once
        [ -z "$gpus" ] || break
        gpus=$(set -o pipefail; srun --mpi=none --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
            bash -c 'echo "${SLURM_GPUS_ON_NODE:-0}"' | sort -nu | xargs) || gpus=""
        [ -n "$gpus" ] || sleep "$pause"
    done
    [ -n "$gpus" ] || refuse "srun could not ask the nodes for their GPUs: give --gpus-per-node, which needs no asking"
    [[ $gpus != *" "* ]] || refuse "the nodes of this job have ${gpus// / and } GPUs: ask for as many on each" \
        "(--gpus-per-node)"
    [ "$per_node" -gt 0 ] || per_node=$gpus
    [ "$gpus" = 0 ] || [ "$per_node" = "$gpus" ] || refuse "$per_node tasks on each node, but $gpus GPUs, and a rank" \
        "uses one: leave out the number of tasks (--ntasks-per-node, --ntasks), or give --gpus-per-node=$per_node"
fi
[ "$per_node" -gt 0 ] || per_node=1

# Slurm numbers the ranks; they need no ssh.
cpus=$((SLURM_CPUS_ON_NODE / per_node))
[ "$cpus" -gt 0 ] || cpus=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export LOCAL_WORLD_SIZE=$per_node WORLD_SIZE=$((nodes * per_node)) OMP_NUM_THREADS=$cpus
# The address that Slurm itself uses: names of nodes need not resolve everywhere.
MASTER_ADDR=$(scontrol -o show node "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_ADDR
# The port differs between jobs, restarts and steps: a listener of the last attempt may still be alive.
# shellcheck disable=SC2016 # expanded by each rank
rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID EXLM_ERROR_FILE=$EXLM_ERRORS/rank-$SLURM_PROCID
export EXLM_CHOSEN_PORT=1
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 101 + ${SLURM_RESTART_COUNT:-0} * 31 + SLURM_STEP_ID * 7) % 12000))
exec "$@"'

# Rejects wrong settings before a thousand ranks meet them, and prints the run folder and launch.restarts.
config=${1:?the first argument is the configuration}
overrides=("${@:2}")
one_task() { srun --mpi=none --nodes=1 --ntasks=1 "${container[@]}" "${exlm[@]}" "$@"; }
settings=$(one_task config job "$config" "${overrides[@]}") || exit $?
run=${settings%$'\n'*} restarts=${settings##*$'\n'}
logs=$run/slurm/$job
mkdir -p "$logs/errors" || exit 2
EXLM_ERRORS=$(cd "$logs/errors" && pwd)
export EXLM_ERRORS
say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $WORLD_SIZE ranks on $SLURM_JOB_NODELIST; logs in $logs"

# Slurm warns this shell: USR1 before the time limit (--signal=B:USR1@...), TERM when it ends the job itself (scancel,
# preemption, requeue). Both are forwarded as USR1, on which the ranks save and end with 75. `srun` runs in the
# background because bash runs a trap only between commands, or while it waits.
warned="" woken="" srun_pid=""
forward() {
    woken=1
    [ -z "$srun_pid" ] || kill -USR1 "$srun_pid" 2>/dev/null
}
trap 'say "USR1: saving before the time limit"; warned=${warned:-"the time limit is near"}; forward' USR1
trap 'say "TERM: saving before Slurm ends the job"; warned=end; forward' TERM

run_ranks() { # sets `code`: the largest exit code of the ranks, 128 and more for one killed by a signal; or, whatever
    # became of those that waited for it, the code that a rank wrote down because it cannot work at all
    say "starting the ranks at step $before"
    rm -f "$EXLM_ERRORS"/rank-*
    # block:block: consecutive ranks, those of a tensor-parallel group, are on one node, and in it on one socket, as the
    # GPUs of the same numbers are.
    # --wait: ranks that have not noticed after so many seconds that another one has ended are killed.
    srun --mpi=none --nodes="$nodes" --ntasks="$WORLD_SIZE" --ntasks-per-node="$per_node" \
        --distribution=block:block --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait="${EXLM_GRACE:-60}" \
        --open-mode=append --output="$logs/node-%n-%N.log" \
        "${container[@]}" bash -c "$rank" rank "${exlm[@]}" pretrain "$config" "${overrides[@]}" &
    srun_pid=$!
    while :; do
        woken=""
        wait "$srun_pid"
        code=$?
        [ -n "$woken" ] || break
    done
    srun_pid=""
    local left
    left=$(sort -n "$EXLM_ERRORS"/rank-*.code 2>/dev/null | tail -n 1)
    code=${left:-$code}
}

newest() { # step of the newest complete checkpoint; 0 if there is none
    local folder step=0
    for folder in "$run"/checkpoints/step-*; do
        [ ! -e "$folder/COMPLETE" ] || step=${folder##*-}
    done
    echo $((10#$step))
}

messages() { # what the ranks reported, each message once; of several nodes that name ranks which hang the one first
    # whose ranks had come least far: the others waited for these
    awk 'NF && !seen[$0]++ { print (match($0, / at beat [0-9]+/) ? substr($0, RSTART + 9, RLENGTH - 9) : 0) "\t" $0 }' \
        "$EXLM_ERRORS"/rank-*[0-9] 2>/dev/null | sort -s -n -k 1,1 | cut -f 2- | head -n 20
}

few=3 # steps; a job that has time for less would wait in the queue for each of them
may_restart() { # counts attempts in a row that saved less than $1 further steps, over all starts of this job
    local step=0 count=0 aim
    [ ! -e "$logs/stalled" ] || read -r step count <"$logs/stalled"
    [ $(($(newest) - step)) -lt "$1" ] || count=0
    echo "$(newest) $((count + 1))" >"$logs/stalled"
    [ "$count" -ge "$restarts" ] || return 0
    aim="past the checkpoint of step $(newest)"
    [ "$1" = 1 ] || aim="$1 steps on before it was time to save: give the job more time (--time, or a later signal)"
    say "stopped: $count restarts (launch.restarts) and none got $aim"
    return 1
}

excluded() { # nodes of this job that miscalculated before: a rank, or you, wrote them down
    scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -xF -f "$run/excluded-hosts" 2>/dev/null | paste -sd ,
}

exclude() { # Slurm takes no such change for a running job, and ends this script soon after the requeue
    local old new
    old=$(scontrol -o show job "$job" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2)
    [ "$old" != "(null)" ] || old=""
    new=$({ [ -z "$old" ] || scontrol show hostnames "$old"; cat "$run/excluded-hosts"; } | sort -u | paste -sd ,)
    for _ in {1..20}; do
        scontrol update "JobId=$job" "ExcNodeList=$new" 2>/dev/null && { say "without the nodes $new"; return; }
        sleep 0.3
    done
    scontrol hold "$job"
    say "error: Slurm did not take ExcNodeList=$new, the job is on hold: cancel it, and sbatch with --exclude=$new"
}

requeue() {
    trap '' TERM USR1 # Slurm sends it to all that runs here, and the commands below must end first
    [ "$warned" != end ] || exit 75
    say "$1: back into the queue"
    if ! scontrol requeue "$job"; then
        say "error: the job could not be requeued. The same sbatch command continues the run."
    elif [ -s "$run/excluded-hosts" ]; then
        exclude
    fi
    exit 75
}

while :; do
    [ -z "$warned" ] || requeue "$warned"
    bad=$(excluded)
    [ -z "$bad" ] || requeue "$bad miscalculated"
    before=$(newest)
    run_ranks
    [ "$code" != 0 ] || { say "done"; exit 0; }
    [ "$warned" != end ] || { say "Slurm ends the job; if it is requeued, it continues after step $(newest)"; exit 75; }
    say "the ranks ended with code $code; newest checkpoint: step $(newest)"
    messages
    queue=$warned # why the job must be requeued; empty if the ranks can be restarted here
    [ "$code" != 75 ] || queue=${warned:-saved}
    # Without a message from any rank it was srun that failed (a rank that cannot even import leaves one), with 1 or,
    # where a node did not answer, with an error number of Slurm, above what signals give: a node is probably lost, and
    # the queue finds another.
    if { [ "$code" = 1 ] || [ "$code" -gt 192 ]; } && [ -z "$(messages)" ]; then
        code=76 queue=${warned:-"srun failed"}
    fi
    if [ "$code" != 75 ] && [ "$code" != 76 ] && [ "$code" -le 128 ]; then
        say "stopped: a restart would end in the same way"
        exit "$code"
    fi
    # An attempt that saved a newer checkpoint does not count: it cannot repeat for ever. One that ended to save must
    # have done more than that.
    if [ "$code" != 75 ]; then
        may_restart 1 || exit 78
    elif [ $(($(newest) - before)) -lt "$few" ]; then
        may_restart "$few" || exit 78
    fi
    [ -z "$queue" ] || requeue "$queue"
done
