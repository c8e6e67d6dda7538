"""A lock on a folder, which the kernel releases when its process ends, however."""

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from dist_adv.errors import UserError

log = logging.getLogger("dist_adv")

_LOCK = ".lock"


class Lock:
    """One process writes to a run folder."""

    def __init__(self, run_dir: Path, option: str = "--run-dir") -> None:
        """option: by which the folder was named. Raises UserError where another process has it."""
        path = run_dir / _LOCK
        try:
            self.file = path.open("a+", errors="replace")
            self._take()
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            raise UserError(
                f"{run_dir}: is in use by {holder}; wait for it, or choose another {option}"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise unusable(run_dir, error, option) from None
            log.warning("%s: no locks on this file system; start no second run there", run_dir)
            return
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with suppress(OSError):  # on a full disk the lock holds and does not say whose it is
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), holder.encode())

    def _take(self) -> None:
        for patience in (0.1, 0.0):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not patience:
                    raise
                time.sleep(patience)  # `held` looks for an instant

    def release(self) -> None:
        with suppress(OSError):  # a full or read-only disk
            self.file.truncate(0)
        self.file.close()


def held(run_dir: Path) -> bool | None:
    """Tell whether a process has this folder; None where the file system has no locks."""
    try:
        with (run_dir / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return False


def unusable(run_dir: Path, error: OSError, option: str = "--run-dir") -> UserError:
    """Return the complaint about a folder that `option` has named."""
    reason = error.strerror or str(error)
    return UserError(f"{run_dir}: cannot be a run folder ({reason}); choose another {option}")
