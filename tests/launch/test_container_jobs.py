"""Batch scripts of `launch/slurm/` with CONTAINER: what each of them runs, and what is refused.

Run as scripts, with the variables of a job and stand-ins for Apptainer and Slurm. `tests/slurm`
runs one on a cluster, killed and requeued.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_adv.errors import UserError
from dist_adv.sweeps import slurm
from dist_adv.sweeps.sweep import load_sweep
from slurm_cluster import DIGITS, SCRIPTS, SITE

FAST = "configs/digits/fast.yaml"  # which no folder of these tests has
RUN = f"bash {SCRIPTS}/../run.sh"
STAND_INS = {
    "apptainer": 'case "$*" in *"python -c"*) echo one ;; *) echo $PYTHON $NODE_RANK "$@" ;; esac',
    "srun": 'shift && SLURM_NODEID=1 exec "$@"',
    "scontrol": "echo n1",
}
JOB = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "1"},
    **{"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_ARRAY_TASK_ID": "0"},
    **{"DIST_ADV_SLURM": str(SCRIPTS), "DIST_ADV_SITE": "site.sh"},
}


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an image, a site's file that names it, and a run that is finished."""
    for name, text in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "image.sif").touch()
    (tmp_path / "site.sh").write_text(f"{SITE}CONTAINER=image.sif\n")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    monkeypatch.setenv("DIST_ADV_SITE", "site.sh")
    return tmp_path


def job(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=os.environ | JOB | env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "arguments", "runs"),
    [
        ("train.sbatch", [FAST, "a=b c"], f"{RUN} train {FAST} a=b c"),
        ("multinode.sbatch", [FAST, "a=b c"], f"{RUN} train {FAST} a=b c"),
        ("eval.sbatch", ["runs/one", "--attacks", "fgsm"], f"{RUN} eval runs/one --attacks fgsm"),
        ("sweep.sbatch", ["runs"], f"{RUN} sweep runs/sweep.yaml --out runs --only one"),
        ("report.sbatch", ["runs"], "python -m dist_adv report runs/one --out runs/report"),
    ],
)
def test_what_runs_in_the_image(at: Path, script: str, arguments: list[str], runs: str) -> None:
    """With the job's folder and the launchers; with the GPUs where there are some."""
    (at / "site.sh").write_text((at / "site.sh").read_text().replace("PER_NODE=0", "PER_NODE=1"))
    done = job(script, *arguments)
    assert done.returncode == 0, done.stderr
    if script == "sweep.sbatch":
        said = (at / "runs" / "logs" / "one.txt").read_text()
    else:
        said = done.stdout.splitlines(keepends=True)[-1]
    rank = "1 " if script == "multinode.sbatch" else ""
    seen = f"-B {at} -B {SCRIPTS.parent}"
    assert said == f"python {rank}exec --nv {seen} image.sif {runs}\n"


def test_evaluations_of_a_sweep_run_in_the_image(at: Path) -> None:
    said = job("report.sbatch", "runs", "--attacks", "fgsm").stdout
    assert "image.sif python -m dist_adv eval runs/one --attacks fgsm\n" in said


def test_without_gpus_and_with_images_elsewhere(at: Path) -> None:
    """The folder of images is made, as it is without a container."""
    data = at / "elsewhere" / "data"
    said = job("train.sbatch", FAST, DIST_ADV_DATA=str(data)).stdout
    assert f"python exec -B {at} -B {SCRIPTS.parent} -B {data} image.sif {RUN} train" in said
    assert data.is_dir()


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dist-adv: site.sh: CONTAINER: ")
    return done.stderr.partition("CONTAINER: ")[2]


def test_no_such_image(at: Path) -> None:
    """One line before anything is queued, and where it has gone meanwhile."""
    (at / "image.sif").unlink()
    command = ["bash", str(SCRIPTS / "submit.sh"), str(SCRIPTS / "train.sbatch"), FAST]
    done = subprocess.run(command, capture_output=True, text=True)
    assert refused(done).startswith("image.sif: no such image; build it (see ")
    assert refused(job("train.sbatch", FAST)).startswith("image.sif: no such image")
    (at / "sweep.yaml").write_text(f"base: {DIGITS}/fast.yaml\nruns: [{{name: one}}]")
    with pytest.raises(UserError, match=r"^site.sh: CONTAINER: image.sif: no such image"):
        slurm.plan(load_sweep(at / "sweep.yaml"), at / "out", None)


def test_no_apptainer(at: Path) -> None:
    (at / "bin" / "apptainer").unlink()
    for name in ("bash", "dirname", "hostname"):
        (at / "bin" / name).symlink_to(shutil.which(name))
    done = job("train.sbatch", FAST, PATH=str(at / "bin"))  # this machine may have one
    assert refused(done).startswith("no apptainer on ")


def test_a_site_file_of_before(at: Path) -> None:
    """CONTAINER is not in it, nor taken from the environment."""
    (at / "site.sh").write_text(SITE)
    command = ["bash", str(SCRIPTS / "submit.sh"), "--dry-run", str(SCRIPTS / "train.sbatch"), FAST]
    env = os.environ | {"CONTAINER": "absent.sif"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
