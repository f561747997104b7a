#!/usr/bin/env bash
# Train, or continue, a run on this machine with launch.processes processes, or what its layout needs.
#   launchers/local.sh CONFIG [--section.key VALUE ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exlm=exlm
[ -x "$root/${EXLM_VENV:-.venv}/bin/exlm" ] && exlm="$root/${EXLM_VENV:-.venv}/bin/exlm"
exec "$exlm" pretrain "$@"
