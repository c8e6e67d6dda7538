"""How a command ends early; `cli.main` turns each into one line and an exit status."""

import errno

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What is wrong with a disk and not with the place on it that was named."""


GOES_ON = "the same command goes on, from the last checkpoint where there is one"
"""What to do about a run that was stopped."""


class UserError(Exception):
    """Something that the user can mend: what is wrong, which key or file, what to do. Exit 2."""


class RunFailure(Exception):
    """A run that could not go on for a reason outside the user's input. Exit 1."""


class RankFailure(RunFailure):
    """A failure of this process alone, which the others know nothing of. Exit 1."""


class LostRank(RunFailure):
    """Another process of this run is gone, so this one cannot go on either. Exit 1."""


_STATUS = {"SIGHUP": 129, "SIGINT": 130}  # 128 and the signal's number, as shells have it
STOPPED = (129, 130, 143)
"""Exit statuses of runs that were asked to stop and can go on."""


class Preempted(Exception):
    """A run that was asked to stop, and has stopped where it can go on.

    Exit 143, as a process that SIGTERM ends; 130 where a person pressed Ctrl-C; 129 where the
    terminal was closed.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = _STATUS.get(reason, 143)


SAID = (UserError, RunFailure, Preempted)
"""What has its line already."""


def unwritable(path: object, error: OSError, remedy: str) -> UserError | RunFailure:
    """Return what to raise where a command's output cannot be written to `path`."""
    reason = error.strerror or str(error)
    if error.errno in DISK_TROUBLE:
        return RunFailure(f"{path}: could not be written ({reason})")
    return UserError(f"{path}: cannot be written ({reason}); {remedy}")
