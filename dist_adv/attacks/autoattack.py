"""AutoAttack standard (Croce and Hein 2020): four attacks, each on what the ones before left.

After the paper and its authors' code (github.com/fra31/auto-attack, MIT), to which it is held image
by image by tests. Other than there, the random numbers are each image's own, so that a figure does
not depend on ranks or batches; and an image that has fallen costs nothing more, inside an attack
neither.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks.apgd import APGD, dlr_targeted, untargeted
from dist_adv.attacks.fab import FAB
from dist_adv.attacks.parts import Parts
from dist_adv.attacks.pgd import frozen
from dist_adv.attacks.search import Found, Search
from dist_adv.attacks.spec import ENSEMBLE
from dist_adv.attacks.square import Square
from dist_adv.attacks.threat import Threat
from dist_adv.errors import UserError

_TARGETS = 9
"""Other classes that the standard ensemble targets for each image, the likeliest first."""

Share = Callable[[Sequence[Tensor]], Sequence[Tensor]]

log = logging.getLogger("dist_adv")


@dataclass(frozen=True)
class Ended:
    """Images with which an attack has ended, with their labels and keys.

    attack: its name, of those that fooled the model by it; "" for those that none has fooled.
    images: (n, C, H, W), what fools the model, or the images x themselves. attacked,
    zero_gradients: how many runs the attack has had from a start of which it took the gradient, of
    these images or others, and how many of them had a gradient of exactly 0 there.
    """

    attack: str
    x: Tensor
    y: Tensor
    keys: Tensor
    images: Tensor
    attacked: int = 0
    zero_gradients: int = 0


class AutoAttack:
    """The standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB and Square, in that order.

    attacks: of these, those to run; Square takes no gradient. classes: how many logits there
    are. share: gives this rank its part of the images (x, y, keys) that are left before each
    attack; every rank calls it as often.

    With fewer than ten classes it has as many targets as there are other classes, and with two or
    three no targeted APGD, whose loss needs the fourth largest logit: `left_out` says so.

    Raises UserError for a model of a single class, and where nothing but that one is to be run.
    """

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        classes: int,
        attacks: Sequence[str] = ENSEMBLE,
        share: Share = lambda rows: rows,
    ) -> None:
        if classes < 2:
            raise UserError(
                "autoattack: it and its parts need two classes or more; this model has one"
            )
        self.model, self.share, self.parts = model, share, Parts()
        targets = min(_TARGETS, classes - 1)
        searches: dict[str, tuple[Search, int]] = {
            "apgd-ce": (APGD(threat, untargeted), 0),
            "apgd-t": (APGD(threat, dlr_targeted), targets),
            "fab-t": (FAB(threat), targets),
            "square": (Square(threat), 0),
        }
        self.left_out = []
        if classes < 4 and tuple(attacks) == ("apgd-t",):
            raise UserError(f"apgd-t: needs four classes or more; this model has {classes}")
        if classes < 4 and "apgd-t" in attacks:
            self.left_out = [f"APGD-T is left out: it needs four classes, and there are {classes}"]
            attacks = [name for name in attacks if name != "apgd-t"]
        self.searches = {name: searches[name] for name in attacks}
        whole = targets == _TARGETS and tuple(attacks) == ENSEMBLE
        self.settings: dict[str, Any] = {
            "version": "standard" if whole else "custom",
            "attacks": list(attacks),
            "target_classes": targets,
        }

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> list[Ended]:
        """Attack x (n, C, H, W) in [0, 1] with labels y (n,); keys (n,) are of random numbers.

        The model is used as it is, and should be right for all of x: put it in eval mode and fp32
        first. Returns each image of all ranks once, on one of them.
        """
        began, ended = time.perf_counter(), []
        for name in self.searches:
            x, y, keys = self.share([x, y, keys])
            if len(x):
                with frozen(self.model):
                    found = self._run(name, x, y, keys)
                fooled = found.fooled
                rows = x[fooled], y[fooled], keys[fooled], found.images[fooled]
                ended.append(Ended(name, *rows, found.attacked, found.zero_gradients))
                x, y, keys = (each[~fooled] for each in (x, y, keys))
            seconds = time.perf_counter() - began
            line = "this batch: %d images are left after %s (%.0f s)"
            log.info(line, len(x), name, seconds)
        return [*ended, Ended("", x, y, keys, x)]

    def _run(self, name: str, x: Tensor, y: Tensor, keys: Tensor) -> Found:
        search, targets = self.searches[name]
        keys = rng.substream(keys, name)
        if not targets:
            return Found.joined(self.parts(partial(search, self.model), x, y, y, keys))
        with torch.no_grad():
            order = torch.cat(self.parts(self.model, x)).argsort(1, descending=True)
        found = Found.nothing(x)
        for likely in range(1, targets + 1):
            left = (~found.fooled).nonzero().squeeze(1)
            if len(left) == 0:
                break
            rows = x[left], y[left], order[left, likely]
            own = rng.substream(keys[left], f"target {likely}")
            more = Found.joined(self.parts(partial(search, self.model), *rows, own))
            found.take(left[more.fooled], more.images[more.fooled])
            found.attacked += more.attacked
            found.zero_gradients += more.zero_gradients
        return found
