"""Standard streams: a reader that leaves, a full disk, an encoding without the letters; closed."""

import io
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_adv import cli, streams

CHILD = "from dist_adv import streams; streams.install(); import os, sys; "


def python(script: str, **arguments: object) -> subprocess.CompletedProcess[str]:
    """A process whose streams are as `arguments` of subprocess say; none of it imports torch."""
    return subprocess.run(
        [sys.executable, "-c", CHILD + script], timeout=60, text=True, **arguments
    )


def command(line: str) -> subprocess.CompletedProcess[str]:
    """dist-adv in a shell, which redirects."""
    shell = ["bash", "-c", line.replace("dist-adv", f"{sys.executable} -m dist_adv")]
    return subprocess.run(shell, capture_output=True, text=True, timeout=60)


@pytest.fixture
def broken_pipe() -> int:
    """The writing end of a pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    return write


def test_a_reader_that_left_is_no_failure(broken_pipe: int) -> None:
    script = (
        "print(streams.lost()); print('x' * 100_000); sys.stdout.flush(); "
        "print('still', streams.lost(), file=sys.stderr)"
    )
    done = python(script, stdout=broken_pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "still True\n")


def test_a_full_disk_fails_what_only_prints(tmp_path: Path) -> None:
    """Its result would be lost in silence; a command that is cut short by `head` is content."""
    full = command("dist-adv --help > /dev/full")
    assert (full.returncode, full.stdout) == (1, "")
    assert full.stderr == (
        "dist-adv: standard output: could not be written (No space left on device)\n"
    )
    head = command("dist-adv --help | true; echo ${PIPESTATUS[0]}")
    assert (head.stdout, head.stderr) == ("0\n", "")


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    gone = command(f"mkdir {tmp_path}/x; cd {tmp_path}/x; rmdir {tmp_path}/x; dist-adv status r")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert gone.stderr == "dist-adv: the current folder has been removed; cd to one that exists\n"


def test_a_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cron and containers have none, and W&B's helper would complain of that on the terminal."""
    monkeypatch.delenv("HOME")
    cli._find_home()
    assert os.environ["HOME"] == pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user whom nobody knows
    cli._find_home()
    assert Path(os.environ["HOME"]).is_dir()


def test_a_full_disk_does_not_fail_what_is_in_files_too() -> None:
    with Path("/dev/full").open("w") as full:
        done = python("streams.optional(); print('x' * 100_000)", stdout=full, stderr=full)
    assert done.returncode == 0


def test_a_pipe_that_does_not_wait_is_waited_for() -> None:
    """Another program may have set O_NONBLOCK on what is shared with it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + "print('x' * 300_000)"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    time.sleep(0.5)  # it fills the pipe meanwhile
    with open(read, "rb") as pipe:
        got = pipe.read()
    assert process.wait(60) == 0, process.communicate()[1]
    assert got == b"x" * 300_000 + b"\n"


def test_closed_streams_do_not_become_our_files(tmp_path: Path) -> None:
    """The next file to be opened would get their numbers, and what others write to them."""
    script = (
        f"file = open({str(tmp_path / 'f')!r}, 'w'); assert file.fileno() > 2; "
        "print('lost'); print('lost', file=sys.stderr); sys.stdin.read(); "
        "os.system('echo lost; echo lost >&2'); file.write('kept')"
    )
    whole = CHILD + script
    shell = ["bash", "-c", f'exec "{sys.executable}" -c "$1" <&- >&- 2>&-', "-", whole]
    assert subprocess.run(shell, timeout=60).returncode == 0
    assert (tmp_path / "f").read_text() == "kept"


def test_letters_that_the_encoding_lacks_are_escaped() -> None:
    script = "print('caf\\xe9 caf\\u2026 \\u6f22 \\udce9', sys.stdout.encoding)"
    lines = {
        encoding: python(script, env={**os.environ, "PYTHONIOENCODING": encoding}, stdout=-1).stdout
        for encoding in ("ascii", "utf-8")
    }
    assert lines == {
        "ascii": "caf\\xe9 caf. \\u6f22 \\udce9 ascii\n",
        "utf-8": "café caf… 漢 \\udce9 utf-8\n",
    }


@pytest.mark.parametrize("columns", ["0", "12", "40"])
@pytest.mark.parametrize(
    "arguments",
    [
        "doctor CONFIG",
        "plan CONFIG --gpus 1,2 --bandwidth pcie3 --step-ms 128:10,64:6",
        "status runs/one",
    ],
)
def test_tables_in_ascii(
    arguments: str, columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow ones are cut, and the mark of that is none of ASCII's."""
    config = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as patch:
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, getattr(sys, name))  # to be as they were afterwards
        streams.install()
    shown = io.BytesIO()
    text = io.TextIOWrapper(shown, encoding="ascii", errors="dist_adv", write_through=True)
    monkeypatch.setattr(sys, "stdout", text)
    assert cli._run(arguments.replace("CONFIG", str(config)).split()) in (0, 1)
    said = shown.getvalue().decode("ascii")
    assert "\\u" not in said
    assert len("".join(said.split())) > 40
