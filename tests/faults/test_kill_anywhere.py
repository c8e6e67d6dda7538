"""A short slice of `kill_anywhere.py`; `make faults` is the long one."""

import time

import pytest

from kill_anywhere import run

pytestmark = pytest.mark.slow


def test_killed_runs_end_with_the_weights_of_uninterrupted_ones(tmp_path):
    seed = int(time.time())  # another slice each time; printed, so that it can be run again
    done = run(2, seed, tmp_path)
    assert all(draw.equal for draw in done), f"seed {seed}: {done}"
    assert any(draw.kills for draw in done)
