#!/usr/bin/env bash
# Stops what up.sh started and nothing else: the daemons of that Slurm, by their pid files, its jobs, then the folder.
#   slurm/testbed/down.sh [FOLDER] [--keep-logs]
set -euo pipefail

keep=
[ "${*: -1}" != --keep-logs ] || { keep=yes; set -- "${@:1:$#-1}"; }
folder=${1:-${TMPDIR:-/tmp}/exlm-slurm-$(id -u)}
[ -e "$folder/slurm.conf" ] || { printf 'error: no testbed in %s\n' "$folder" >&2; exit 2; }
folder=$(cd "$folder" && pwd)
export SLURM_CONF="$folder/slurm.conf"

is_ours() { # PID NAME: a process of that name whose command line has the folder
    [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] &&
        tr '\0' '\n' 2>/dev/null <"/proc/$1/cmdline" | grep -qF "$folder/"
}

stop() { # PIDFILE NAME
    local pid deadline=$((SECONDS + 10))
    pid=$(cat "$1" 2>/dev/null) || return 0
    is_ours "$pid" "$2" || return 0
    kill -TERM "$pid" 2>/dev/null || true
    while is_ours "$pid" "$2"; do
        [ $SECONDS -lt $deadline ] || kill -KILL "$pid" 2>/dev/null || true
        sleep 0.1
    done
}

of_jobs() { # process ids of jobs of this Slurm: their environment names the configuration and a job
    local environment
    for environment in /proc/[0-9]*/environ; do
        tr '\0' '\n' 2>/dev/null <"$environment" | grep -qxF "SLURM_CONF=$folder/slurm.conf" || continue
        environment=${environment%/environ}
        tr '\0' '\n' 2>/dev/null <"$environment/environ" | grep -q '^SLURM_JOB_ID=' ||
            [ "$(cat "$environment/comm" 2>/dev/null)" = slurmstepd ] || continue
        [ "${environment#/proc/}" = $$ ] || printf '%s\n' "${environment#/proc/}"
    done
}

stop "$folder/pid/slurmctld" slurmctld
for pidfile in "$folder"/pid/slurmd-*; do stop "$pidfile" slurmd; done
# Without daemons nothing new starts; what is left of the jobs is killed here.
for _ in 1 2 3; do
    mapfile -t left < <(of_jobs)
    [ ${#left[@]} -gt 0 ] || break
    kill -KILL "${left[@]}" 2>/dev/null || true
    sleep 0.2
done
stop "$folder/pid/munged" munged
if [ -n "$keep" ]; then
    rm -f "$folder/slurm.conf"
else
    rm -rf "$folder"
fi
