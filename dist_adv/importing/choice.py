"""What a foreign checkpoint is read as: what its file decides, and what it cannot."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_adv.config import Config
from dist_adv.errors import UserError
from dist_adv.importing.normalisation import NAMES, Normalisation, settle
from dist_adv.models import Classifier, ModelOptions
from dist_adv.models.foreign_files import Foreign, read_foreign
from dist_adv.models.foreign_keys import PUBLIC, sizes, take


@dataclass(frozen=True)
class Choice:
    """A file's weights, and the options and normalisation with which they are a network.

    options: of the section `model`.
    """

    file: Path
    foreign: Foreign
    options: Mapping[str, Any]
    normalisation: Normalisation
    channels: int
    classes: int

    def build(self, classes: list[str]) -> Classifier:
        """Return the network, in eval mode. Raises UserError naming a layer that does not fit."""
        mean, std = self.normalisation.mean, self.normalisation.std
        model = Classifier(
            {"model": dict(self.options), "mean": mean, "std": std, "classes": classes}
        )
        network = self.options["name"]
        unused = "" if self.options.get("final_norm", True) else f"{self._norm}."
        try:
            weights = take(network, model.net.state_dict(), self.foreign.weights, unused)
        except ValueError as error:
            raise UserError(
                f"{self.file}: {error}, unlike {network}; is --as the network that it is of?"
            ) from None
        model.net.load_state_dict(weights)
        return model.eval()

    def others(self) -> Iterator["Choice"]:
        """Yield what the same file may be as well: neither names nor shapes tell these apart."""
        free: dict[str, list[Any]] = {}
        if "shortcut" in self.options:
            free["shortcut"] = ["activated", "raw"]
        if "final_norm" in self.options and f"{self._norm}.weight" in self.foreign.weights:
            free["final_norm"] = [True, False]
        norms = [self.normalisation]
        if not self.normalisation.in_file:
            named = [settle(self.file, None, None, name, self.channels) for name in NAMES]
            norms += [each for each in named if each.constants != norms[0].constants]
        for values, norm in itertools.product(itertools.product(*free.values()), norms):
            options = {**self.options, **dict(zip(free, values, strict=True))}
            if options != self.options or norm is not self.normalisation:
                yield replace(self, options=options, normalisation=norm)

    @property
    def assumed(self) -> str:
        """What the file does not say, as it is typed."""
        free = [
            f"model.{key}={str(self.options[key]).lower()}"
            for key in ("shortcut", "final_norm")
            if key in self.options
        ]
        norm = [] if self.normalisation.in_file else [f"--normalise {self.normalisation}"]
        return " ".join([*free, *norm])

    @property
    def _norm(self) -> str:
        return PUBLIC[self.options["name"]].around["norm"]


def choose(file: Path, config: Config, normalise: str | None) -> Choice:
    """Read a file as the network of a configuration's section `model`.

    normalise: as --normalise has it, where it is given.

    Raises UserError for a file, an option or a normalisation that does not fit.
    """
    network = config.model.name
    foreign = read_foreign(file, f"{PUBLIC[network].around['stem']}.weight")
    try:
        found = sizes(network, foreign.weights)
    except ValueError as error:
        raise UserError(f"{file}: {error}, unlike {network}; is --as the right network?") from None
    options = _options(file, config.model, found.options)
    norm = settle(file, foreign.mean, foreign.std, normalise, found.channels)
    choice = Choice(file, foreign, options, norm, found.channels, found.classes)
    choice.build([str(label) for label in range(found.classes)])
    return choice


def _options(file: Path, given: ModelOptions, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the file decides, and else those that were given.

    Raises UserError where one that was given is another.
    """
    options = given.model_dump()
    for key in sorted(given.model_fields_set & found.keys()):
        # Whether a final norm that is there is used is not in the file.
        if options[key] != found[key] and (key, options[key]) != ("final_norm", False):
            raise UserError(
                f"{file}: is of model.{key}={str(found[key]).lower()}, not "
                f"{str(options[key]).lower()}; leave model.{key} out"
            )
    decided = {key: value for key, value in found.items() if key not in given.model_fields_set}
    return {**options, **decided}
