"""Variables of a launcher: whole, or left over, which is said before torch waits for anyone."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_adv import cli
from dist_adv.distributed import launched
from dist_adv.errors import UserError

TORCHRUN = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},
}


@pytest.fixture
def variables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """These of a launcher and no others."""
    for name in (*TORCHRUN, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    return request.param


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "rank", "ranks"),
    [
        ({}, 0, 1),
        (TORCHRUN, 1, 2),
        (without("LOCAL_WORLD_SIZE"), 1, 2),
        # Containers of one process, and what a cluster sets.
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, 0, 1),
        ({"MASTER_ADDR": "x"}, 0, 1),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "PMI_SIZE": "1"}, 0, 1),
        ({**TORCHRUN, "PMI_SIZE": "8"}, 1, 2),
    ],
    indirect=["variables"],
)
def test_understood(variables: Mapping[str, str], rank: int, ranks: int) -> None:
    launched.check()
    assert (launched.rank(), launched.ranks()) == (rank, ranks)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 in the environment, but no RANK, LOCAL_RANK, MASTER"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK: 0 in the environment, but no WORLD_SIZE, RANK, MASTER"),
        ({"RANK": ""}, "RANK: '' in the environment is no number from 0 on"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' in the environment is no number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' in the environment is no number from 1 on"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: '-1' in the environment is no number from 0 on"),
        ({**TORCHRUN, "RANK": "one"}, "RANK: 'one' in the environment is no number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE: 'x' in the environment is no"),
        (without("MASTER_ADDR"), "LOCAL_RANK: 1 in the environment, but no MASTER_ADDR: "),
        ({**TORCHRUN, "MASTER_PORT": ""}, "LOCAL_RANK: 1 in the environment, but no MASTER_PORT: "),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT: 'http' in the environment is no port"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT: '65536' in the environment is no"),
        ({**TORCHRUN, "RANK": "2"}, "RANK: 2 in the environment, but WORLD_SIZE is 2"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK: 4 in the environment, but LOCAL_WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE: 4 in the environment is of MPI"),
    ],
    indirect=["variables"],
)
def test_refused(variables: Mapping[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        launched.check()
    assert str(caught.value).startswith(says)
    assert "torchrun" in str(caught.value) or "port" in says.lower()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2", "RANK": "1"}], indirect=True)
@pytest.mark.parametrize("command", ["train CONFIG --run-dir x", "eval RUN", "sweep SWEEP --out x"])
def test_commands_say_so_at_once(
    command: str,
    variables: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Although the variable says that rank 0 is another, who would be waited for to speak."""
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: pytest.fail("waits for rank 0"))
    config = tmp_path / "config.yaml"
    config.write_text("method: {name: fast}\nthreat: {eps: 0.1}\ndata: {name: digits}\n")
    (tmp_path / "s.yaml").write_text(f"runs: [{{name: a, base: {config}}}]\n")
    names = {"CONFIG": config, "RUN": tmp_path, "SWEEP": tmp_path / "s.yaml"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.stopping, "catch_signals", lambda: None)
    assert cli._run([str(names.get(word, word)) for word in command.split()]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dist-adv: WORLD_SIZE: 2 in the environment, but no LOCAL_RANK")
    assert not (tmp_path / "x").exists()
