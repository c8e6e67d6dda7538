"""What a process is not allowed, as a quota or `ulimit -f` has it."""

import resource
import signal


def limited(most: int) -> None:
    """No file may get larger than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
