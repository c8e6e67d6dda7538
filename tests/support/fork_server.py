"""Forks a process for each command that it is asked to run: Python has imported torch by then.

Run by `forked.py`, with the number of a socket that listens. What comes out is a process like any
other: with a number, a folder, variables, signals and standard streams of its own, and dist_adv is
imported in it from its files. Only what was imported from elsewhere is there already, which takes
most of four seconds otherwise. Processes that such a process starts are forked as well: torchrun's
ranks, and the runs of a sweep. The code of torchrun and of `accelerate launch` is the real one.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import logging
import multiprocessing.util
import os
import pickle
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
# What takes seconds to import; what else dist_adv imports is found out.
HEAVY = (
    *("torch", "torch._dynamo", "torch.distributed.run", "torchvision", "torch.profiler"),
    *("accelerate", "accelerate.commands.launch", "wandb", "matplotlib.pyplot", "sklearn.datasets"),
)
TORCHRUN = "torch.distributed.run"
MODULES = ("dist_adv", "dist_adv.testing", "faulty", TORCHRUN, "accelerate.commands.launch")
# Read while Python starts or while something is imported: a forked process would not heed them.
READ_EARLY = ("PYTHON", "LC_", "LANG", "OMP_", "MKL_", "LD_", "TORCH_LOGS", "MALLOC_", "HF_")
CHILDS_ENDS = ("p2cread", "c2pwrite", "errwrite")
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_base_path: list[str] = []
_started_with: dict[str, str] = {}  # of READ_EARLY
_kept: list[Any] = []  # streams that would close a descriptor if they were collected


# --- which commands can be forked -----------------------------------------------------------------


def program(
    asked: Mapping[str, Any], env: Mapping[str, str], started_with: Mapping[str, str]
) -> tuple[str, list[str]] | None:
    """What Python would run (`-m NAME`, `-c TEXT` or a file), its arguments; None for another way.

    asked: the arguments of `Popen._execute_child`.
    """
    args, cwd = asked["args"], asked["cwd"]
    plain = isinstance(args, list | tuple) and not asked["shell"] and asked["executable"] is None
    if not plain or (cwd is not None and not os.path.isdir(cwd)):
        return None
    words = list(map(os.fspath, args))
    if words[0] != sys.executable or early(env, cwd) != started_with:
        return None
    words = words[2:] if words[1:2] == ["-u"] else words[1:]
    if words[:1] == ["-m"] and len(words) > 1 and words[1] in MODULES:
        return f"-m {words[1]}", words[2:]
    if words[:1] == ["-c"] and len(words) > 1:
        return f"-c {words[1]}", words[2:]
    return (words[0], words[1:]) if words and words[0].endswith(".py") else None


def early(env: Mapping[str, str], cwd: Any = None) -> dict[str, str]:
    """Variables that must be those of the server; of PYTHONPATH what would run at the start.

    Debian has a sitecustomize among Python's own files, which the server has run, too.
    """
    found = {name: value for name, value in env.items() if name.startswith(READ_EARLY)}
    found |= {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1")}
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTEST_VERSION"):
        found.pop(name, None)
    places = {*env.get("PYTHONPATH", "").split(os.pathsep)} - {"", sysconfig.get_path("stdlib")}
    if any(Path(cwd or ".", place, "sitecustomize.py").exists() for place in places):
        found["PYTHONPATH"] = env["PYTHONPATH"]
    return found


# --- the process that is forked -------------------------------------------------------------------


def become(
    what: tuple[str, list[str]],
    env: Mapping[str, str],
    asked: Mapping[str, Any],
    fds: Sequence[int],
) -> NoReturn:
    """Be the process that was asked for, to its end."""
    status = 255
    try:
        if asked["start_new_session"]:
            os.setsid()
        forget_signals()
        give_descriptors(fds, asked["pass_fds"])
        if asked["cwd"] is not None:
            os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(env)
        show_rank()
        if asked["preexec_fn"]:
            asked["preexec_fn"]()
        forget_exit()
        forget_ours()
        open_streams()
        status = run(what)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def forget_signals() -> None:
    """As after exec: what was handled is not, what was ignored still is."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def give_descriptors(fds: Sequence[int], keep: Sequence[int]) -> None:
    """0, 1 and 2 are those given, -1 for what is to stay; all others are closed but `keep`."""
    high = [fd if fd < 0 else os.dup(fd) for fd in fds]  # none of them is below 3
    for number, fd in enumerate(high):
        if fd >= 0:
            os.dup2(fd, number)
    above = 3
    for fd in sorted(keep):
        os.closerange(above, fd)
        above = fd + 1
    os.closerange(above, 1 << 16)


def forget_ours() -> None:
    """What dist_adv and these tests' modules have left behind, where a process forks another."""
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    logging.getLogger("dist_adv").handlers.clear()
    logging.getLogger("dist_adv").propagate = True
    tempfile.tempdir = None
    # The other's Accelerator and its precision, which is bf16 on some CPUs.
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def forget_exit() -> None:
    """What the other process would do at its end, such as removing folders that are in use."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)


def is_ours(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None) or ""
    return name != "__main__" and file.startswith(f"{ROOT}{os.sep}") and ".venv" not in file


def open_streams() -> None:
    """As Python opens them, None for one that is closed."""
    _kept.extend([sys.stdin, sys.stdout, sys.stderr])
    names = ("stdin", "stdout", "stderr")
    for fd, name in enumerate(names):
        stream = None
        with suppress(OSError):
            os.fstat(fd)
            stream = text_stream(fd, getattr(sys, f"__{name}__"))
        setattr(sys, name, stream)


def text_stream(fd: int, like: Any) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "r" if fd == 0 else "w", closefd=False)
    buffer = io.BufferedReader(raw) if fd == 0 else io.BufferedWriter(raw)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    return io.TextIOWrapper(
        buffer,
        encoding=like.encoding,
        errors="backslashreplace" if fd == 2 else like.errors,
        line_buffering=fd == 2 or raw.isatty(),
        write_through=unbuffered,
    )


def run(what: tuple[str, list[str]]) -> int:
    """Run a module or a script and return what the interpreter's exit status would be."""
    name, arguments = what
    module = name.removeprefix("-m ") if name.startswith("-m ") else None
    text = name.removeprefix("-c ") if name.startswith("-c ") else None
    first = os.getcwd() if module else "" if text else str(Path(name).resolve().parent)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [first, *filter(None, path), *_base_path]
    importlib.invalidate_caches()
    sys.argv = [name[:2] if module or text else name, *arguments]
    subprocess.Popen = Forking  # type: ignore[misc]
    status = 0
    try:
        fork_ranks()
        if module == TORCHRUN:
            importlib.import_module(TORCHRUN).main(arguments)
        elif module:
            warnings.filterwarnings("ignore", "'.*' found in sys.modules after", RuntimeWarning)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        elif text:
            exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as stop:
        status = exit_status(stop)
    except KeyboardInterrupt:
        complain()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        complain()
        status = 1
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    return status


def exit_status(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def complain() -> None:
    """The traceback of what was not caught, from where the program begins."""
    kind, error, trace = sys.exc_info()
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(kind, error.with_traceback(trace), trace)  # type: ignore[arg-type, union-attr]


def fork_ranks() -> None:
    """Let torchrun, should this be it or call it, fork its ranks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Forking  # type: ignore[misc]


class Forking(subprocess.Popen):
    """Forks this process for a command that can be forked.

    Also where it has threads, as torchrun has, and whoever shows progress: they hold nothing that
    the new process needs, which imports dist_adv anew and has streams of its own.
    """

    def _execute_child(self, *given: Any) -> None:
        asked = _SIGNATURE.bind(self, *given).arguments
        env = os.environ.copy() if asked["env"] is None else asked["env"]
        what = program(asked, env, _started_with)
        if what is None:
            super()._execute_child(*given)
            return
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        with warnings.catch_warnings(action="ignore"):  # of 3.12 and later, about threads
            self.pid = os.fork()
        if not self.pid:
            become(what, env, asked, [asked[name] for name in CHILDS_ENDS])
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in PIPES))  # type: ignore[attr-defined]


def show_rank() -> None:
    """As /proc/PID/comm: /proc/PID/environ has the variables of the server."""
    if "RANK" in os.environ:
        name = f"rank-{os.environ['RANK']}".encode()
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME


# --- the server -----------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    """Until everyone who has come is gone; what still runs then is killed."""
    heard, wake = os.pipe()
    os.set_blocking(heard, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    children: dict[int, socket.socket] = {}
    clients = [listener.accept()[0]]
    while clients:
        ready, _, _ = select.select([heard, listener, *clients], [], [])
        if heard in ready:
            with suppress(BlockingIOError):
                os.read(heard, 4096)
            report_ended(children)
        if listener in ready:
            clients.append(listener.accept()[0])
        for client in [client for client in clients if client in ready]:
            if not take(client, children):
                clients.remove(client)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def take(client: socket.socket, children: dict[int, socket.socket]) -> bool:
    """Fork for one request, whose descriptors are the report and the standard streams.

    False where the client is gone.
    """
    message, fds, _, _ = socket.recv_fds(client, 1 << 20, 64)
    if not message:
        return False
    request = pickle.loads(message)
    report = socket.socket(fileno=fds[0])
    keep = dict(zip(request["pass_fds"], fds[4:], strict=True))
    pid = os.fork()
    if not pid:
        asked = request | {"preexec_fn": None, "pass_fds": move(keep)}
        if request["preexec_fn"]:
            sys.path.insert(0, str(SUPPORT))
            asked["preexec_fn"] = pickle.loads(request["preexec_fn"])
        become(request["what"], request["env"], asked, fds[1:4])
    children[pid] = report
    for fd in fds[1:]:
        os.close(fd)
    report.sendall(b"%d\n" % pid)
    return True


def move(keep: Mapping[int, int]) -> list[int]:
    """Give descriptors the numbers that they have where they come from."""
    high = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, 1 << 12) for number, fd in keep.items()}
    for number, fd in high.items():
        os.dup2(fd, number)
    return list(keep)


def report_ended(children: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if report := children.pop(pid, None):
                with suppress(OSError):
                    report.sendall(b"%d\n" % status)
                report.close()


def of_others() -> list[str]:
    """The modules, not its own, that all of dist_adv imports; found out in a process that ends."""
    heard, tell = os.pipe()
    if not os.fork():
        try:
            package = importlib.import_module("dist_adv")
            for each in pkgutil.walk_packages(package.__path__, "dist_adv."):
                if not each.name.endswith("__main__"):
                    importlib.import_module(each.name)
            names = [name for name in sys.modules if not is_ours(name)]
            os.write(tell, "\n".join(names).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with os.fdopen(heard) as names_of_all:
        return names_of_all.read().split()


def main() -> None:
    _started_with.update(early(os.environ))  # before torch sets some itself
    sys.path[:] = [path for path in sys.path if Path(path) not in (SUPPORT, ROOT)]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    _base_path.extend(path for path in sys.path if path not in given)
    sys.path.insert(0, str(ROOT))
    for name in HEAVY:
        importlib.import_module(name)
    for name in of_others():
        with suppress(Exception):
            importlib.import_module(name)
    os.waitpid(-1, 0)
    _base_path.append(str(ROOT))
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
