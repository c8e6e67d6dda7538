"""A Slurm cluster of two nodes on this machine, for as long as its tests take."""

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), _free_ports(3))
    try:
        made.control("up", str(made.port))
        yield made
    finally:
        made.control("down")


def _free_ports(n: int) -> int:
    """The first of n ports in a row, below those that the system hands out."""
    for first in range(21000, 31000, 10):
        with suppress(OSError):
            for port in range(first, first + n):
                with socket.socket() as there:
                    there.bind(("", port))
            return first
    raise AssertionError("no free ports between 21000 and 31000")
