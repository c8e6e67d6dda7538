"""The early-stop rule against catastrophic overfitting (Wong et al. 2020, section 5.4).

After every pass: PGD-5 accuracy on that pass's first training batch. If it fell by more than 0.2
since the pass before, single-step training has collapsed. Wong et al. measure in train mode; here
the model is in eval mode and fp32, so measuring moves no BatchNorm statistics.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.attacks import PGD
from dist_adv.data import Batch
from dist_adv.parallel import total
from dist_adv.threat import Threat

FALL = 0.2


def robust_accuracy(
    model: nn.Module, batch: Batch, threat: Threat, accelerator: Accelerator
) -> float:
    """PGD-5 accuracy (step eps / 4, one random start) on the global batch, of a frozen model."""
    outcome = PGD(5, threat.eps / 4)(model.eval(), batch.x, batch.y, threat, batch.keys)
    counts: Tensor = torch.stack(
        [outcome.survives(5, 1).sum(), torch.tensor(len(batch.y), device=batch.y.device)]
    )
    correct, n = total(accelerator, counts).tolist()
    return correct / n
