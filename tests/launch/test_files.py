"""Every file of `launch/` is run, or at least checked, by a test; shell files are clean."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

# Which module of tests runs or checks a file.
COVERED = {
    "accelerate/cpu.yaml": "launch/test_accelerate.py",
    "accelerate/deepspeed-zero1.yaml": "distributed/test_engines.py",
    "accelerate/deepspeed-zero2.yaml": "distributed/test_engines.py",
    "accelerate/deepspeed-zero3.yaml": "distributed/test_engines.py",
    "accelerate/fsdp2.yaml": "distributed/test_engines.py",
    "accelerate/multi-gpu.yaml": "launch/test_accelerate.py",
    "accelerate/multi-node.yaml": "launch/test_accelerate.py",
    "accelerate/one-gpu.yaml": "launch/test_accelerate.py",
    "containers/Dockerfile": "launch/test_containers.py",
    "containers/dist-adv.def": "launch/test_containers.py",
    "containers/install.sh": "launch/test_containers.py",
    "kubernetes/trainjob.yaml": "launch/test_clouds.py",
    "run.sh": "launch/test_run.py",
    "skypilot/train.yaml": "launch/test_clouds.py",
    "slurm/common.sh": "slurm/test_slurm_input.py",
    "slurm/eval.sbatch": "slurm/test_slurm_eval.py",
    "slurm/multinode.sbatch": "slurm/test_slurm_training.py",
    "slurm/report.sbatch": "launch/test_report_job.py",
    "slurm/site.sh": "slurm/test_slurm_input.py",
    "slurm/submit.sh": "slurm/test_slurm_input.py",
    "slurm/sweep.sbatch": "slurm/test_slurm_sweep.py",
    "slurm/train.sbatch": "slurm/test_slurm_training.py",
}


def files(*patterns: str) -> list[Path]:
    return sorted(path for each in patterns for path in ROOT.glob(each) if path.is_file())


SHELL = files(".ci/*", "**/*.sh", "**/*.sbatch")
SHELL = [path for path in SHELL if ".venv" not in path.parts]


@pytest.mark.parametrize("path", files("launch/**/*"), ids=lambda path: path.name)
def test_every_file_has_a_test(path: Path) -> None:
    name = path.relative_to(LAUNCH).as_posix()
    assert name in COVERED, f"write a test of launch/{name}, and say here where it is"
    assert path.name in (ROOT / "tests" / COVERED[name]).read_text()


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(path: Path) -> None:
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside_python)
    assert shellcheck, "pip install 'dist-adv[test]'"
    done = subprocess.run(
        [shellcheck, "--external-sources", str(path)],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
