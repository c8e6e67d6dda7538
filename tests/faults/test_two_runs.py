"""A run folder has one run at a time."""

import signal

import pytest

from launch import SMALL, Job, status, weights_hash, write_config

pytestmark = pytest.mark.slow


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(images, tmp_path):
    config = write_config(tmp_path / "c.yaml", "free", images, train={"epochs": 4}, model=SMALL)
    Job(config, tmp_path / "alone").finish()

    live = Job(config, tmp_path / "run")
    assert live.wait_for_checkpoint(12)
    live.signal(signal.SIGSTOP)  # it holds the folder for as long as the second may take
    second = Job(config, tmp_path / "run")
    assert second.wait() == 2
    line = second.output().splitlines()[-1]  # after what it says while it loads
    assert line.startswith(f"dist-adv: {tmp_path / 'run'}: is in use by process {live.process.pid}")
    assert live.running()
    live.kill()
    assert status(tmp_path / "run")["state"] == "running"  # of a process that is no more

    Job(config, tmp_path / "run").finish()
    assert status(tmp_path / "run")["state"] == "done"
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "alone")


def test_of_two_that_start_at_once_one_trains(images, tmp_path):
    config = write_config(tmp_path / "c.yaml", "free", images, train={"epochs": 12}, model=SMALL)
    jobs = [Job(config, tmp_path / "run") for _ in range(2)]
    refused, trained = sorted(jobs, key=lambda job: -job.wait())
    assert trained.process.returncode == 0
    assert refused.process.returncode in (0, 2)  # 0: it came when all was done
    if refused.process.returncode == 2:
        assert f"dist-adv: {tmp_path / 'run'}: " in refused.output()
        assert "Traceback" not in refused.output()
    epochs = [line for line in trained.output().splitlines() if " epoch 12/12 " in line]
    assert len(epochs) == 1
