"""Why this process should stop: a signal, a deadline, a stop file, a launcher that died.

Nothing here stops anything. The training loop asks at batch boundaries, and the ranks agree
(`session.py`), so that all of them stop at the same batch.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# The answer of many ranks is the one furthest down.
REASONS = ("", "train.max_minutes", "stop file", "launcher died", "SIGUSR1", "SIGTERM", "SIGINT")
STOP_FILE = "STOP"
_SECONDS_BETWEEN_LOOKS = 1.0

# Variables of processes that a launcher or a sweep has started.
STARTED_BY_SWEEP = "DIST_ADV_SWEEP"
_STARTED = ("TORCHELASTIC_RUN_ID", STARTED_BY_SWEEP)

_received: int | None = None
_parent = os.getppid()  # this module is imported first, seconds before torch is


def catch_signals() -> None:
    """From now on SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for a stop; a second Ctrl-C insists.

    Called by the commands and not by the library: a program's signals are its own.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if number == _received == signal.SIGINT:
        raise KeyboardInterrupt
    _received = _received or number


@contextmanager
def no_orphan() -> Iterator[None]:
    """Leave at once where the launcher dies meanwhile: there is nothing to save yet.

    For the start: ranks whose launcher is gone would wait half an hour to meet each other.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            if _orphaned():
                os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _orphaned() -> bool:
    """Has a launcher or a sweep started this process, and died? It would train on unseen.

    A plain process may lose its parent to a closed terminal, and go on.
    """
    return any(name in os.environ for name in _STARTED) and os.getppid() != _parent


def asked() -> bool:
    """Has a signal come already?"""
    return _received is not None


class Stopping:
    """What asks this process to stop. The deadline counts from here."""

    def __init__(self, run_dir: Path, max_minutes: float | None, main: bool) -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.file = run_dir / STOP_FILE if main else None
        self.looked = -_SECONDS_BETWEEN_LOOKS
        self.found = False

    def reason(self) -> int:
        """An index into REASONS; 0 to go on."""
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
        """Looked for once a second at most: it may lie on a slow network disk."""
        now = time.monotonic()
        if self.file and now - self.looked >= _SECONDS_BETWEEN_LOOKS:
            self.looked, self.found = now, self.file.exists()
        return self.found

    def heeded(self) -> None:
        """The stop file has done its work; the next start is not stopped by it."""
        if self.file:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)
