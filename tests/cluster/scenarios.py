"""Jobs whose ranks are a few lines of shell: Slurm and the job file are real, and each takes seconds."""

from __future__ import annotations

import sys

from cluster.slurm_testbed import Job, Slurm
from locations import ROOT

#: `launch.restarts` of the stand-in configuration.
RESTARTS = 2
#: In place of Python: `config job` answers as exlm does; the n-th start of the ranks runs line n of the file `ends`.
STAND_IN = f"""#!/bin/bash
cd "$(dirname "$0")"
if [ "$3 $4" = "config job" ]; then
    [ "$5" != refused ] || exit 2
    printf '%s\\n{RESTARTS}\\n' "$PWD/run"
    exit
fi
checkpoint() {{ mkdir -p "run/checkpoints/step-0000000$1"; touch "run/checkpoints/step-0000000$1/COMPLETE"; }}
fail() {{ echo "$2" >"$EXLM_ERROR_FILE"; exit "$1"; }}
exlm() {{ PYTHONPATH=.:$PYTHONPATH exec {sys.executable} -m exlm_dist.cli pretrain "$@"; }}
eval "$(sed -n "$(grep -c 'starting the ranks at' job.log)p" ends)"
"""
#: In place of `scontrol` of a job file: it is still running when Slurm, asked to requeue the job, ends what runs in it.
SLOW_SCONTROL = """#!/bin/bash
PATH=${PATH#*:}
scontrol "$@"
code=$?
[ "$1" != requeue ] || for _ in {1..10}; do sleep 0.1; done
exit $code
"""
#: By name: what each start of the ranks does. A signal may reach a `sleep` before the rank that waits for it: it waits
#: a second time.
SCENARIOS = {
    "killed": ["[ $RANK = 0 ] && kill -9 $$; exit 76", "exit 0"],
    "data": ['[ $RANK = 1 ] && fail 77 "shard 7 is gone"; sleep 0.5; exit 76'],
    "stop": ['fail 78 "too many sequences are left out"'],
    "crash": ['[ $RANK = 0 ] && fail 1 "Traceback: a bug"; exit 0'],
    "silent": ["exit 1", "exit 0"],
    "unreachable": ["exit 233", "exit 0"],
    "broken": ["echo 'import libmissing' >torch.py; exlm run.yaml", "exit 0"],
    "absent": ["[ $RANK = 0 ] || exlm gone.yaml; sleep 600", "exit 0"],
    "hang": ["[ $RANK = 0 ] && exit 76; sleep 600", "exit 0"],
    "saved": ["checkpoint 1; exit 75", "exit 0"],
    "stuck": ["exit 76"] * 9,
    "slow": ["sleep 0.5; checkpoint 3; exit 75", *["exit 75"] * 9],
    "short": [f"checkpoint {step}; exit 75" for step in range(1, 10)],
    "moving": [
        "checkpoint 1; exit 76",
        "checkpoint 2; exit 76",
        "checkpoint 3; exit 76",
        "checkpoint 4; exit 76",
        "exit 0",
    ],
    "warned": [
        "trap 'checkpoint 1; exit 75' USR1; touch ready-$RANK; for _ in 1 2; do sleep 600 & wait; done; exit 3",
        "exit 0",
    ],
    "cancelled": [
        "trap 'touch warned; exit 75' USR1 TERM; touch ready-$RANK; for _ in 1 2; do sleep 600 & wait; done; exit 3",
        "exit 0",
    ],
    "refused": ["exit 0"],
    "wrong": ["[ $RANK = 1 ] && echo $SLURMD_NODENAME | tee left-out >run/excluded-hosts; exit 76", "exit 0"],
    "gres": ["exit 0"],
    "total": ["exit 0"],
    "tasks": ["exit 0"],
    "uneven": ["exit 0"],
    "unused": ["exit 0"],
    "odd": ["exit 0"],
}
#: By name: how a job asks for its GPUs; the others: one on each node.
GPUS = {
    "gres": ["--gres=gpu:2"],
    "total": ["--gpus=2"],
    "tasks": ["--gpus-per-task=1", "--ntasks-per-node=2"],
    "uneven": ["--gpus=3"],
    "unused": ["--gres=gpu:2", "--ntasks-per-node=1"],
    "odd": ["--gpus-per-task=1", "--ntasks=3"],
}


def submit(slurm: Slurm, name: str) -> Job:
    """The job of the scenario `name`: on two nodes, with a rank for each GPU."""
    folder = slurm.folder / f"scenario-{name}"
    folder.mkdir()
    (folder / "ends").write_text("\n".join(SCENARIOS[name]) + "\n")
    (folder / "run.yaml").write_text("name: run\ndata: {path: nowhere}\nschedule: {steps: 10, warmup: 1}\n")
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    (folder / "tools").mkdir()
    (folder / "tools" / "scontrol").write_text(SLOW_SCONTROL)
    (folder / "tools" / "scontrol").chmod(0o755)
    path = f"{folder}/tools:{slurm.environment['PATH']}"
    options = ["--nodes=2", *GPUS.get(name, ["--gpus-per-node=1"]), "--time=60", f"--output={folder}/job.log"]
    script = folder / "pretrain.sh"  # the file of the repository without what the options say instead
    lines = (ROOT / "slurm" / "pretrain.sh").read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if not line.startswith("#SBATCH --gpus-per-node")))
    return slurm.submit(script, name, options=options, EXLM_PYTHON=str(folder / "python"), EXLM_GRACE="2", PATH=path)
