"""Ranks that were not started alike, or cannot meet, say so in one line before anything is written.

Each rank is a process of its own, without a launcher: as srun starts them, on nodes of which one
has a stale checkout.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import dist_adv
import forked
from dist_adv.config import load_config
from dist_adv.training.run import train_run
from launch import TINY, free_port

pytestmark = pytest.mark.slow

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
OURS = ("-m", "dist_adv")
TRAIN = ("train", str(DIGITS), *TINY, "--run-dir", "new")
# In which ranks wait for each other for seconds. Else it is torch's half an hour.
HASTY = """
from datetime import timedelta
from torch.distributed import distributed_c10d
distributed_c10d.default_pg_timeout = timedelta(seconds=2)
from dist_adv.cli import main
main()
"""


def rank(
    number: int,
    folder: Path,
    port: int,
    command: Sequence[str] = TRAIN,
    program: Sequence[str] = OURS,
    **variables: str,
) -> subprocess.Popen[str]:
    """One of two ranks."""
    place: Mapping[str, str] = {
        **{"RANK": str(number), "LOCAL_RANK": str(number)},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    return forked.Popen(
        [sys.executable, *program, *command],
        cwd=folder,
        env={**os.environ, **place, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def complaint(process: subprocess.Popen[str], status: int = 2) -> str:
    """The one line of a rank that leaves with this status."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("dist-adv: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def of_both(
    *ranks: subprocess.Popen[str],
    says: str = "rank 1 on {host} and rank 0 on {host} were not started alike (",
    remedy: str = "give every rank the same command, code and files",
) -> str:
    """What rank 0 says where rank 1 was started with something else."""
    try:
        line = complaint(ranks[0])
        ranks[1].terminate()  # as a launcher does; until then it lets rank 0 speak
        assert ranks[1].communicate(timeout=60)[1].count("dist-adv: ") == 0
    finally:
        for process in ranks:
            process.kill()
    host = socket.gethostname()
    assert says.format(host=host) in line
    assert remedy in line
    return line


def test_another_configuration(tmp_path: Path) -> None:
    port, other = free_port(), (*TRAIN, "method.alpha=0.1", "data.root=/local/images")
    line = of_both(rank(0, tmp_path, port), rank(1, tmp_path, port, other))
    assert "(method.alpha: 0.1 there, 0.25 on rank 0)" in line  # images may lie elsewhere
    assert not (tmp_path / "new").exists()


def test_another_code(tmp_path: Path) -> None:
    """A copy of the package with one line more."""
    stale = tmp_path / "stale" / "dist_adv"
    shutil.copytree(Path(dist_adv.__file__).parent, stale)
    with (stale / "attacks" / "threat.py").open("a") as source:
        source.write("# an older version\n")
    path = os.pathsep.join(filter(None, [str(stale.parent), os.environ.get("PYTHONPATH")]))
    port = free_port()
    line = of_both(rank(0, tmp_path, port), rank(1, tmp_path, port, PYTHONPATH=path))
    assert f"(code: {dist_adv.__version__} (" in line
    assert line.count(dist_adv.__version__) == 2
    assert not (tmp_path / "new").exists()


def test_another_evaluation(tmp_path: Path) -> None:
    """Of other weights, a bit of which differs, by another attack; the same run but for those."""
    here, there = tmp_path / "here", tmp_path / "there"
    train_run(load_config(DIGITS, TINY), here, "none")
    shutil.copytree(here, there)
    weights = bytearray((here / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (there / "model.safetensors").write_bytes(weights)
    before = (here / "results.jsonl").read_bytes()
    port = free_port()
    line = of_both(
        rank(0, tmp_path, port, ("eval", "here")),
        rank(1, tmp_path, port, ("eval", "there", "--attacks", "fgsm")),
    )
    assert "(eval.attacks: ['fgsm'] there, ['natural'] on rank 0; weights: " in line
    assert (here / "results.jsonl").read_bytes() == before


def test_other_images(images: Path, tmp_path: Path) -> None:
    """A copy of the folder in which a file has come into another class; in an evaluation, too."""
    there = shutil.copytree(images, tmp_path / "there")
    (there / "test" / "a" / "0.png").rename(there / "test" / "b" / "z.png")
    small = (*TINY, "train.batch_size=32", "data.name=imagefolder")
    train_run(load_config(DIGITS, (*small, f"data.root={images}")), tmp_path / "here", "none")
    wanted = {
        "says": "data.root: rank 1 on {host} has other images than rank 0 on {host} (test: the "
        "same number of images, but other names)",
        "remedy": "copy the folder (or that of DIST_ADV_DATA) once more",
    }
    for command in (
        ("train", str(DIGITS), *small, "--run-dir", "new"),
        ("eval", "here", "data.root=null"),
    ):
        port = free_port()
        roots = [{"DIST_ADV_DATA": str(root)} for root in (images, there)]
        ranks = [rank(k, tmp_path, port, command, **roots[k]) for k in range(2)]
        of_both(*ranks, **wanted)
    assert not (tmp_path / "new").exists()


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = complaint(rank(0, tmp_path, port))
    assert f"MASTER_PORT: {port} is in use on {socket.gethostname()}; set another one" in line
    assert not (tmp_path / "new").exists()


def test_ranks_that_do_not_meet(tmp_path: Path) -> None:
    """Nobody comes to rank 0; rank 1 knocks at the wrong port, or looks for a host that is none."""
    hasty, nobody = ("-c", HASTY), free_port()
    lonely = {
        "0 on": rank(0, tmp_path, free_port(), program=hasty),
        f"127.0.0.1:{nobody}": rank(1, tmp_path, nobody, program=hasty),
        "no.invalid:": rank(1, tmp_path, nobody, program=hasty, MASTER_ADDR="no.invalid"),
    }
    for says, process in lonely.items():
        line = complaint(process, 1)
        assert says in line
        assert " did not meet the others at " in line
        assert re.search(r"\(.*[^.]\); see MASTER_ADDR, MASTER_PORT and the firewall$", line)
    assert not (tmp_path / "new").exists()
