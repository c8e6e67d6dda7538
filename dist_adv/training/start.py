"""The weights that training starts from where they are not fresh: `train.start`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_adv import files
from dist_adv.config import Config
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.models import Classifier, describe, read_weights, weights_file


@dataclass(frozen=True)
class Start:
    """A network to start from. sha256: of its file."""

    path: Path
    sha256: str | None
    architecture: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation a channel."""
        return self.architecture["mean"], self.architecture["std"]

    def put_into(self, model: Classifier) -> None:
        """Give a network these weights. Raises UserError where they are not its own."""
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            problem = str(error).splitlines()[1].strip()[:200]  # torch names every tensor
            raise UserError(
                f"train.start: {self.path}: weights do not fit their architecture ({problem}); "
                f"restore the file"
            ) from None


def read_start(config: Config, data: Dataset) -> Start | None:
    """Return what `train.start` names, None where nothing.

    Raises UserError for a file that is none, or is of another network than the configuration's.
    """
    if config.train.start is None:
        return None
    path = weights_file(config.train.start)
    try:
        architecture, weights = read_weights(path)
    except UserError as error:
        raise UserError(f"train.start: {error}") from None
    differences = list(_differences(architecture, config, data))
    if differences:
        raise UserError(
            f"train.start: {path} is of another network ({'; '.join(differences)}); configure its "
            f"own, or start from another"
        )
    return Start(path, files.sha256(path), architecture, weights)


def _differences(architecture: dict[str, Any], config: Config, data: Dataset) -> Iterator[str]:
    """Yield `key: there, here` for whatever keeps weights from fitting."""
    theirs, ours = architecture["model"], describe(config.model, data.images.shape[2:])
    for key in sorted((theirs.keys() | ours.keys()) - {"pretrained"}):  # was where it started
        if theirs.get(key) != ours.get(key):
            yield f"model.{key}: {theirs.get(key)} there, {ours.get(key)} here"
    for what, there, here in (
        ("channels", len(architecture["mean"]), data.images.shape[1]),
        ("classes", len(architecture["classes"]), len(data.classes)),
    ):
        if there != here:
            yield f"{what}: {there} there, {here} in {config.data.name}"
