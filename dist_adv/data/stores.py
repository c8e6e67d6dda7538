"""Packs in object stores and on web servers, through fsspec: read by position, never copied whole.

fsspec knows the stores, their credentials and when to try again. It comes with torch; the packages
of some stores (s3fs, gcsfs, aiohttp for http) do not.
"""

import errno
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from dist_adv.data.image import Unreadable
from dist_adv.data.records import Shards
from dist_adv.errors import UserError
from dist_adv.text import said, shown

REMEDY = "check the address, the network and your credentials"


def is_store(root: str) -> bool:
    """Tell an address from the path of a folder."""
    return "://" in root


@dataclass(frozen=True)
class StorePath:
    """A file or folder of a store, with what a pack needs of pathlib's Path.

    Whatever goes wrong with it is an OSError whose strerror says it on one line.
    """

    store: Any
    path: str
    address: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.store, f"{self.path}/{name}", f"{self.address}/{name}")

    def __str__(self) -> str:
        return self.address

    def exists(self) -> bool:
        try:
            self.size()
        except OSError:
            return False
        return True

    def size(self) -> int | None:
        """Return the bytes of a file; None where the store does not say."""
        return self._ask(self.store.size)

    def read_bytes(self) -> bytes:
        return self._ask(self.store.cat_file)

    def read_range(self, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start` on."""
        # A file that fsspec opens reads on for 5 MB. Stores that answer many requests at a time
        # (s3, http) open none for this.
        exactly = {} if self.store.async_impl else {"cache_type": "none"}
        content = self._ask(self.store.cat_file, start=start, end=start + length, **exactly)
        if len(content) != length:
            text = f"{len(content):,} bytes came for {length:,}; does the server know ranges?"
            raise OSError(errno.EIO, text)
        return content

    def sha256(self) -> str:
        def digest(path: str) -> str:
            with self.store.open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self._ask(digest)

    def _ask(self, question: Callable[..., Any], **given: Any) -> Any:
        try:
            return question(self.path, **given)
        except FileNotFoundError as error:
            # http says so where the server is not there, too, with the reason as its cause.
            reason = error.__cause__
            text = said(reason) if isinstance(reason, Exception) else "no such file"
            raise FileNotFoundError(errno.ENOENT, text) from error
        except Exception as error:  # each store has errors of its own
            raise OSError(errno.EIO, said(error)) from error


def open_store(root: str) -> StorePath:
    """Return the folder at an address.

    Raises UserError where fsspec does not know such stores, or lacks a package for them.
    """
    from fsspec.core import url_to_fs

    address = root.rstrip("/")
    try:
        store, path = url_to_fs(address)
    except ImportError as error:
        module = getattr(error.__cause__, "name", None)
        remedy = f"pip install {module}" if module else REMEDY
        raise UserError(f"data.root: {shown(root)}: {said(error)}; {remedy}") from error
    except Exception as error:
        raise UserError(f"data.root: {shown(root)}: {said(error)}; {REMEDY}") from error
    return StorePath(store, path.rstrip("/"), address)


class StoreShards(Shards):
    """Pictures in tar files of a store, each of which is one request; threads ask side by side."""

    def open(self, number: int) -> BinaryIO:
        try:
            return super().open(number)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})", REMEDY) from None

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        return self.paths[shard].read_range(offset, length)
