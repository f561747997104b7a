#!/usr/bin/env bash
# A real Slurm on this machine: munge, one controller and N nodes, for trying jobs and for tests/cluster.
#   slurm/testbed/up.sh N [FOLDER]        default folder: ${TMPDIR:-/tmp}/exlm-slurm-<user id>
#   source FOLDER/env.sh                  then sbatch, squeue, scontrol, scancel of this shell talk to that Slurm
#   slurm/testbed/down.sh [FOLDER]
# Everything (configuration, key, sockets, state, logs, process ids) is in FOLDER, and ports are free ones; no file of the
# system is touched; it needs neither root nor cgroups nor systemd. Without root it runs only jobs of the user who started
# it. Each node declares the machine's cores and 8 GPUs that do not exist, so that job files for GPU nodes can be
# submitted as they are.
set -euo pipefail

nodes=${1:-}
folder=${2:-${TMPDIR:-/tmp}/exlm-slurm-$(id -u)}
gpus=8
limit=60 # seconds until all nodes must be up
packages="munge slurmctld slurmd slurm-client"
PATH=$PATH:/usr/sbin:/sbin

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "give the number of nodes, 1 to 99: $0 N [FOLDER]"
for program in munged mungekey slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null ||
        fail "$program is not installed. On Debian and Ubuntu, as root: apt-get install --no-install-recommends $packages"
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ ! -e "$folder/slurm.conf" ] || fail "$folder holds a testbed already. Stop it first: $(dirname "$0")/down.sh $folder"
[ -z "$(ls -A "$folder")" ] || fail "$folder is not empty. Give another folder"

declare -A taken=()
free_port() { # sets `port` to one that is free and was not used before
    local number
    for _ in {1..200}; do
        number=$((10000 + (RANDOM * 32768 + RANDOM) % 10000)) # the ports of jobs start at 20000
        [ -z "${taken[$number]:-}" ] || continue
        (exec 3<>"/dev/tcp/127.0.0.1/$number") 2>/dev/null && continue
        taken[$number]=1
        port=$number
        return
    done
    fail "no free port between 10000 and 20000"
}

chmod 755 "$folder"
mkdir -p "$folder"/{munge,state,spool,log,pid,gpu}
chmod 711 "$folder/munge"
mungekey --create --keyfile="$folder/munge/key"

cores=$(env -u OMP_NUM_THREADS nproc) # nproc obeys that variable
host=$(hostname -s)
free_port && controller=$port
{
    cat <<CONF
ClusterName=exlm-testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job becomes eligible when its old credential has expired: after 120 s by default, here after 5 s.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/pid/slurmctld
SlurmdPidFile=$folder/pid/slurmd-%n
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
# Nothing here needs cgroups, a database or a special network.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
# Job ids differ between testbeds, so that jobs of two testbeds on one machine do not derive the same port.
FirstJobId=$controller
JobRequeue=1
ReturnToService=2
MinJobAge=86400
KillWait=10
SlurmdTimeout=60
MessageTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
CONF
    for ((number = 1; number <= nodes; number++)); do
        free_port
        printf 'NodeName=n%d NodeHostname=%s NodeAddr=127.0.0.1 Port=%d CPUs=%d Gres=gpu:%d State=UNKNOWN\n' \
            "$number" "$host" "$port" "$cores" "$gpus"
    done
    printf 'PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n'
    printf 'PartitionName=cpu Nodes=ALL MaxTime=INFINITE State=UP\n'
} >"$folder/slurm.conf"
# A GPU must be a character device; all of these are the null device.
for ((number = 0; number < gpus; number++)); do ln -s /dev/null "$folder/gpu/$number"; done
printf 'Name=gpu File=%s/gpu/[0-%d]\n' "$folder" $((gpus - 1)) >"$folder/gres.conf"
printf 'CgroupAutomount=no\n' >"$folder/cgroup.conf"
printf "export SLURM_CONF='%s/slurm.conf'\n" "$folder" >"$folder/env.sh"

export SLURM_CONF="$folder/slurm.conf"
stop_again() { "$(dirname "$0")/down.sh" "$folder" --keep-logs >&2 || true; }
trap 'printf "error: the testbed did not start; see %s\n" "$folder/log" >&2; stop_again' ERR
munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/pid/munged" \
    --log-file="$folder/log/munged" --seed-file="$folder/munge/seed" --force 2>>"$folder/log/munged"
slurmctld -c -f "$SLURM_CONF"
for ((number = 1; number <= nodes; number++)); do
    slurmd -f "$SLURM_CONF" -N "n$number"
done
deadline=$((SECONDS + limit))
until [ "$(scontrol --oneliner show nodes 2>/dev/null | grep -c ' State=IDLE ')" = "$nodes" ]; do
    [ $SECONDS -lt $deadline ] || { sinfo -N -l -p gpu >&2 || true; false; }
    sleep 0.2
done
printf 'Slurm is up with %d nodes. Use it:\n  source %s/env.sh\n  sinfo\nand stop it with %s/down.sh %s\n' \
    "$nodes" "$folder" "$(dirname "$0")" "$folder"
