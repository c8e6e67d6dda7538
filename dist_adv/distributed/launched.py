"""What a launcher tells its processes by variables: which of how many each is, where they meet."""

import os

from dist_adv.errors import UserError

# Least values. torchrun and `accelerate launch` set all of them, and MASTER_ADDR and MASTER_PORT.
_NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
_NEEDED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Accelerate takes them for those of a launcher, too.
_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_REMEDY = "unset it, or start with torchrun"


def rank() -> int:
    """Return this process's number; 0 without a launcher, though a variable of one be left over."""
    return (_number("RANK") or 0) if all(map(os.environ.get, _NEEDED)) else 0


def ranks() -> int:
    """How many there are."""
    return _number("WORLD_SIZE") or 1


def ranks_here() -> int:
    """How many of them this machine has."""
    return _number("LOCAL_WORLD_SIZE") or 1


def check() -> None:
    """Raise UserError naming a variable that is left over, missing or no number.

    torch would wait half an hour for processes that nobody has started.
    """
    for name, least in _NUMBERS.items():
        number = _number(name)
        if name in os.environ and (number is None or number < least):
            raise UserError(
                f"{name}: {os.environ[name]!r} in the environment is no number from {least} on; "
                f"{_REMEDY}"
            )
    sign = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "WORLD_SIZE"
    if sign == "LOCAL_RANK" or ranks() > 1:
        _check_complete(sign)
    else:
        for name in _OF_MPI:
            if (_number(name) or 1) > 1:
                raise UserError(
                    f"{name}: {os.environ[name]} in the environment is of MPI, which is no "
                    f"launcher of ours; {_REMEDY}"
                )


def _check_complete(sign: str) -> None:
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{sign}: {os.environ[sign]} in the environment, but no {', '.join(missing)}: is it "
            f"left over from a launcher? {_REMEDY}"
        )
    if not 0 < (_number("MASTER_PORT") or 0) < 65536:
        raise UserError(
            f"MASTER_PORT: {os.environ['MASTER_PORT']!r} in the environment is no port; write one "
            f"below 32768"
        )
    for of, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        number, count = _number(of) or 0, _number(size)
        if count is not None and number >= count:
            raise UserError(f"{of}: {number} in the environment, but {size} is {count}; {_REMEDY}")


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdecimal() else None
