#!/usr/bin/env bash
# The whole test suite on a bare machine: installs what it needs, then runs pytest. Extra arguments go to pytest.
#   launchers/test.sh [-k NAME ...]
set -euo pipefail
cd "$(dirname "$0")/.."
launchers/install.sh test
venv=${EXLM_VENV:-.venv}
export TORCH_EXTENSIONS_DIR="$PWD/$venv/torch_extensions" PATH="$PWD/$venv/bin:$PATH"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} MLFLOW_DISABLE_TELEMETRY=true

if [ $# -gt 0 ]; then exec "$venv/bin/python" -m pytest "$@"; fi

# Slurm for tests/cluster, from the distribution's packages where that can be done here and now; else those tests skip.
install_slurm() {
    local root=() packages=(munge slurmctld slurmd slurm-client)
    (PATH=$PATH:/usr/sbin && type -P sbatch slurmctld slurmd munged >/dev/null) && return
    command -v apt-get >/dev/null || return
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    "${root[@]}" true 2>/dev/null || return
    timeout 60 "${root[@]}" apt-get -qq update || true
    timeout 120 "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null || true
}
install_slurm

# Two files of tests at once: what each starts waits for the other half of the time. Those on Slurm submit all their
# jobs at once and fill the machine by themselves.
export OMP_NUM_THREADS=1
code=0
"$venv/bin/python" -m pytest -q -n 2 --dist loadfile --durations=10 tests/unit tests/kernels || code=$?
# The kernels as they ship, compiled for two GPUs and run from their PTX (tests/ptx).
for target in 80 90; do
    EXLM_EMULATE=$target "$venv/bin/python" -m pytest -q -n 2 tests/kernels/test_compiled.py || code=$?
done
# In the order of the names: the one test of chaos, a minute long, comes first.
"$venv/bin/python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 \
    tests/integration tests/parallel || code=$?
unset OMP_NUM_THREADS
"$venv/bin/python" -m pytest -q --durations=10 tests/cluster || code=$?
exit $code
