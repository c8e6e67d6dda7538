"""A method as reports show it: a run records it, and its report needs no code of the method's."""

from dataclasses import asdict
from typing import Any

import torch

from dist_adv.attacks.threat import Threat
from dist_adv.methods.base import MethodOptions
from dist_adv.methods.cost import cost_of
from dist_adv.methods.registry import find_method
from dist_adv.text import pixels


def describe(
    options: MethodOptions,
    threat: Threat,
    shape: torch.Size,
    classes: int,
    perturbed: bool = False,
) -> dict[str, Any]:
    """Return what env.json has under `method`: its title, settings, a sentence, its cost.

    shape: (C, H, W) of an image. perturbed: with AWP. Raises UserError as `cost_of` does.
    """
    method = find_method(options.name)
    return {
        "title": method.title or method.__name__,
        "settings": settings(options),
        "about": method.about,
        **asdict(cost_of(options, threat, shape, classes, perturbed)),
    }


def settings(options: MethodOptions) -> str:
    """Return a method's options in words: K = 7, alpha 2/255, init random."""
    own = options.model_dump(exclude=set(MethodOptions.model_fields), exclude_none=True)
    fields = type(options).model_fields
    parts = []
    for key, value in own.items():
        if key == "attack_mode":
            parts += ["attack in eval mode"] * (value == "eval")
            continue
        letter = fields[key].title
        text = f"{value:g}" if isinstance(value, float) else str(value)
        text = pixels(value) if key == "alpha" else text
        parts.append(f"{letter} = {text}" if letter else f"{key} {text}")
    return ", ".join(parts + ["guard stop"] * (options.guard == "stop"))
