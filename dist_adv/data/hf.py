"""Image sets of Hugging Face's library `datasets`: of the Hub, of local files, or saved by it.

The library downloads them and keeps them as Arrow files, which are mapped. A picture's bytes are
decoded here (`image.read`), so that it has the pixels that it has in a folder.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dist_adv import packages
from dist_adv.data import fingerprint
from dist_adv.data.files import Files
from dist_adv.data.image import Framing, Unreadable
from dist_adv.data.packed import Stored
from dist_adv.data.records import Encoded
from dist_adv.errors import UserError
from dist_adv.options import Options
from dist_adv.terminal import interactive
from dist_adv.text import few, said, shown


class HfSource(Options):
    """Which images of a set, in the words of the library."""

    path: str
    """A name on the Hub, a folder that the library reads or has saved, or a .parquet file."""
    subset: str | None = None
    """The library's `name`, of a set that has several configurations."""
    revision: str | None = None
    """A commit, tag or branch on the Hub."""
    train_split: str = "train"
    """Or parts of splits, like train[:90%] or train+validation."""
    test_split: str | None = None
    """Null: test, or validation where there is no test."""
    image: str | None = None
    """The column of pictures (null: the only one of the library's Image)."""
    label: str | None = None
    """The column of labels (null: the only one of the library's ClassLabel)."""


class Rows(Encoded):
    """Pictures of a column of Arrow's, struct<bytes, path>: any thread reads any row.

    called: what a message calls the split. numbers: which rows, None for all.
    """

    key = "data.path"

    def __init__(self, column: Any, called: str, numbers: np.ndarray | None = None) -> None:
        self.column, self.called, self.numbers = column, called, numbers
        chunks = column.chunks
        self._bytes = [chunk.field("bytes") for chunk in chunks]
        self._paths = [chunk.field("path") for chunk in chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __len__(self) -> int:
        return len(self.column if self.numbers is None else self.numbers)

    def open(self, number: int) -> BinaryIO:
        chunk, place = self._place(number)
        content = self._bytes[chunk][place]
        if content.is_valid:
            return io.BytesIO(content.as_buffer())
        path = self._paths[chunk][place].as_py()
        if not path:
            raise Unreadable("has no image", "remove the row")
        return open(path, "rb")

    def name(self, number: int) -> str:
        chunk, place = self._place(number)
        path = self._paths[chunk][place].as_py()
        return f"{self.called}: row {self._row(number)}" + (f" ({shown(path)})" if path else "")

    def part(self, numbers: Sequence[int]) -> "Rows":
        some = np.asarray(numbers, dtype=np.int64)
        return Rows(self.column, self.called, some if self.numbers is None else self.numbers[some])

    def content(self, number: int) -> bytes:
        """Return the bytes of a picture. Raises UserError where they cannot be read."""
        try:
            with self.open(number) as file:
                return file.read()
        except (OSError, Unreadable) as error:
            raise self._unusable(number, error) from None

    def sizes(self) -> Iterator[int]:
        """Yield the bytes of every picture, of which no more than their number is read.

        Raises UserError for a file that is missing.
        """
        import pyarrow.compute as pc

        for start, contents, paths in zip(self._starts, self._bytes, self._paths, strict=False):
            for place, size in enumerate(pc.binary_length(contents).to_pylist()):
                if size is None and (path := paths[place].as_py()):
                    try:
                        size = os.path.getsize(path)
                    except OSError as error:
                        raise self._unusable(int(start) + place, error) from None
                yield -1 if size is None else size

    def _unusable(self, number: int, error: OSError | Unreadable) -> UserError:
        reason = getattr(error, "strerror", None) or str(error)
        return UserError(f"{self.key}: {self.name(number)}: {reason}; mend or remove it")

    def _row(self, number: int) -> int:
        return int(number if self.numbers is None else self.numbers[number])

    def _place(self, number: int) -> tuple[int, int]:
        """Return in which chunk a picture is, and where in it."""
        row = self._row(number)
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return chunk, row - int(self._starts[chunk])


def open_rows(source: HfSource, split: str, framing: Framing, workers: int) -> Stored:
    """Return a split, of which the labels and no image but the first have been read.

    Raises UserError for a set that cannot be had, and for a split or a column that it has not.
    """
    packages.need("datasets", "data.name: hf", "'dist-adv[hf]'")
    splits = _load(source)
    key = f"{split}_split"
    usual = "test" if "test" in splits or "validation" not in splits else "validation"
    chosen = getattr(source, key) or usual
    rows = _split(splits, chosen, f"data.{key}: {shown(source.path)}")
    called = f"{shown(source.path)}: {shown(chosen)}"
    if not len(rows):
        raise UserError(f"data.{key}: {called} has no images; name another split")
    image = _column(rows.features, "image", "Image", source.image)
    label = _column(rows.features, "label", "ClassLabel", source.label)
    labels, classes = _labels(rows, label, called)
    records = Rows(_encoded(rows, image), called)
    found = partial(fingerprint.of_rows, labels, classes, records.sizes, records.content)
    return Stored(Files(records, framing, workers), torch.tensor(labels), classes, found)


def _load(source: HfSource) -> Mapping[str, Any]:
    """Return the splits of a set by their names, downloaded and prepared where they are not yet.

    Raises UserError.
    """
    import datasets

    if not interactive():
        datasets.disable_progress_bars()  # in a log each would be thousands of lines
    path = Path(os.path.expanduser(source.path))
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            _check_it_is_one(source)
            saved = datasets.load_from_disk(str(path))
            return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if path.is_file():
            _check_it_is_one(source)
            return datasets.load_dataset("parquet", data_files=str(path))
        local = str(path) if path.exists() else source.path
        return datasets.load_dataset(local, source.subset, revision=source.revision)
    except UserError:
        raise
    except Exception as error:  # of the library, the Hub's, Arrow's, and of damaged files
        reason = said(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UserError(
            f"data.path: {shown(source.path)}: cannot be loaded ({reason}); name a set of the Hub, "
            f"a folder or a .parquet file; without a network, a set that was loaded here before"
        ) from error


def _check_it_is_one(source: HfSource) -> None:
    """Raise UserError for keys that a saved folder or a file makes nothing of."""
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"data.{key}: {shown(source.path)} is one set as it is; leave it out")


def _split(splits: Mapping[str, Any], chosen: str, called: str) -> Any:
    """Return the rows of a split, or of parts of splits. Raises UserError."""
    from datasets import ReadInstruction, concatenate_datasets

    try:
        sizes = {name: len(rows) for name, rows in splits.items()}
        parts = ReadInstruction.from_spec(chosen).to_absolute(sizes)
        return concatenate_datasets(
            [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
        )
    except (ValueError, AssertionError) as error:
        known = few([f"{name} ({size:,})" for name, size in sizes.items()])
        raise UserError(
            f"{called}: has no split {shown(chosen)!r}; it has {known}; name one, or a part like "
            f"{next(iter(sizes), 'train')}[90%:]"
        ) from error


def _column(features: Mapping[str, Any], key: str, kind: str, asked: str | None) -> str:
    """Return the name of a column: what is asked for, or the only one of its kind, or `key`.

    Raises UserError where there is none such.
    """
    known = [name for name, each in features.items() if type(each).__name__ == kind]
    if asked is not None:
        known = [asked]
    elif len(known) != 1:
        known = [key]
    if known[0] in features:
        return known[0]
    columns = few([f"{name} ({_kind(each)})" for name, each in features.items()], 10)
    problem = f"there is no column {shown(asked)!r}" if asked else f"no single column is {kind}"
    raise UserError(f"data.{key}: {problem}; name one of {columns}")


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _labels(rows: Any, column: str, called: str) -> tuple[list[int], list[str]]:
    """Return the label of each row, and the classes: a ClassLabel's names, or all values, sorted.

    Raises UserError for other columns, and for rows without a label.
    """
    from datasets import ClassLabel, Value

    feature, values = rows.features[column], rows.data.column(column).to_pylist()
    simple = ("int", "uint", "string", "large_string")
    if isinstance(feature, ClassLabel):
        known: Sequence[Any] = range(len(feature.names))
        classes = list(feature.names)
    elif isinstance(feature, Value) and feature.dtype.startswith(simple):
        known = sorted({value for value in values if value is not None})
        classes = [str(value) for value in known]
    else:
        raise UserError(
            f"data.label: {shown(column)} holds {_kind(feature)}, neither names nor whole numbers; "
            f"name another column"
        )
    place = {value: number for number, value in enumerate(known)}
    missing = sum(value not in place for value in values)
    if missing:
        raise UserError(
            f"data.label: {called}: {missing:,} of {len(values):,} rows have no label in "
            f"{shown(column)} (null or -1); name another split or column"
        )
    if len(classes) == 1:
        raise UserError(
            f"data.label: {called}: has a single class, {shown(classes[0])}: there is nothing to "
            f"tell apart; name another split or column"
        )
    return [place[value] for value in values], classes


def _encoded(rows: Any, column: str) -> Any:
    """Return a column of pictures as struct<bytes, path>. Raises UserError for another one."""
    import datasets

    try:
        return rows.cast_column(column, datasets.Image(decode=False)).data.column(column)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"data.image: {shown(column)} holds {_kind(rows.features[column])}, no images; name "
            f"another column"
        ) from error
