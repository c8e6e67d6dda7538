"""AutoAttack's first two attacks, APGD by cross-entropy and targeted APGD by DLR, as an attack.

FAB and Square, which follow, find little more in adversarially trained networks and take three
quarters of the time on a CPU. Command, from this folder: dist-adv eval RUN --attacks apgd:APGD
"""

import pyautoattack
import torch
from torch import Tensor, nn

from dist_adv import AttackOptions
from dist_adv.attacks.threat import Threat


class APGD:
    """Worst case over both, (n, C, H, W) in [0, 1] to images of the same shape."""

    class Options(AttackOptions):
        """seed: of AutoAttack's random numbers."""

        seed: int = 0

    def __init__(self, options: Options, threat: Threat) -> None:
        self.options, self.threat = options, threat

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        def logits(images: Tensor) -> Tensor:
            return model(images.contiguous(memory_format=torch.channels_last))

        norm = {"linf": "Linf", "l2": "L2"}[self.threat.norm]
        attack = pyautoattack.AutoAttack(
            logits, norm=norm, eps=self.threat.eps, seed=self.options.seed, device=x.device
        )
        attack.attacks_to_run = ["apgd-ce", "apgd-t"]
        found, _ = attack.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
        return found
