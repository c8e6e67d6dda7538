"""Finds a process that makes no progress, says where it hangs, and ends it."""

import faulthandler
import math
import os
import sys
import tempfile
import threading
import time

_SECONDS_TO_SPEAK = 5.0  # the first rank to leave gets the others killed: let all of them speak


class Watchdog:
    """Ends this process with the stacks of its threads after `minutes` without a `beat`.

    In training every rank waits for every other, so one that hangs makes all of them speak. While
    `pause` is on, waiting is no fault: one rank's share of an evaluation may take longer.
    """

    def __init__(self, minutes: float, rank: int, ranks: int) -> None:
        self.limit, self.who = 60 * minutes, f"rank {rank} of {ranks}"
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
        while not self.closed.wait(min(1.0, self.limit / 10)):
            if time.monotonic() - self.last > self.limit:
                self._end()

    def _end(self) -> None:
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
