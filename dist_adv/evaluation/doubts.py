"""What looks wrong about a network before any attack: what makes every figure of it doubtful."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dist_adv.attacks.parts import Parts
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.evaluation.evaluate import check_fit
from dist_adv.evaluation.images import subset

_A_FEW = 50
_IMAGES = 500
"""So many show that 53 % are right as they should come and 40 % normalised twice."""


def doubts(model: nn.Module, dataset: Dataset, options: EvalOptions) -> list[str]:
    """Return what looks wrong about a network, each with what to do. Puts it in eval mode.

    model: images (n, C, H, W) in [0, 1] to logits (n, classes), on any device.

    Raises UserError where it does not fit the images.
    """
    check_fit(model, dataset, options)
    model.eval()
    batch_size = options.batch_size
    device = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(0)).device
    some = subset(len(dataset), _IMAGES)
    x = dataset.images[some].to(device).to(torch.get_default_dtype()).div_(255)
    y = dataset.labels[some].to(device)
    with torch.inference_mode():
        logits = _answers(model, x, batch_size)
        broken = int((~logits.isfinite()).any(1).sum())
        if broken:
            return [
                f"{broken} of {len(y)} images get logits that are not finite: they count as wrong"
            ]
        found = [_mode(model), _jitter(model, x[: min(batch_size, _A_FEW)])]
        if not found[-1]:
            found.append(_batch(model, x[:batch_size], logits))
        found.append(_probabilities(logits))
        found.append(_input(model, x, y, logits, dataset.statistics(), batch_size))
    return [each for each in found if each]


def _answers(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat(Parts(batch_size)(model, x))


def _mode(model: nn.Module) -> str:
    kinds = (_BatchNorm, _DropoutNd)
    training = [each for each in model.modules() if isinstance(each, kinds) and each.training]
    return (
        f"{len(training)} layers train in spite of eval mode ({type(training[0]).__name__}): "
        f"let the network's train() reach them"
        if training
        else ""
    )


def _jitter(model: nn.Module, x: Tensor) -> str:
    first = model(x)  # four more passes: a random size has but a few values
    jitter = max((model(x) - first).abs().max().item() for _ in range(4))
    if jitter <= 1e-3:
        return ""
    return (
        f"the output is not deterministic (two passes differ by {jitter:.2g}): "
        f"gradient attacks underestimate its weakness"
    )


def _batch(model: nn.Module, x: Tensor, logits: Tensor) -> str:
    """Say where an image's logits depend on the images beside it, beyond what rounding does."""
    alone = model(x[: len(x) // 2 or 1])
    beside = logits[: len(alone)]
    if (alone - beside).abs().max() <= 1e-3 * beside.abs().max().clamp_min(1):
        return ""
    return (
        "an image's output depends on the others of its batch, as with BatchNorm that takes the "
        "batch's statistics: figures depend on eval.batch_size; keep running statistics"
    )


def _probabilities(logits: Tensor) -> str:
    sums = logits.sum(1)
    if logits.min() < 0 or (sums - 1).abs().max() > 1e-3:
        return ""
    return (
        "the outputs are probabilities and no logits: gradients vanish where they are near 0 or 1, "
        "and attacks are weak; return what goes into the softmax"
    )


def _input(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    logits: Tensor,
    statistics: tuple[list[float], list[float]],
    batch_size: int,
) -> str:
    """Say where a network is right more often on images that are prepared in another way."""
    mean, std = (torch.tensor(each, device=x.device).view(1, -1, 1, 1) for each in statistics)
    others = {
        "normalised by the data's mean and deviation": (x - mean) / std,
        "from 0 to 255": 255 * x,
        "from -1 to 1": 2 * x - 1,
        "with a normalisation undone, as if it were done twice": x * std + mean,
        "with their channels in reverse": x.flip(1),
    }
    right = logits.argmax(1) == y
    most, found = 0.0, ""
    for how, images in others.items():
        try:
            better = _answers(model, images, batch_size).argmax(1) == y
        except (ValueError, TypeError, RuntimeError, AssertionError):
            continue  # it refuses such images
        # McNemar's test: of the images that fare differently, more than chance explains fare
        # better, at four standard deviations.
        won, lost = int((better & ~right).sum()), int((right & ~better).sum())
        deviations = (won - lost) / math.sqrt(max(1, won + lost))
        if deviations > max(4, most):
            most = deviations
            found = f"{better.double().mean():.0%} of {len(y)} images are right {how}"
    if not found:
        return ""
    return (
        f"{found}, and {right.double().mean():.0%} as they come, in [0, 1]: put into the network "
        f"what prepares them"
    )
