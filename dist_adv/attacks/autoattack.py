"""AutoAttack standard (Croce and Hein 2020), by its authors' code as packaged in pyautoattack."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_adv.attacks.pgd import frozen
from dist_adv.attacks.threat import Threat
from dist_adv.errors import UserError

_NORMS = {"linf": "Linf", "l2": "L2"}

ENSEMBLE = ("apgd-ce", "apgd-t", "fab-t", "square")
_TARGETS = 9
"""Other classes that the standard ensemble targets for each image, the likeliest first."""


log = logging.getLogger("dist_adv")


class _Warnings(logging.Handler):
    """What AutoAttack only logs: randomised output, softmax output, vanishing gradients.

    Of its debugging messages those are handed on that say how far a batch is: on a CPU 500 images
    take an hour.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if record.levelno < logging.WARNING:
            if message.startswith(("initial accuracy", "robust accuracy after")):
                log.info("autoattack, this batch: %s", message)
        elif message not in self.messages:
            self.messages.append(message)


class AutoAttack:
    """The standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB and Square, in that order.

    attacks: of these, those to run; Square alone takes no gradient.

    With fewer than ten classes it has as many targets as there are other classes, and with two or
    three no targeted APGD, whose loss needs the fourth largest logit. Once it was called `settings`
    says which attacks it has and how many targets, `left_out` what is missing and why.

    Raises UserError where pyautoattack is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        seed: int,
        device: Any,
        attacks: Sequence[str] = ENSEMBLE,
    ) -> None:
        try:
            import pyautoattack
        except ImportError:
            raise UserError(
                "autoattack: is not installed; pip install 'dist-adv[autoattack]'"
            ) from None
        self.model, self.wanted = model, attacks
        self.attack = pyautoattack.AutoAttack(
            self._logits, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, device=device
        )
        self.settings: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.warnings = _Warnings()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial images for x (n, C, H, W) in [0, 1], unchanged where none was found.

        The model sees them with their channels last, as it does in the other attacks (on a CPU a
        quarter less time), and they come back so. AutoAttack itself has them contiguous: it takes
        `.view(n, -1)` of them, which another layout refuses (autopgd_base.py:181, square.py:127).

        Raises UserError for a model of a single class.
        """
        theirs = logging.getLogger("auto-attack")
        level = theirs.level
        theirs.addHandler(self.warnings)
        theirs.setLevel(logging.DEBUG)
        try:
            # FAB calls `backward`, which would compute the weights' gradients and leave them.
            with frozen(self.model):
                self._fit(self._logits(x[:1]).shape[1])
                adversarial, _ = self.attack.run_standard_evaluation(
                    x.contiguous(), y, batch_size=len(x)
                )
        finally:
            theirs.setLevel(level)
            theirs.removeHandler(self.warnings)
        return adversarial.contiguous(memory_format=torch.channels_last)

    def _logits(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous(memory_format=torch.channels_last))

    def _fit(self, classes: int) -> None:
        """Choose the attacks and targets that there are with so many classes."""
        if classes < 2:
            raise UserError("autoattack: needs two classes or more; this model has one")
        targets = min(_TARGETS, classes - 1)
        self.attack.apgd_targeted.n_target_classes = self.attack.fab.n_target_classes = targets
        self.attack.attacks_to_run = [
            name for name in self.wanted if name != "apgd-t" or classes >= 4
        ]
        if classes < 4 and "apgd-t" in self.wanted:
            self.left_out = [f"APGD-T is left out: it needs four classes, and there are {classes}"]
        whole = targets == _TARGETS and self.wanted == ENSEMBLE
        self.settings = {
            "version": "standard" if whole else "custom",
            "attacks": self.attack.attacks_to_run,
            "target_classes": targets,
        }
