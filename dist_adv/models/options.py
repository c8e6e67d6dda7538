"""What the options of every network are built on."""

from dist_adv.options import Options


class ModelOptions(Options):
    """What every network has. Its own options come with their defaults."""

    name: str
