"""What can be wrong with a site's file, a cluster or a command: one line that says what to do."""

import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from slurm_cluster import DIGITS, SCRIPTS, SITE, Cluster, poll

pytestmark = pytest.mark.slow

TRAIN = (SCRIPTS / "submit.sh", SCRIPTS / "train.sbatch", DIGITS / "fast.yaml")


def refused(cluster: Cluster, at: Path, *says: str, **env: str) -> None:
    """Submitting a run costs one line and exit status 2."""
    done = cluster.run(*TRAIN, at=at, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("dist-adv: ")
    assert done.stderr.count("\n") == 1
    for part in says:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("PARTITION=", "PARTITION=nope", ("invalid partition specified: nope", "site.sh")),
        ("PARTITION=", "PARTITION=paid", ("Invalid account", "site.sh")),
        ("CPUS_PER_RANK=1", "CPUS_PER_RANK=99", ("More processors requested", "site.sh")),
        ("TIME=10:00", "TIME=soon", ("time", "site.sh")),
        ("GPUS_PER_NODE=0", "GPUS_PER_NODE=8", ("node configuration is not available", "site.sh")),
        ("OPTIONS=()", "OPTIONS=(--bananas)", ("--bananas", "site.sh")),
        ("OPTIONS=()", "OPTIONS=()\nCONTAINER=no.sif", ("site.sh: CONTAINER: no.sif: no such",)),
        ("CPUS_PER_RANK=1\n", "", ("site.sh: CPUS_PER_RANK is missing",)),
        ("environment()", "set_up()", ("site.sh: environment is missing",)),
    ],
)
def test_a_site_file_that_does_not_fit(cluster, tmp_path, before, after, says):
    (tmp_path / "site.sh").write_text(SITE.replace(before, after))
    refused(cluster, tmp_path, *says)


@pytest.mark.parametrize(("env", "ranks"), [({}, 1), ({"RANKS": "2"}, 2)])
def test_the_site_file_as_it_is(cluster, tmp_path, env, ranks):
    """A GPU a node, or as many as RANKS says: the job has them, and would start a rank for each."""
    job = cluster.submit("train.sbatch", "nowhere.yaml", at=tmp_path, DIST_ADV_SITE="", **env)
    poll(lambda: cluster.job(job, "JobState") == "FAILED", f"job {job} fails")
    start, words = cluster.log(job).splitlines()
    assert start.endswith(f" {ranks} process(es) a node")
    assert words.startswith("dist-adv: nowhere.yaml: name one")
    assert cluster.job(job, "TresPerNode") == f"gres:gpu:{ranks}"


def test_no_site_file(cluster, tmp_path):
    refused(cluster, tmp_path, "nowhere.sh: no such site file", DIST_ADV_SITE="nowhere.sh")


def test_a_cluster_without_a_default_partition(cluster, tmp_path):
    cluster.ask("scontrol", "update", "PartitionName=main", "Default=NO")
    try:
        refused(cluster, tmp_path, "No partition specified", "site.sh")
    finally:
        cluster.ask("scontrol", "update", "PartitionName=main", "Default=YES")


def test_no_sbatch(cluster, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    refused(cluster, tmp_path, "no sbatch on this machine", PATH=str(tmp_path))


@pytest.mark.parametrize(
    ("gpus", "arguments", "says"),
    [
        (1, ["configs/digits/fast.yaml"], "this job has no GPU; submit it with"),
        (0, ["configs/digits/fats.yaml"], "configs/digits/fats.yaml: name one"),
        (0, [], "no configuration: name one"),
    ],
)
def test_a_job_that_cannot_run(cluster, tmp_path, gpus, arguments, says):
    """Submitted by sbatch itself, from the root of a checkout."""
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(SCRIPTS.parents[1] / name)
    (tmp_path / "site.sh").write_text(SITE.replace("GPUS_PER_NODE=0", f"GPUS_PER_NODE={gpus}"))
    command = ("sbatch", "--parsable", "launch/slurm/train.sbatch", *arguments)
    job = cluster.run(*command, at=tmp_path).stdout.strip()
    poll(lambda: cluster.job(job, "JobState") == "FAILED", f"job {job} fails")
    assert cluster.job(job, "ExitCode") == "2:0"
    words = [line for line in cluster.log(job).splitlines() if "start 1 on" not in line]
    assert len(words) == 1
    assert words[0].startswith(f"dist-adv: {says}")


def test_a_run_folder_at_home(cluster, tmp_path):
    """bash leaves the ~ alone behind a `=`, and dist-adv does not."""
    script = f"source {SCRIPTS}/common.sh && run_dir_of configs/digits/fast.yaml --run-dir=~/x"
    done = cluster.run("bash", "-c", script, at=tmp_path)
    assert done.stdout == f"{Path.home()}/x\n"


def test_ports_in_use(cluster, tmp_path):
    """The rendezvous takes the next free port; where there is none it says so."""

    def port() -> tuple[int, str]:
        script = f"source {SCRIPTS}/common.sh && SLURM_JOB_ID=12345 free_port"
        done = cluster.run("bash", "-c", script, at=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert port() == (0, "22345\n")
    with ExitStack() as stack:
        for taken in range(22345, 22366):
            there = stack.enter_context(socket.socket())
            there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            there.bind(("", taken))
            there.listen()
            if taken == 22345:
                assert port() == (0, "22346\n")
        code, words = port()
    assert code == 2
    assert words.startswith("dist-adv: ports 22345 to 22365 of ")
    assert words.count("\n") == 1
