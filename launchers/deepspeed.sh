#!/usr/bin/env bash
# Train, or continue, a run under the DeepSpeed launcher.
#   launchers/deepspeed.sh CONFIG [--hostfile FILE] [--section.key VALUE ...]
# Local processes: launch.processes of the configuration, or what its layout needs. With a host file: every slot of every host.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exlm=exlm
[ -x "$root/${EXLM_VENV:-.venv}/bin/exlm" ] && exlm="$root/${EXLM_VENV:-.venv}/bin/exlm"
exec "$exlm" launch deepspeed "$@"
