"""`launch/containers/`: the two recipes of one image, as far as they can be checked without a base.

**No image is built here**: that takes a registry.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ROOT / "launch" / "containers"
DOCKERFILE, APPTAINER = FILES / "Dockerfile", FILES / "dist-adv.def"

# A stand-in for the image's Python: its torch is this environment's, and pip says what it is told.
PYTHON = f"""#!/bin/sh
case "$*" in
  "-m venv"*) mkdir -p "$5/bin" && cp "$0" "$5/bin/python" ;;
  "-m pip"*) echo "$@" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def test_hadolint() -> None:
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=beside_python)
    assert hadolint, "pip install 'dist-adv[test]'"
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_recipes_make_the_same_image() -> None:
    """Of the same base, whose torch is the one that is pinned, with the same files."""
    docker, apptainer = DOCKERFILE.read_text(), APPTAINER.read_text()
    base = re.search(r"^ARG BASE=(\S+)$", docker, re.MULTILINE)[1]
    assert f"\nFrom: {base}\n" in apptainer
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert base.startswith(f"pytorch/pytorch:{pinned}-cuda")
    copied = re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE)
    files = [name for line in copied for name in line.split()]
    taken = re.findall(r"^    (\S+) /opt/dist-adv/\1$", apptainer, re.MULTILINE)
    assert sorted(files) == sorted(taken)
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(files) == sorted(allowed)
    assert "install.sh /opt/venv" in docker
    assert "install.sh /opt/venv" in apptainer


def test_the_image_keeps_its_torch(tmp_path: Path) -> None:
    """install.sh: pinned versions, but for torch and what it brings."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", str(FILES / "install.sh"), str(tmp_path / "venv")],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    constraints = tmp_path / "venv" / "constraints.txt"
    assert f" --constraint {constraints} ." in done.stdout
    lines = constraints.read_text().splitlines()
    assert lines[:2] == [f"{name}=={version(name)}" for name in ("torch", "torchvision")]
    left_out = set((ROOT / "requirements.lock").read_text().splitlines()) - set(lines[2:])
    kinds = {re.match(r"[a-z]+", line)[0] for line in left_out if not line.startswith("#")}
    assert kinds == {"torch", "torchvision", "triton", "nvidia", "cuda"}
    assert sum(line.startswith("torch") for line in lines) == 2
