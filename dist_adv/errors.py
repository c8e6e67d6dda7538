"""How a command ends early; `cli.main` turns each into one line and an exit status."""

import errno

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What is wrong with a disk and not with the place on it that was named."""


class UserError(Exception):
    """Something that the user can mend: what is wrong, which key or file, what to do. Exit 2."""


class RunFailure(Exception):
    """A run that could not go on for a reason outside the user's input. Exit 1."""


class RankFailure(RunFailure):
    """A failure of this process alone, which the others know nothing of. Exit 1."""


class LostRank(RunFailure):
    """Another process of this run is gone, so this one cannot go on either. Exit 1."""


class Preempted(Exception):
    """A run that was asked to stop, and has stopped where it can go on.

    Exit 143, as a process that SIGTERM ends; 130 where a person pressed Ctrl-C.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = 130 if reason == "SIGINT" else 143


def unwritable(path: object, error: OSError, remedy: str) -> UserError | RunFailure:
    """Return what to raise where a command's output cannot be written to `path`."""
    reason = error.strerror or str(error)
    if error.errno in DISK_TROUBLE:
        return RunFailure(f"{path}: could not be written ({reason})")
    return UserError(f"{path}: cannot be written ({reason}); {remedy}")
