"""AutoAttack standard (Croce and Hein 2020), by its authors' code as packaged in pyautoattack."""

import logging
from typing import Any

from torch import Tensor, nn

from dist_adv.errors import UserError
from dist_adv.threat import Threat

_NORMS = {"linf": "Linf", "l2": "L2"}


class _Warnings(logging.Handler):
    """What AutoAttack only logs: randomised output, softmax output, vanishing gradients."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if message not in self.messages:
            self.messages.append(message)


class AutoAttack:
    """The standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB and Square, in that order.

    Raises UserError where pyautoattack is not installed.
    """

    def __init__(self, model: nn.Module, threat: Threat, seed: int, device: Any) -> None:
        try:
            import pyautoattack
        except ImportError:
            raise UserError(
                "autoattack: is not installed; pip install 'dist-adv[autoattack]'"
            ) from None
        self.attack = pyautoattack.AutoAttack(
            model, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, device=device
        )
        self.warnings = _Warnings()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images for x (n, C, H, W) in [0, 1]; unchanged where none was found."""
        log = logging.getLogger("auto-attack")
        log.addHandler(self.warnings)
        try:
            adversarial, _ = self.attack.run_standard_evaluation(x, y, batch_size=len(x))
        finally:
            log.removeHandler(self.warnings)
        return adversarial
