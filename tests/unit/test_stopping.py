"""What asks a run to stop, weakest first: a deadline, a stop file, a dead launcher, a signal."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_adv.distributed import stopping
from dist_adv.distributed.stopping import REASONS, Stopping, catch_signals
from dist_adv.errors import STOPPED, Preempted

# What torchrun tells the second of two ranks.
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
LAUNCHED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No signal yet, no launcher; the handlers of this process as they were afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    monkeypatch.setattr(stopping, "_received", None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopping.time, "monotonic", clock)
    return clock


def why(asked: Stopping) -> str:
    return REASONS[asked.reason()]


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a rank of torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "made-up")


def orphaned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent dies."""
    monkeypatch.setattr(os, "getppid", lambda: -1)


def test_nothing_asks(tmp_path):
    assert why(Stopping(tmp_path, None, main=True)) == ""
    assert why(Stopping(tmp_path, 60, main=True)) == ""
    assert Stopping(tmp_path, None, main=True).reason() == 0  # what `max` over ranks relies on


@pytest.mark.parametrize("minutes", [0.5, 60])
def test_deadline(minutes, tmp_path, clock):
    """So many minutes from the start, not a moment before."""
    asked = Stopping(tmp_path, minutes, main=False)
    clock.now += 60 * minutes - 0.001
    assert why(asked) == ""
    clock.now += 0.002
    assert why(asked) == "train.max_minutes"


def test_stop_file(tmp_path, clock):
    """Only the main process looks; once heeded it is gone, and a second time is no mistake."""
    main, other = (Stopping(tmp_path, None, main) for main in (True, False))
    (tmp_path / "STOP").touch()
    assert (why(main), why(other)) == ("stop file", "")
    other.heeded()
    assert (tmp_path / "STOP").exists()
    main.heeded()
    assert not (tmp_path / "STOP").exists()
    main.heeded()
    clock.now += 1
    assert why(main) == ""


def test_stop_file_is_looked_for_once_a_second(tmp_path, clock, monkeypatch):
    """At most, however often the loop asks; and at least, or it would not be seen."""
    looked: list[float] = []
    exists = Path.exists

    def count(path: Path) -> bool:
        looked.append(clock.now)
        return exists(path)

    monkeypatch.setattr(Path, "exists", count)
    asked = Stopping(tmp_path, None, main=True)
    for _ in range(40):
        assert why(asked) == ""
        clock.now += 0.25
    assert looked == [1000 + i for i in range(10)]
    clock.now += 0.25  # looks again here
    assert why(asked) == ""
    (tmp_path / "STOP").touch()
    seen = []
    for _ in range(6):
        seen.append(why(asked))
        clock.now += 0.25
    assert seen == ["", "", "", "", "stop file", "stop file"]
    assert looked[10:] == [1010.25, 1011.25]


@pytest.mark.parametrize("rank", [True, False])
def test_launcher_that_died(rank, tmp_path, monkeypatch):
    """Under torchrun; a plain process may lose its parent: nohup, a closed terminal."""
    if rank:
        launched(monkeypatch)
    asked = Stopping(tmp_path, None, main=True)
    assert why(asked) == ""
    orphaned(monkeypatch)
    assert why(asked) == ("launcher died" if rank else "")


@pytest.mark.parametrize("number", SIGNALS)
def test_signal(number, tmp_path):
    """Noted and no more: the loop stops where it can."""
    asked = Stopping(tmp_path, None, main=False)
    catch_signals()
    assert why(asked) == ""
    os.kill(os.getpid(), number)
    assert why(asked) == signal.Signals(number).name
    assert why(Stopping(tmp_path, None, main=False)) == signal.Signals(number).name


def test_first_signal_is_the_reason(tmp_path):
    catch_signals()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert why(Stopping(tmp_path, None, main=True)) == "SIGUSR1"


@pytest.mark.parametrize("rank", [True, False])
def test_nohup(rank, tmp_path, monkeypatch):
    """Ignored it stays; but ranks of torchrun get it from torchrun alone, which then leaves."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if rank:
        launched(monkeypatch)
    catch_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert why(Stopping(tmp_path, None, main=True)) == ("SIGHUP" if rank else "")


@pytest.mark.parametrize(
    ("reason", "status"),
    [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143), ("stop file", 143)],
)
def test_exit_status(reason, status):
    assert Preempted(reason).status == status
    assert status in STOPPED


def test_a_signal_before_the_ranks_meet_is_heeded_at_once():
    catch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM"), stopping.leaving_at_once():
        pytest.fail("waits for the others")


def test_second_ctrl_c_insists():
    catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_second_sigterm_does_not_insist(tmp_path):
    """Schedulers repeat it, and the checkpoint that it asked for may be on its way."""
    catch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert why(Stopping(tmp_path, None, main=True)) == "SIGTERM"


def test_a_library_does_not_catch_signals():
    """Who imports dist_adv keeps their own handlers."""
    script = """
import signal
from pathlib import Path

numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
before = [signal.getsignal(number) for number in numbers]
import dist_adv.cli
from dist_adv.distributed.stopping import Stopping

Stopping(Path("."), 1.0, True).reason()
print(before == [signal.getsignal(number) for number in numbers])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_strongest_reason_wins(tmp_path, clock, monkeypatch):
    """Each over all those before it: the answer of many ranks is the highest number."""
    launched(monkeypatch)
    asked = Stopping(tmp_path, 1.0, main=True)

    def deadline() -> None:
        clock.now += 61

    def file() -> None:
        (tmp_path / "STOP").touch()
        clock.now += 1

    def died() -> None:
        orphaned(monkeypatch)

    def signalled() -> None:
        catch_signals()
        os.kill(os.getpid(), signal.SIGUSR1)

    steps: list[Callable[[], None]] = [deadline, file, died, signalled]
    found = [asked.reason()]
    for step in steps:
        step()
        found.append(asked.reason())
    assert found == [0, 1, 2, 3, 4]
    assert list(REASONS[:5]) == ["", "train.max_minutes", "stop file", "launcher died", "SIGUSR1"]
    assert list(REASONS[5:]) == ["SIGHUP", "SIGTERM", "SIGINT"]


def test_real_clock(tmp_path):
    """The same without a made-up clock, so that it is one that exists."""
    asked = Stopping(tmp_path, 0.2 / 60, main=True)
    assert why(asked) == ""
    time.sleep(0.25)
    assert why(asked) == "train.max_minutes"


def test_a_rank_that_was_told_to_go_does_not_wait_for_rank_0_to_speak():
    """Its launcher's signal came before its own trouble; it would wait 20 s, and then speak."""
    script = """
import os, signal
from dist_adv import cli
from dist_adv.distributed import stopping

stopping.catch_signals()
os.kill(os.getpid(), signal.SIGTERM)
cli._complain("something")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | LAUNCHED,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
