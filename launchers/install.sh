#!/usr/bin/env bash
# Makes .venv and installs exlm_dist into it with pinned versions. A second run only checks.
#   launchers/install.sh [EXTRA]     EXTRA: test, lint, parquet or hf
# Without a GPU it takes the CPU build of torch, from PyTorch's CPU index if that answers quickly, else from the default index;
# EXLM_TORCH_INDEX names another index (as containers, which are built on machines without a GPU).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
constraints=launchers/constraints.txt
venv=${EXLM_VENV:-.venv}
torch_version=2.13.0
stamp="$venv/.exlm-installed-${extra:-base}"
wanted=$(cat pyproject.toml "$constraints" | cksum)

say() { printf '%s\n' "$*" >&2; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

find_python() {
    local name
    for name in "${PYTHON:-}" python3 python3.12 python3.11 python3.10 python3.13; do
        [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo "$name"; return; }
    done
    say "error: no Python 3.10 to 3.13 found. Install one, or name it: PYTHON=/path/to/python3 $0"
    exit 2
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        say "error: '$python -m venv' failed (on Debian and Ubuntu: apt-get install python3-venv)"; exit 2; }
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
install() { pip install -q --no-compile "$@"; }  # compiled below, on all cores

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -n "${EXLM_TORCH_INDEX:-}" ]; then
        say "installing torch $torch_version from $EXLM_TORCH_INDEX"
        install --index-url "$EXLM_TORCH_INDEX" "torch==$torch_version"
    elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        say "installing torch $torch_version for CUDA"
        install "torch==$torch_version"
    else
        say "installing torch $torch_version, CPU build"
        cpu_index=https://download.pytorch.org/whl/cpu
        if timeout 8 "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
            timeout 600 "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -q --no-compile \
                --index-url "$cpu_index" "torch==$torch_version+cpu" || install "torch==$torch_version"
        else
            install "torch==$torch_version"
        fi
    fi
fi
if [ "$extra" = test ] && ! "$venv/bin/python" -c 'import triton' 2>/dev/null; then
    # CPU builds of torch come without it; the kernels are tested in its interpreter and compiled ahead of time.
    install "triton==3.9.0"
fi
say "installing the other packages"
install -c "$constraints" "setuptools>=77" wheel
DS_BUILD_OPS=0 install -c "$constraints" --no-build-isolation -e ".${extra:+[$extra]}"
say "compiling them"
# Files that do not compile are templates, or for another Python.
"$venv/bin/python" -m compileall -qq -j 0 -x '/tests?/' "$venv"/lib || true
printf '%s' "$wanted" >"$stamp"
say "installed into $venv ($("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'))"
