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

# Unit and kernel tests are single processes and share the cores; integration and parallel tests start processes of their
# own, so they run one after the other.
export OMP_NUM_THREADS=1
code=0
"$venv/bin/python" -m pytest -q -n 2 --dist loadfile --durations=10 tests/unit tests/kernels || code=$?
unset OMP_NUM_THREADS
"$venv/bin/python" -m pytest -q --durations=10 tests/integration tests/parallel || code=$?
exit $code
