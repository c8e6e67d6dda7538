"""Distributed adversarial training: natural, PGD, Free and Fast, with honest evaluation."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]

if TYPE_CHECKING:
    from dist_adv.models import load_model


def __getattr__(name: str) -> object:
    """Import torch only when somebody asks for a model: `dist-adv --help` stays instant."""
    if name == "load_model":
        from dist_adv.models import load_model

        return load_model
    raise AttributeError(f"module 'dist_adv' has no attribute {name!r}")
