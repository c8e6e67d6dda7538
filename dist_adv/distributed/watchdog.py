"""Finds a process that makes no progress or has lost another, says so, and ends it."""

import faulthandler
import math
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from dist_adv.errors import GOES_ON

_SECONDS_TO_SPEAK = 5.0  # the first rank to leave gets the others killed: let all of them speak
_SECONDS_TO_NOTICE = 5.0  # a broken connection is noticed by whoever waits for it, but not always


class Watchdog:
    """Ends this process with the stacks of its threads after `minutes` without a `beat`.

    Only time in which it could run counts: the watching thread is suspended with it (Ctrl-Z, a
    debugger, the lid of a laptop), and adds up its own looks, each as long as it should be at most.

    In training every rank waits for every other, so one that hangs makes all of them speak. While
    `pause` is on, waiting is no fault: one rank's share of an evaluation may take longer.

    `others`: process ids by rank of those on this machine. One that is gone while we are here ends
    this process, too. Whoever waits for it should have been told by then; but a gloo collective
    that is being set up at that instant waits on (seen in one of sixty kills), deaf to signals.
    """

    def __init__(
        self, minutes: float, rank: int, ranks: int, others: Mapping[int, int] | None = None
    ) -> None:
        self.limit, self.who = 60 * minutes, f"rank {rank} of {ranks}"
        self.others = others or {}
        self.awake, self.last = 0.0, math.inf  # seconds; each has one thread that writes it
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        self.last = self.awake

    def pause(self) -> None:
        self.last = math.inf

    def close(self) -> None:
        self.closed.set()

    def _watch(self) -> None:
        look = min(1.0, self.limit / 10)
        complete, before = self.awake, time.monotonic()
        while not self.closed.wait(look):
            now = time.monotonic()
            self.awake += min(now - before, look)
            before = now
            if self.awake - self.last > self.limit:
                self._end_with_stacks()
            lost = [rank for rank, pid in self.others.items() if not _exists(pid)]
            complete = complete if lost else self.awake
            if self.awake - complete > _SECONDS_TO_NOTICE:
                self._end_alone(lost)

    def _end_alone(self, lost: list[int]) -> None:
        text = (
            f"dist-adv: {self.who} lost another rank ({', '.join(map(str, lost))} is gone); "
            f"the launcher says why; {GOES_ON}\n"
        )
        _write(text)
        os._exit(1)

    def _end_with_stacks(self) -> None:
        text = (
            f"dist-adv: {self.who} has made no progress for {self.limit:g} s "
            f"(train.timeout_minutes); where its threads are:\n"
        )
        with suppress(OSError), tempfile.TemporaryFile("w+") as stacks:  # for faulthandler
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            text += stacks.read()
        _write(text)
        time.sleep(_SECONDS_TO_SPEAK)
        os._exit(1)


def _write(text: str) -> None:
    """Write to standard error at once, or the ranks' lines mix; its reader may be gone."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
