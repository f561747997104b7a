"""Stand-ins for pyxis and apptainer: a namespace in which a folder is empty but for what is mounted there.

The folder `world` stands for the file systems of a cluster. A pretended image brings `python3` and nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

#: inside WORLD BIN WORKDIR MOUNTS COMMAND...: run a command where WORLD is empty but for MOUNTS (SRC:SRC,...).
INSIDE = r"""#!/bin/bash
if [ "$1" != -- ]; then exec unshare %(flags)s bash "$0" -- "$@"; fi
world=$2 bin=$3 workdir=$4 mounts=$5
shift 5
kept=$(mktemp -d "$(dirname "$0")/kept-XXXXXX")
mount -t tmpfs none "$kept"
mkdir "$kept/bin"
mount --bind "$bin" "$kept/bin"
number=0
IFS=, read -ra pairs <<<"$mounts"
for pair in "${pairs[@]}"; do
    [ "${pair%%:*}" != "/tmp" ] || continue # the folder of the tests may lie in it
    number=$((number + 1))
    mkdir "$kept/$number"
    mount --bind "${pair%%:*}" "$kept/$number" || exit 125
done
mount -t tmpfs none "$world"
number=0
for pair in "${pairs[@]}"; do
    [ "${pair%%:*}" != "/tmp" ] || continue
    number=$((number + 1))
    mkdir -p "${pair#*:}"
    mount --bind "$kept/$number" "${pair#*:}"
done
cd "$workdir" || exit 125
PATH=$kept/bin:/usr/bin:/bin
exec "$@"
"""
#: As srun with pyxis; it passes its own options to EXLM_REAL_SRUN, or runs one task itself.
SRUN = r"""#!/bin/bash
if [ "$1" = --help ]; then echo "  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"; exit; fi
image="" options=() mounts="" workdir="" name=""
while [[ $1 = --* ]]; do
    case $1 in
        --container-image=*) image=${1#*=} ;;
        --container-mounts=*) mounts=${1#*=} ;;
        --container-workdir=*) workdir=${1#*=} ;;
        --container-name=*) name=${1#*=} ;;
        *) options+=("$1") ;;
    esac
    shift
done
command=("$@")
if [ -n "$image" ]; then
    echo "$image $name" >>"$(dirname "$0")/images"
    command=("$(dirname "$0")/inside" "%(world)s" "%(bin)s" "$workdir" "$mounts" "$@")
fi
[ -z "${EXLM_REAL_SRUN:-}" ] || exec "$EXLM_REAL_SRUN" "${options[@]}" "${command[@]}"
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=0 exec "${command[@]}"
"""
#: As `apptainer exec --nv --pwd FOLDER --bind FOLDER ... IMAGE COMMAND...`.
APPTAINER = r"""#!/bin/bash
[ "$1 $2 $3" = "exec --nv --pwd" ] || exit 125
workdir=$4 mounts=""
shift 4
while [ "$1" = --bind ]; do mounts=$mounts,$2:$2; shift 2; done
echo "$1" >>"$(dirname "$0")/images"
shift
exec "$(dirname "$0")/inside" "%(world)s" "%(bin)s" "$workdir" "${mounts#,}" "$@"
"""


def flags() -> list[str] | None:
    """Options with which `unshare` gives a mount namespace here; None: in no way."""
    for options in (["--mount"], ["--map-root-user", "--mount"]):
        command = ["unshare", *options, "mount", "-t", "tmpfs", "none", "/mnt"]
        if shutil.which("unshare") and subprocess.run(command, capture_output=True, timeout=30).returncode == 0:
            return options
    return None


def install(folder: Path, world: Path, python: str, *, pyxis: bool) -> Path:
    """Write the stand-ins to `folder`/bin, which is to be first in PATH; `python`: script of the image's python3. What
    was run in which image is noted in `folder`/bin/images."""
    found = flags()
    assert found is not None
    bin, image = folder / "bin", folder / "image"
    values = {"flags": " ".join(found), "world": world, "bin": image}
    scripts = {bin / "inside": INSIDE, image / "python3": python}
    scripts |= {bin / "srun": SRUN} if pyxis else {bin / "apptainer": APPTAINER}
    for path, text in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if path.name == "python3" else text % values)
        path.chmod(0o755)
    return bin
