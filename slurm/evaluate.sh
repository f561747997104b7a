#!/bin/bash
# Evaluate checkpoints on one GPU of a Slurm cluster; the arguments are those of `exlm evaluate`.
#   sbatch slurm/evaluate.sh RUN [--mask-ratio R ...], or moleculenet --checkpoint RUN ... --data FOLDER --out FOLDER
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
