"""Why this process should stop: a signal, a deadline, a stop file, a launcher that died.

Nothing here stops anything. The training loop asks at batch boundaries, and the ranks agree
(`session.py`), so that all of them stop at the same batch.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dist_adv.distributed import launched
from dist_adv.errors import Preempted

# The answer of many ranks is the one furthest down.
REASONS = (
    *("", "train.max_minutes", "stop file", "launcher died"),
    *("SIGUSR1", "SIGHUP", "SIGTERM", "SIGINT"),
)
STOP_FILE = "STOP"
_SECONDS_BETWEEN_LOOKS = 1.0

# Variables of processes that a launcher or a sweep has started.
STARTED_BY_SWEEP = "DIST_ADV_SWEEP"
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"
_STARTED = (_OF_TORCHRUN, STARTED_BY_SWEEP)

_received: int | None = None
_parent = os.getppid()  # this module is imported first, seconds before torch is


def catch_signals() -> None:
    """Let SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask for a stop from now on; a second Ctrl-C insists.

    Called by the commands and not by the library: a program's signals are its own. SIGHUP stays
    ignored where it is: under nohup. A rank of torchrun gets it from its launcher alone, in whose
    session it is not, and its launcher is about to kill it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _note)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or _OF_TORCHRUN in os.environ:
        signal.signal(signal.SIGHUP, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if number == _received == signal.SIGINT:
        raise KeyboardInterrupt
    _received = _received or number


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """End this process where it is asked to stop meanwhile, or its launcher dies.

    For the start, when there is nothing to save: torch waits up to half an hour for the other
    ranks, in C++, where no handler of Python's runs. A thread is told of signals instead. Raises
    Preempted for one that came before.
    """
    if _received is not None:
        raise Preempted(signal.Signals(_received).name)
    if launched.ranks() == 1:
        yield
        return
    heard, wake = os.pipe()
    os.set_blocking(wake, False)  # as Python wants it
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if select.select([heard], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
                numbers = [number for number in os.read(heard, 16) if _asks(number)]
                if numbers and not over.is_set():
                    _leave(signal.Signals(numbers[0]).name)
            elif _orphaned():
                _leave("launcher died")

    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(wake)  # which wakes the thread
        watching.join()
        os.close(heard)


def _asks(number: int) -> bool:
    return signal.getsignal(number) in (_note, signal.default_int_handler)


def _leave(reason: str) -> NoReturn:
    stop = Preempted(reason)
    if launched.rank() == 0:
        text = f"dist-adv: stopped ({stop}) before the ranks had met; nothing was to be saved\n"
        with suppress(OSError):
            os.write(2, text.encode())
    os._exit(stop.status)


def _orphaned() -> bool:
    """Tell whether what started this process, a launcher or a sweep, has died.

    It would train on unseen. A plain process may lose its parent to a closed terminal, and go on.
    """
    return any(name in os.environ for name in _STARTED) and os.getppid() != _parent


def asked() -> bool:
    """Tell whether a signal has come already."""
    return _received is not None


class Stopping:
    """What asks this process to stop. The deadline counts from here."""

    def __init__(self, run_dir: Path, max_minutes: float | None, main: bool) -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.file = run_dir / STOP_FILE if main else None
        self.looked = -_SECONDS_BETWEEN_LOOKS
        self.found = False

    def reason(self) -> int:
        """Return an index into REASONS; 0 to go on."""
        if _received is not None:
            return REASONS.index(signal.Signals(_received).name)
        if _orphaned():
            return REASONS.index("launcher died")
        if self._file_is_there():
            return REASONS.index("stop file")
        if self.deadline and time.monotonic() > self.deadline:
            return REASONS.index("train.max_minutes")
        return 0

    def _file_is_there(self) -> bool:
        """Look for it once a second at most: it may lie on a slow network disk."""
        now = time.monotonic()
        if self.file and now - self.looked >= _SECONDS_BETWEEN_LOOKS:
            self.looked, self.found = now, self.file.exists()
        return self.found

    def heeded(self) -> None:
        """Remove the stop file, which has done its work: it does not stop the next start."""
        if self.file:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)
