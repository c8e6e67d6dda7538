"""A short slice of `kill_anywhere.py`; `make faults` is the long one."""

import time

import pytest

from cases import CASES
from dist_adv.config import load_config
from kill_anywhere import Harness, run

pytestmark = pytest.mark.slow


def test_killed_runs_end_with_the_weights_of_uninterrupted_ones(tmp_path):
    seed = int(time.time())  # another slice each time; printed, so that it can be run again
    for more in range(5):  # a run may end before it is killed
        done = run(2, seed + more, tmp_path / str(more))
        assert all(draw.equal for draw in done), f"seed {seed + more}: {done}"
        if any(draw.kills for draw in done):
            return
    pytest.fail(f"no run was killed in ten draws from seed {seed}")


def test_every_case_may_be_drawn(tmp_path):
    harness = Harness(tmp_path)
    for case in CASES:
        load_config(harness.config(case))
