#!/usr/bin/env bash
# From scratch to two trained, resumed, evaluated and tracked models, on two CPU cores and without a GPU.
#   launchers/quickstart.sh
# Makes .venv, builds the embedded corpus of molecules, trains ExLM (k = 4) and the plain masked language model for the same
# number of steps under the DeepSpeed launcher, kills one of them half-way and resumes it, evaluates, plots, compares, and asks
# the model what stands at a mask.
# A second run reuses what exists.
set -euo pipefail
cd "$(dirname "$0")/.."
launchers/install.sh
venv=${EXLM_VENV:-.venv}
export PATH="$PWD/$venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/$venv/torch_extensions" MLFLOW_DISABLE_TELEMETRY=true

exlm_config=configs/pretrain/demo_smiles_exlm.yaml
mlm_config=configs/pretrain/demo_smiles_mlm.yaml
exlm_run=runs/demo_smiles_exlm
mlm_run=runs/demo_smiles_mlm
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$*" "$((SECONDS - started))"; }

kill_half_way() { # waits for the checkpoint half-way, then kills one rank with SIGKILL
    local launcher=$1 limit=$((SECONDS + 240))
    while [ $SECONDS -lt $limit ] && kill -0 "$launcher" 2>/dev/null; do
        if [ -e "$exlm_run/checkpoints/step-00000100/COMPLETE" ]; then
            "$venv/bin/python" - "$exlm_config" <<'PY'
import sys, psutil
for process in psutil.process_iter(["cmdline"]):
    command = process.info["cmdline"] or []
    if command[2:5] == ["-m", "exlm_dist.cli", "pretrain"] and sys.argv[1] in command and process.environ().get("RANK") == "1":
        process.kill()
PY
            return 0
        fi
        sleep 0.2
    done
    return 1
}

step "the embedded corpus of molecules"
exlm prepare demo-smiles --out data/demo_smiles

step "ExLM, k = 4"
if [ -e "$exlm_run" ]; then
    launchers/deepspeed.sh "$exlm_config"
else
    launchers/deepspeed.sh "$exlm_config" &
    launcher=$!
    kill_half_way "$launcher" || { echo "error: training ended before it could be killed half-way" >&2; wait "$launcher"; exit 1; }
    step "rank 1 was killed with SIGKILL; the ranks are restarted in place"
    wait "$launcher"
fi

step "the plain masked language model"
launchers/deepspeed.sh "$mlm_config"

step "evaluation of both on the held-out molecules"
exlm evaluate "$exlm_run"
exlm evaluate "$mlm_run"

step "plots and comparison"
exlm report "$exlm_run" "$mlm_run"

step "what stands at the mask of this molecule?"
exlm fill "CC(=O)Oc1ccccc1C(=O)<mask>" --checkpoint "$exlm_run"

step "done"
cat <<EOF

Next:
  look at the runs        $venv/bin/mlflow ui --backend-store-uri sqlite:///$PWD/runs/mlflow.db --port 5000
  resume, or train on     $venv/bin/exlm pretrain $exlm_config      (the same command continues a run; a finished one says so)
  a vector per molecule   $venv/bin/exlm embed molecules.csv --checkpoint $exlm_run --out vectors.parquet
  predict a property      $venv/bin/exlm finetune measured.csv --target activity --checkpoint $exlm_run --out activity
                          $venv/bin/exlm predict activity new.csv --out predicted.csv
  load it elsewhere       $venv/bin/exlm export hf $exlm_run --out exlm_hf
  your own molecules      $venv/bin/exlm prepare smiles --input molecules.csv --column smiles --out data/mine
                          $venv/bin/exlm pretrain $exlm_config --data.path data/mine --name mine
  your own text           $venv/bin/exlm prepare text --input corpus.txt.gz --out data/text --vocab-size 8000
  every setting           $venv/bin/exlm config schema
EOF
