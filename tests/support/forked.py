"""`subprocess.Popen` and `run` for tests: a forked process where the command can be forked.

See `fork_server.py`, of which all of pytest's workers have one. What a forked process cannot show
is left to one that is started, without a word: other commands than Python's, a `sitecustomize`,
variables that are read while Python or torch starts. Where a test is about that start, it says
`subprocess`. With REAL_PROCESSES in the environment nothing is forked.
"""

import functools
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fork_server
from fork_server import CHILDS_ENDS, PIPES, early, program

_SIGNATURE = fork_server._SIGNATURE


class _Server:
    """The process: whoever needs it first starts it, and it ends when all have ended."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.started_with = early(env)
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        # Of no file: it is gone with the server.
        address = f"\0fork-server-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener, suppress(OSError):  # another worker was here
            listener.bind(address)
            listener.listen()
            _start(listener.fileno(), env)
        end = time.monotonic() + 10
        while self.control.connect_ex(address):  # bound, and not listening yet
            if time.monotonic() > end:
                raise ChildProcessError("there is no fork server; see what it wrote")
            time.sleep(0.01)


def _start(listener: int, env: dict[str, str]) -> None:
    """Start the server and do not wait until it has imported everything."""
    server = subprocess.Popen(
        [sys.executable, str(Path(fork_server.__file__)), str(listener)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=env,
        pass_fds=[listener],
        start_new_session=True,
    )
    server.returncode = 0  # it may outlive this process, which nobody needs to be told


@functools.cache
def _server() -> _Server:
    return _Server()


class Popen(subprocess.Popen):
    """As subprocess's. `forked` says which kind it has become."""

    forked = False

    def _execute_child(self, *given: Any) -> None:
        asked = dict(_SIGNATURE.bind(self, *given).arguments)
        env = dict(os.environ if asked["env"] is None else asked["env"])
        forking = not os.environ.get("REAL_PROCESSES")
        what = program(asked, env, _server().started_with) if forking else None
        prepare = _pickled(asked["preexec_fn"])
        if what is None or prepare is None:
            super()._execute_child(*given)
            return
        wanted = {name: asked[name] for name in ("start_new_session", "pass_fds")}
        wanted |= {"what": what, "env": env, "preexec_fn": prepare}
        wanted["cwd"] = os.path.abspath(asked["cwd"] or ".")
        streams = [
            number if asked[name] < 0 else asked[name] for number, name in enumerate(CHILDS_ENDS)
        ]
        self._ask(wanted, [*streams, *asked["pass_fds"]])
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in PIPES))  # type: ignore[attr-defined]

    def _ask(self, wanted: dict[str, Any], fds: list[int]) -> None:
        self.report, theirs = socket.socketpair()
        with theirs:
            message = pickle.dumps(wanted)
            socket.send_fds(_server().control, [message], [theirs.fileno(), *fds])
        self.said = b""
        self.forked = True
        self.pid = self._line(True)

    def _line(self, block: bool) -> int | None:
        """The next number from the server; None where there is none yet."""
        while b"\n" not in self.said:
            if not block and not select.select([self.report], [], [], 0)[0]:
                return None
            more = self.report.recv(64)
            if not more:
                raise ChildProcessError("the fork server has ended; see what it wrote")
            self.said += more
        line, self.said = self.said.split(b"\n", 1)
        return int(line)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if not self.forked:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        status = self._line(block=not wait_flags & os.WNOHANG)
        if status is None:
            return 0, 0
        self.report.close()
        return self.pid, status

    def _internal_poll(self, *given: Any, **more: Any) -> int | None:
        if not self.forked:
            return super()._internal_poll(*given, **more)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _pickled(prepare: Any) -> bytes | None:
    """None where it cannot be."""
    try:
        return pickle.dumps(prepare) if prepare else b""
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def run(
    command: Any,
    capture_output: bool = False,
    input: Any = None,
    timeout: float | None = None,
    check: bool = False,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """As subprocess's."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        more["stdin"] = subprocess.PIPE
    with Popen(command, **more) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
