"""Finds a process that makes no progress or has lost another, says so, and ends it."""

import faulthandler
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

_SECONDS_TO_SPEAK = 5.0  # the first rank to leave gets the others killed: let all of them speak
_SECONDS_TO_NOTICE = 5.0  # a broken connection is noticed by whoever waits for it, but not always


class Watchdog:
    """Ends this process with the stacks of its threads after `minutes` without a `beat`.

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
        self.last = math.inf
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        self.last = time.monotonic()

    def pause(self) -> None:
        self.last = math.inf

    def close(self) -> None:
        self.closed.set()

    def _watch(self) -> None:
        complete = time.monotonic()
        while not self.closed.wait(min(1.0, self.limit / 10)):
            now = time.monotonic()
            if now - self.last > self.limit:
                self._end_with_stacks()
            lost = [rank for rank, pid in self.others.items() if not _exists(pid)]
            complete = complete if lost else now
            if now - complete > _SECONDS_TO_NOTICE:
                self._end_alone(lost)

    def _end_alone(self, lost: list[int]) -> None:
        text = (
            f"dist-adv: {self.who} lost another rank ({', '.join(map(str, lost))} is gone); "
            f"the launcher says why; the same command goes on from the last checkpoint\n"
        )
        os.write(sys.stderr.fileno(), text.encode())
        os._exit(1)

    def _end_with_stacks(self) -> None:
        with tempfile.TemporaryFile("w+") as stacks:  # faulthandler wants a real file
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            text = (
                f"dist-adv: {self.who} has made no progress for {self.limit:g} s "
                f"(train.timeout_minutes); where its threads are:\n{stacks.read()}"
            )
        os.write(sys.stderr.fileno(), text.encode())  # at once, or the ranks' lines mix
        time.sleep(_SECONDS_TO_SPEAK)
        os._exit(1)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
