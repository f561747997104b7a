#!/usr/bin/env bash
# One virtual environment for each library that benchmarks/data_libraries.py compares with, from package registries alone.
#
#     benchmarks/data_environments.sh FOLDER [LIBRARY...]     # FOLDER/webdataset, FOLDER/energon, ...; about 1.2 GB each
#
# Those that are whole already are left as they are. torch comes first, as its CPU build, so that nothing pulls CUDA: where
# the default index has only CUDA builds, set TORCH_INDEX=https://download.pytorch.org/whl/cpu.
set -euo pipefail

declare -A PACKAGES=(
    [webdataset]="webdataset==1.0.2"
    [energon]="megatron-energon==7.4.1"
    [mosaic]="mosaicml-streaming==0.13.0"
    [litdata]="litdata==0.2.76"
    [grain]="grain==0.2.18"
)
TORCH="torch==2.13.0"

if [ $# -eq 0 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
fi
folder=$1
shift
[ $# -gt 0 ] || set -- webdataset energon mosaic litdata grain

for name in "$@"; do
    [ -n "${PACKAGES[$name]:-}" ] || { echo "$name: none of ${!PACKAGES[*]}" >&2; exit 2; }
    [ ! -e "$folder/$name/complete" ] || continue
    echo "$folder/$name: $TORCH, ${PACKAGES[$name]}"
    rm -rf "${folder:?}/$name"
    python3 -m venv "$folder/$name"
    pip=("$folder/$name/bin/python" -m pip install --quiet)
    "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
    "${pip[@]}" "$TORCH" "${PACKAGES[$name]}"
    touch "$folder/$name/complete"
done
