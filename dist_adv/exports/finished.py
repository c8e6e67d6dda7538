"""What an export is made of: a finished run, and what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.models import Classifier, is_somebodys, load_model, read_final
from dist_adv.runs import reading
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.reading import Evaluation
from dist_adv.runs.run import read_examples


@dataclass(frozen=True)
class Asked:
    """Options of single formats. name: RobustBench's; license and repository: the Hub's."""

    name: str = ""
    license: str | None = None
    repository: str | None = None


@dataclass(frozen=True)
class Finished:
    """A run whose training is over."""

    folder: RunFolder
    architecture: Mapping[str, Any]  # the metadata of its weights
    figures: Mapping[str, Evaluation]  # by attack

    @property
    def title(self) -> str:
        """What the model is called where it has no name."""
        trained = self.architecture["trained"]
        name = self.architecture["model"]["name"]
        return f"{name}, {trained['method']} training on {trained['data']}"

    def model(self) -> Classifier:
        """Return the network as `load_model` does, also one of somebody's own."""
        if is_somebodys(self.architecture["model"]["name"]):
            load_config(self.folder.config)  # which imports it
        return load_model(self.folder.path)

    def config(self) -> Mapping[str, Any]:
        """Return what config.yaml holds."""
        return reading.read_config(self.folder.path)

    def image(self) -> tuple[int, int, int]:
        """Return (C, H, W) of its images. Raises UserError where no evaluation has left any."""
        examples = read_examples(self.folder.examples)
        if examples is None:
            raise UserError(
                f"{self.folder.examples}: missing, and nothing else tells the size of an image; "
                f"dist-adv eval {self.folder} --attacks fgsm writes it"
            )
        channels, height, width = examples.clean.shape[1:]
        return channels, height, width


def read_finished(run_dir: Path) -> Finished:
    """Read a run folder. Raises UserError where it has no final weights, or files are damaged."""
    folder = RunFolder(run_dir)
    architecture = read_final(folder.weights)
    threat, dataset = architecture["threat"], architecture["trained"]["data"]
    return Finished(folder, architecture, reading.read_results(run_dir, threat, dataset).figures)
