"""The normalisation of a foreign network: in its file, or as --normalise says."""

from dataclasses import dataclass
from pathlib import Path

from dist_adv.data.datasets import STATISTICS
from dist_adv.errors import UserError
from dist_adv.text import nearest

NAMES = ("none", *STATISTICS)
_TOLERANCE = 1e-3  # of constants that were rounded, to half precision or in a paper


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation a channel. in_file: they were found beside the weights."""

    mean: list[float]
    std: list[float]
    name: str = ""
    in_file: bool = False

    def __str__(self) -> str:
        parts = (self.mean, self.std)
        return self.name or ":".join(",".join(f"{each:.4g}" for each in part) for part in parts)

    @property
    def constants(self) -> list[float]:
        return [*self.mean, *self.std]


def settle(
    file: Path,
    mean: list[float] | None,
    std: list[float] | None,
    option: str | None,
    channels: int,
) -> Normalisation:
    """Return the normalisation of a file that has `mean` and `std` in it, or else of `option`.

    Raises UserError where neither says it, or the option says another than the file.
    """
    given = _parse(option, channels) if option is not None else None
    if mean is None or std is None:
        if given is None:
            raise UserError(
                f"--normalise: missing, and {file} does not say how images are normalised; give "
                f"one of {', '.join(NAMES)} or MEAN:STD"
            )
        return given
    means, stds = (_per_channel(values, channels, str(file)) for values in (mean, std))
    found = Normalisation(means, stds, in_file=True)
    if not all(each > 0 for each in stds):
        raise UserError(f"{file}: has a standard deviation that is not above 0 in it ({found})")
    if given:
        pairs = zip(given.constants, found.constants, strict=True)
        if any(abs(one - other) > _TOLERANCE for one, other in pairs):
            raise UserError(
                f"--normalise: {option} is not what {file} has in it ({found}); leave it out"
            )
    return found


def _parse(option: str, channels: int) -> Normalisation:
    """Return what --normalise says. Raises UserError for what says nothing."""
    if option == "none":
        return Normalisation([0.0] * channels, [1.0] * channels, option)
    if option in STATISTICS:
        mean, std = STATISTICS[option]
    else:
        try:
            mean, std = ([float(each) for each in part.split(",")] for part in option.split(":"))
        except ValueError:
            raise UserError(
                f"--normalise: {option!r} is not known, and no MEAN:STD such as "
                f"0.49,0.48,0.45:0.25,0.24,0.26{nearest(option, NAMES)}"
            ) from None
    means, stds = (_per_channel(values, channels, "--normalise") for values in (mean, std))
    if not all(0 <= each <= 1 for each in means) or not all(0 < each <= 1 for each in stds):
        raise UserError(f"--normalise: {option} is not in pixel units of [0, 1]; divide by 255")
    return Normalisation(means, stds, option if option in STATISTICS else "")


def _per_channel(values: list[float], channels: int, source: str) -> list[float]:
    if len(values) not in (1, channels):
        raise UserError(
            f"{source}: normalises {len(values)} channels and the network takes {channels}; give "
            f"one number, or one a channel"
        )
    return values * channels if len(values) == 1 else values
