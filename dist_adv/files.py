"""Files of a run folder: JSON lines that grow, files and folders that are written whole."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dist_adv.errors import RunFailure, UserError, unwritable

Record = dict[str, Any]
_BLOCK = 1 << 16


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line. Raises RunFailure where the disk refuses."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunFailure(f"{path}: could not be written ({error.strerror})") from error


def replace(path: Path, content: bytes, writer: str = "") -> None:
    """Replace a file by the whole new one, or leave the old one where the process is killed.

    writer: tells apart those that may write this file at once.

    Raises RunFailure where the disk refuses, having left nothing.
    """
    partial = path.with_name(f".partial-{path.name}{writer}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunFailure(f"{path}: could not be written ({error.strerror})") from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes `out` when all went well, and is removed otherwise.

    Raises UserError where `out` exists or cannot be made; RunFailure where the disk refuses.
    """
    partial = out.with_name(f".partial-{out.name}") if out.name else out
    try:
        if out.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except BaseException as error:
        if partial != out:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(out, error, "choose a new folder") from None
        raise


def sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file's bytes; None where they cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def output_file(path: Path, option: str, own: Callable[[bytes], bool]) -> Path:
    """Return where to write the file that an option names, links followed.

    own: tells by its content whether a file is an earlier output of the same command. Raises
    UserError for anything else that is there, and for a folder that cannot be written to.
    """
    try:
        place = path.resolve(strict=False)
        if place.is_symlink() or (place.exists() and not place.is_file()):
            raise UserError(f"{option}: {path} is no regular file; name another file")
        if place.exists():
            if not own(place.read_bytes()):
                raise UserError(f"{option}: {path} exists and is not overwritten; name another")
        elif not place.parent.is_dir():
            raise UserError(f"{option}: {path.parent} is no folder; make it, or name another file")
        if not os.access(place.parent, os.W_OK):
            raise UserError(f"{option}: {path.parent} cannot be written to; name another file")
    except (OSError, RuntimeError) as error:  # links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise UserError(f"{option}: {path} cannot be a file ({reason}); name another") from None
    return place


def drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process may have left, or the next one would join it.

    A whole one, as editors leave it, gets its line end.
    """
    with suppress(FileNotFoundError):
        last = next(backwards(path), b"\n")
        if last.endswith(b"\n"):
            return
        try:
            json.loads(last)
        except (ValueError, RecursionError):
            os.truncate(path, path.stat().st_size - len(last))
        else:
            with path.open("ab") as file:
                file.write(b"\n")


def backwards(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file from its last to its first, each with its line end.

    Only as much is read as is asked for: a long run logs hundreds of megabytes.
    """
    with path.open("rb") as file:
        start, size = file.seek(0, os.SEEK_END), _BLOCK
        rest = b""  # the end of a line that begins further up
        while start:
            start, end = max(0, start - size), start
            file.seek(start)
            rest, *lines = BytesIO(file.read(end - start) + rest)
            yield from reversed(lines)
            size = _BLOCK if lines else 2 * size  # a line without end takes no quadratic time
        if rest:
            yield rest


def read(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the objects of the file with their line numbers; none if there is no such file.

    A half last line is passed over. Raises UserError naming any other line that is no object.
    """
    try:
        # A write cut short can end inside a character, hence bytes: only whole lines must decode.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # brackets without end
                    if not any(rest.strip() for rest in file):
                        return  # the process was killed while it wrote this line
                    raise UserError(
                        f"{path}: line {number} is not valid JSON ({error}); remove the line"
                    ) from None
                if not isinstance(record, dict):
                    raise UserError(f"{path}: line {number} is not a JSON object; remove the line")
                yield number, record
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def check(record: Record, kind: TypeAdapter[Any], path: Path, number: int) -> None:
    """Raise UserError where a line lacks what its reader needs, or has it as something else."""
    try:
        kind.validate_python(record, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        return
    missing = [
        str(each["loc"][0])
        for each in problems
        if (each["type"], len(each["loc"])) == ("missing", 1)
    ]
    if missing:
        what = f"lacks {', '.join(missing)}"
    else:
        where = ".".join(map(str, problems[0]["loc"]))
        what = f"is no such record ({where}: {problems[0]['msg'].lower()})"
    raise UserError(f"{path}: line {number} {what}; remove the line")
