"""Ranks that were not started alike, or cannot meet, say so in one line before anything is written.

Each rank is a process of its own, without a launcher: as srun starts them, on nodes of which one
has a stale checkout.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import dist_adv
from launch import free_port

pytestmark = pytest.mark.slow

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
TINY = (
    *("model.width=4", "train.max_steps=1", "train.batch_size=512"),
    *("eval.attacks=[natural]", "eval.every=0", "track.wandb.mode=disabled"),
)


def rank(
    number: int, folder: Path, port: int, more: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    """One of two ranks of `dist-adv train`."""
    place: Mapping[str, str] = {
        **{"RANK": str(number), "LOCAL_RANK": str(number)},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    command = [sys.executable, "-m", "dist_adv", "train", str(DIGITS), *TINY, *more]
    return subprocess.Popen(
        [*command, "--run-dir", "new"],
        cwd=folder,
        env={**os.environ, **place, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(process: subprocess.Popen[str], folder: Path) -> str:
    """The one line of a rank that leaves with status 2 and has written nothing."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("dist-adv: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert not (folder / "new").exists()
    return lines[0]


def together(folder: Path, more: Sequence[str] = (), **variables: str) -> str:
    """What rank 0 says where rank 1 is started with something else."""
    port = free_port()
    ranks = [rank(0, folder, port), rank(1, folder, port, more, **variables)]
    try:
        line = refused(ranks[0], folder)
        ranks[1].terminate()  # as a launcher does; until then it lets rank 0 speak
        assert ranks[1].communicate(timeout=60)[1].count("dist-adv: ") == 0
    finally:
        for process in ranks:
            process.kill()
    host = socket.gethostname()
    assert f"rank 1 on {host} and rank 0 on {host} were not started alike (" in line
    assert "give every rank the same command and the same code" in line
    return line


def test_another_configuration(tmp_path: Path) -> None:
    line = together(tmp_path, ["method.alpha=0.1", "data.root=/local/images"])
    assert "(method.alpha: 0.1 there, 0.25 on rank 0)" in line  # images may lie elsewhere


def test_another_code(tmp_path: Path) -> None:
    """A copy of the package with one line more."""
    stale = tmp_path / "stale" / "dist_adv"
    shutil.copytree(Path(dist_adv.__file__).parent, stale)
    with (stale / "threat.py").open("a") as source:
        source.write("# an older version\n")
    path = os.pathsep.join(filter(None, [str(stale.parent), os.environ.get("PYTHONPATH")]))
    line = together(tmp_path, PYTHONPATH=path)
    assert f"(code: {dist_adv.__version__} (" in line
    assert line.count(dist_adv.__version__) == 2


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(rank(0, tmp_path, port), tmp_path)
    assert f"MASTER_PORT: {port} is in use on {socket.gethostname()}; set another one" in line
