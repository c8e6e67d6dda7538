"""Data sets as uint8 tensors, and the loader that keeps them on the device."""

from dist_adv.data.datasets import (
    GROUP,
    MIRRORED,
    RESIZING,
    DataOptions,
    Dataset,
    data_root,
    load_dataset,
    of_tensors,
    place_key,
)
from dist_adv.data.fingerprint import Fingerprints, what_changed
from dist_adv.data.loader import Batch, Loader, When

__all__ = [
    "GROUP",
    "MIRRORED",
    "RESIZING",
    "Batch",
    "DataOptions",
    "Dataset",
    "Fingerprints",
    "Loader",
    "When",
    "data_root",
    "load_dataset",
    "of_tensors",
    "place_key",
    "what_changed",
]
