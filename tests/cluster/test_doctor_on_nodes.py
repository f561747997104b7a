"""`exlm doctor --nodes` in a real Slurm."""

from __future__ import annotations

import sys

from cluster.slurm_testbed import Slurm
from made_run import make_config, make_data

from exlm_dist.config import dump_config


def test_the_doctor_sees_all_nodes_and_the_time_limit(slurm: Slurm):
    config = make_config(slurm.folder / "runs", "examined", make_data(slurm.folder / "examined"))
    (slurm.folder / "examined.yaml").write_text(dump_config(config))
    script = slurm.folder / "doctor.sh"
    command = f"{sys.executable} -m exlm_dist.cli doctor examined.yaml --nodes --launch.device cpu"
    script.write_text(f"#!/bin/bash\n{command}\n{command} --data.path nowhere\n")
    options = ["--nodes=2", "--gpus-per-node=1", "--time=5", "--output=doctor.log"]
    job = slurm.submit(script, options=options)
    assert job.wait(240.0) == "FAILED", job.log()  # because of the second call
    well, ill = job.log().split("0 fail")
    assert "2 ranks on" in well and "minutes are left" in well and "FAIL" not in well, job.log()
    assert "1 fail" in ill and "nowhere has no manifest.json" in ill
