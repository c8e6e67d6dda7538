"""What a process is given before it begins: a limit as `ulimit -f` sets it, a terminal."""

import fcntl
import resource
import signal
import termios


def limited(most: int) -> None:
    """No file may get larger than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def own_terminal(hangup: signal.Handlers) -> None:
    """Standard input is the terminal of this session, of whose end it is told."""
    fcntl.ioctl(0, termios.TIOCSCTTY)
    signal.signal(signal.SIGHUP, hangup)
