"""Standard input, output and error that a run can rely on: open, in any encoding, never a failure.

A process inherits them, and they may be anything: closed, a pipe whose reader has left
(`| head`), a terminal that is gone, a full disk, ASCII.
"""

import codecs
import errno
import io
import os
import select
import sys
from typing import Any

# No reader any more: a pipe's has left, a terminal was closed.
_GONE = (errno.EPIPE, errno.EIO)
_ERRORS = "dist_adv"  # the name of `_in_ascii` among the codecs' error handlers


class _Standard(io.FileIO):
    """Standard output or error, whose text is lost where nobody reads it; `lost` says whether.

    What else keeps it from being written (a full disk) is raised, unless `optional`.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.lost, self.optional = False, fd == 2

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program's O_NONBLOCK
                select.select([], [self], [])
        except OSError as error:
            if not (self.optional or error.errno in _GONE):
                raise OSError(error.errno, error.strerror, "standard output") from None
            self.lost = True
            return len(data)
        return written


def install() -> None:
    """Make sys.stdin, stdout and stderr such streams, whatever this process has been given."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file to be opened would get the number, and our lines
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False))
    codecs.register_error(_ERRORS, _in_ascii)
    sys.stdout, sys.stderr = _text(1, sys.stdout), _text(2, sys.stderr)
    if os.environ.get("COLUMNS", "").strip("0") == "":  # some pseudo-terminals' 0: nothing is shown
        os.environ.pop("COLUMNS", None)


def optional() -> None:
    """From now on what is printed is in files too: none of it is worth a failure."""
    for stream in (sys.stdout, sys.stderr):
        if raw := _raw(stream):
            raw.optional = True


def lost() -> bool:
    """Tell whether the reader of standard output has left."""
    raw = _raw(sys.stdout)
    return raw is not None and raw.lost


def _text(fd: int, given: Any) -> io.TextIOWrapper:
    """Return a text stream over `fd` in the encoding of the one that Python has made, if any."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Standard(fd)),
        encoding=given.encoding if given else "utf-8",
        errors=_ERRORS,
        line_buffering=given is None or given.line_buffering or given.write_through,
    )


def _raw(stream: Any) -> _Standard | None:
    """Return what is below a stream of `install`; None for any other, as in tests and notebooks."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Standard) else None


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Return an error handler of codecs: what a stream cannot encode, escaped.

    The mark of text that a table has cut keeps its width of one, or the columns would shift.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].replace("\N{HORIZONTAL ELLIPSIS}", ".")
    return text.encode("ascii", "backslashreplace").decode(), error.end
