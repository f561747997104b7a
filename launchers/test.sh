#!/usr/bin/env bash
# Lint, types and the whole test suite on a bare machine: installs what it needs, then runs them. Extra arguments go to
# pytest, which then runs alone.
#   launchers/test.sh [-k NAME ...]
set -euo pipefail
cd "$(dirname "$0")/.."
launchers/install.sh test
venv=${EXLM_VENV:-.venv}
export TORCH_EXTENSIONS_DIR="$PWD/$venv/torch_extensions" PATH="$PWD/$venv/bin:$PATH"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} MLFLOW_DISABLE_TELEMETRY=true

if [ $# -gt 0 ]; then exec "$venv/bin/python" -m pytest "$@"; fi

# Packages of the distribution, where they can be installed here and now; whatever needs them is skipped elsewhere.
install_packages() {
    local root=()
    command -v apt-get >/dev/null || return 0
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    "${root[@]}" true 2>/dev/null || return 0
    timeout 60 "${root[@]}" apt-get -qq update || true
    timeout 120 "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "$@" >/dev/null || true
}
(PATH=$PATH:/usr/sbin && type -P sbatch slurmctld slurmd munged >/dev/null) ||
    install_packages munge slurmctld slurmd slurm-client
command -v shellcheck >/dev/null || install_packages shellcheck

lint() {
    local code=0
    ruff check . || code=1
    ruff format --check . || code=1
    mypy || code=1
    if command -v shellcheck >/dev/null; then
        shellcheck .ci/run launchers/*.sh slurm/*.sh slurm/testbed/*.sh || code=1
    else
        echo "shellcheck is not installed: the shell scripts were not checked"
    fi
    return $code
}
# Runs beside the first tests; its findings are printed in one piece.
{
    lint_code=0
    findings=$(lint 2>&1) || lint_code=$?
    printf '\n== lint and types\n%s\n' "$findings"
    exit $lint_code
} &
lint_job=$!

# Two test files at once, as each spends half of its time waiting for the processes that it starts. Those on Slurm submit
# all their jobs at once and fill the machine by themselves.
export OMP_NUM_THREADS=1
code=0
"$venv/bin/python" -m pytest -q -n 2 --dist loadfile --durations=10 tests/unit tests/kernels || code=$?
# The kernels as they ship, compiled for two GPUs and run from their PTX (tests/ptx).
for target in 80 90; do
    EXLM_EMULATE=$target "$venv/bin/python" -m pytest -q -n 2 tests/kernels/test_compiled.py || code=$?
done
# In the order of their names, so that the one test of chaos, a minute long, comes first.
"$venv/bin/python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 \
    tests/integration tests/parallel || code=$?
unset OMP_NUM_THREADS
"$venv/bin/python" -m pytest -q --durations=10 tests/cluster || code=$?
wait "$lint_job" || { code=1; echo "lint and types found faults: see '== lint and types' above"; }
exit $code
