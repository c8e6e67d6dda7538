"""Runs on a cluster: interrupted in every way that Slurm has, they end as if nothing had been."""

from pathlib import Path

import pytest

from dist_adv.runs import checkpoint
from launch import SMALL, Job, status, weights_hash, write_config
from slurm_cluster import APPTAINER, SITE, poll, reaches

pytestmark = pytest.mark.slow

EPOCHS, BATCHES, REPLAYS = 64, 4, 3
EPOCH = BATCHES * REPLAYS  # optimiser steps


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Free, for what it carries from batch to batch; ten seconds, to be stopped in the middle."""
    path = tmp_path_factory.mktemp("config") / "free.yaml"
    return write_config(path, "free", images, train={"epochs": EPOCHS}, model=SMALL)


@pytest.fixture(scope="module")
def truth(config: Path) -> str:
    """The weights that two processes of this machine come to without a cluster."""
    run_dir = config.parent / "truth"
    Job(config, run_dir, ranks=2).finish()
    return weights_hash(run_dir)


def test_usr1_requeue_and_a_lost_node(cluster, config, truth, tmp_path):
    """One run on two nodes, which trains as two processes here: the notice before a time limit, an
    operator's requeue, a node that dies with all that runs on it.

    From the second start on it runs in a container, a stand-in: the site's file names one by then.
    """
    run_dir = tmp_path / "runs" / f"{config.parent.name}-free"
    job = cluster.submit("multinode.sbatch", str(config), at=tmp_path, RANKS="1")
    reaches(run_dir, 8 * EPOCH)
    in_a_container(tmp_path)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "RUNNING", starts=2)
    first = status(run_dir)
    assert (first["state"], first["reason"]) == ("preempted", "stop file")
    assert "start 1 on n[1-2], 1 process(es) a node" in cluster.log(job)
    assert 8 * EPOCH <= first["step"] < EPOCHS * EPOCH

    reaches(run_dir, 24 * EPOCH)
    cluster.ask("scontrol", "requeue", job)
    cluster.wait_for(job, "RUNNING", starts=3)
    assert status(run_dir)["state"] == "preempted"

    reaches(run_dir, 40 * EPOCH)
    cluster.lose("n2")
    cluster.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")  # or in minutes
    cluster.control("node", "n2")
    cluster.wait_for(job, "RUNNING", starts=4)

    cluster.wait_for(job, "COMPLETED", starts=4)
    assert status(run_dir)["state"] == "done"
    assert weights_hash(run_dir) == truth
    assert not (run_dir / "STOP").exists()
    contained = (tmp_path / "apptainer.log").read_text().splitlines()
    assert len(contained) == 2 * 3  # nodes, starts
    assert all(f" -B {tmp_path} " in line and " image.sif bash " in line for line in contained)


def in_a_container(at: Path) -> None:
    """Give the site an image, and its nodes an Apptainer."""
    (at / "bin").mkdir()
    (at / "bin" / "apptainer").write_text(APPTAINER)
    (at / "bin" / "apptainer").chmod(0o755)
    (at / "image.sif").touch()
    site = SITE.replace("{ PATH=", f"{{ PATH={at}/bin:")
    (at / "site.sh").write_text(f"{site}CONTAINER=image.sif\n")


def test_scancel_and_a_job_of_a_higher_priority(cluster, config, truth, tmp_path):
    """Two processes of one node. After scancel the same command is a new job, which goes on; a job
    that takes its node gives it back, and it goes on again to the end of the run."""
    run_dir = tmp_path / "run"
    arguments = ("train.sbatch", str(config), "--run-dir=run")
    job = cluster.submit(*arguments, at=tmp_path)
    reaches(run_dir, 16 * EPOCH)
    cluster.ask("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    poll(lambda: not cluster.ask("squeue", "--noheader", f"--jobs={job}"), "the job is gone")
    stopped = status(run_dir)
    assert stopped["state"] == "preempted"
    newest = max((run_dir / "checkpoints").iterdir())
    assert checkpoint.load(newest).state["clock"]["step"] == stopped["step"]
    assert "back to the queue" not in cluster.log(job)

    job = cluster.submit(*arguments, at=tmp_path)
    reaches(run_dir, 32 * EPOCH)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--wait")
    cluster.ask("sbatch", f"--output={tmp_path}/urgent.log", *urgent)
    assert "asked to stop (USR1)" in cluster.log(job)
    cluster.wait_for(job, "COMPLETED", starts=2)
    assert weights_hash(run_dir) == truth
