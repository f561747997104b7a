#!/bin/bash
# Evaluate checkpoints on one GPU of a Slurm cluster; the arguments are those of `exlm evaluate`.
#   sbatch slurm/evaluate.sh RUN [--mask-ratio R ...], or SUITE --checkpoint RUN ... --data FOLDER --out FOLDER
# Edit these lines, or give their options to sbatch before the name of this file; everything else is derived.
#SBATCH --account=my-account
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00

#SBATCH --job-name=exlm-evaluate
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Inside a container: options of srun, or a command in front of Python. EXLM_PYTHON names the Python inside it.
#   container=(--container-image=exlm.sqsh)    container=(apptainer exec --nv exlm.sif)
container=()

set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2
say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

# Python: EXLM_PYTHON, else that of the environment EXLM_VENV (default: .venv in the folder where sbatch was called).
python=${EXLM_VENV:-.venv}/bin/python
[ ${#container[@]} = 0 ] && [ -x "$python" ] || python=python3
exlm=("${EXLM_PYTHON:-$python}" -m exlm_dist.cli)

# sbatch --array=1-8: the tasks divide up the cells of a suite between them, each taking those that no other one has.
# With the file EXLM_SWEEP each task appends its line of that file to the arguments (many evaluations).
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -n "${EXLM_SWEEP:-}" ]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "${EXLM_SWEEP:?must name the file of the arguments, a line per array task}")
    [ -n "$line" ] || { say "error: $EXLM_SWEEP has no line $SLURM_ARRAY_TASK_ID"; exit 2; }
    mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"$line")
    set -- "$@" "${words[@]}"
fi

say "exlm evaluate $*"
export OMP_NUM_THREADS=$SLURM_CPUS_ON_NODE
srun --mpi=none --nodes=1 --ntasks=1 "${container[@]}" "${exlm[@]}" evaluate "$@"
