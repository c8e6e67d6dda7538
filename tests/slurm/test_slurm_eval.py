"""An evaluation of anybody's network on a cluster: sent back to the queue, it goes on."""

from pathlib import Path

import pytest

import theirs
from dist_adv import files
from slurm_cluster import poll

pytestmark = pytest.mark.slow


def test_an_evaluation_goes_on_after_a_requeue(cluster, tmp_path: Path) -> None:
    """Two processes of one node; a chunk of ten images takes half a second."""
    arguments = ["--model", "theirs:slow", "data.name=theirs:Reds", "eval.batch_size=5"]
    given = [*arguments, "--attacks", "pgd-5", "--out", "out"]
    place = str(Path(theirs.__file__).parent)
    job = cluster.submit("eval.sbatch", *given, at=tmp_path, PYTHONPATH=place)
    poll(
        lambda: any("pgd" in each.read_text() for each in tmp_path.glob("out/unfinished-*")),
        "a chunk is done",
    )
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "RUNNING", starts=2)
    assert "its time is nearly over; back to the queue" in cluster.log(job)
    cluster.wait_for(job, "COMPLETED", starts=2)
    assert "pgd-5: going on after" in cluster.log(job)
    lines = [line for _, line in files.read(tmp_path / "out" / "results.jsonl")]
    assert [(line["attack"], line["n"]) for line in lines] == [("natural", 150), ("pgd-5", 150)]
