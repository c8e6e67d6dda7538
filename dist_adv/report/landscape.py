"""What trained networks make of the surroundings of images: their loss, and a large attack.

Needs torch and time, so it is imported only where there are networks to look at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks import ascend, frozen
from dist_adv.attacks.threat import Threat, build
from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.models import is_somebodys, load_model
from dist_adv.runs.run import Examples, Run
from dist_adv.terminal import bar

_GRID = 8  # points to each side of the image: 1/255 apart where eps is 8/255
_TARGETS = 3  # wrong classes that each image is driven to


@dataclass(frozen=True, eq=False)
class Surface:
    """The loss on a grid around each of n images, (n, random direction, adversarial direction).

    offsets: where the points lie on either direction, from -eps to eps. tangent: what the loss
    would be there if it were as linear as it is at the image.
    """

    offsets: np.ndarray
    loss: np.ndarray
    tangent: np.ndarray

    @property
    def range(self) -> np.ndarray:
        """Largest less smallest loss of each image (n,)."""
        return self.loss.max((1, 2)) - self.loss.min((1, 2))

    @property
    def deviation(self) -> np.ndarray:
        """Largest distance between loss and tangent of each image (n,).

        The local linearity measure of Qin et al. 2019, with the grid as the neighbourhood.
        """
        return np.abs(self.loss - self.tangent).max((1, 2))


@dataclass(frozen=True)
class LargeAttack:
    """PGD from an image towards a class, in a ball far larger than that of the training threat."""

    threat: Threat
    step_size: float
    steps: int

    def __call__(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return x (n, C, H, W) moved towards target (n,); the model is in eval mode."""
        start = torch.zeros_like(x)
        with frozen(model):  # a step of negative length descends: the loss is the target's
            return x + ascend(model, x, target, start, self.threat, self.steps, -self.step_size)


@dataclass(frozen=True, eq=False)
class Landscape:
    """What m networks make of the same n images.

    made: (m, n, C, H, W), what the attack on each network makes of the images on the way to
    target (n,), and answer: (m, n), what that network takes it for. reached: (m + 1, m), the share
    of all `pairs` of an image and a target in which network j answers with the target when it is
    shown what the attack on network i made; the last row is of the images as they are.
    """

    surfaces: Sequence[Surface]
    attack: LargeAttack
    pairs: int
    target: np.ndarray
    made: np.ndarray
    answer: np.ndarray
    reached: np.ndarray


def survey_runs(runs: Sequence[Run], examples: Examples) -> Landscape:
    """Look at the final networks of runs with the same threat around `examples`.

    On a GPU where there is one. Raises UserError where a network cannot be read, does not fit, or
    has a loss that is not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [_load(run, examples).to(device) for run in runs]
    x, y = (torch.from_numpy(array).to(device) for array in (examples.clean, examples.label))
    norm, eps = runs[0].config["threat"]["norm"], runs[0].config["threat"]["eps"]
    # The pictures of Tsipras et al. 2019 and Shafahi et al. 2019: where the threat is 8/255, 50
    # steps of 2/255 within 30/255.
    attack = LargeAttack(build(norm, eps * 30 / 8), step_size=eps / 4, steps=50)
    with bar(True) as progress:
        task = progress.add_task("looking at networks", total=None, status="")

        def update(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        found = survey(models, x, y, len(examples.classes), build(norm, eps), attack, update)
    for run, surface in zip(runs, found.surfaces, strict=True):
        if not np.isfinite(surface.loss).all():
            raise UserError(f"{run.folder}: its loss is not finite around its example images")
    return found


def _load(run: Run, examples: Examples) -> nn.Module:
    if is_somebodys(run.config["model"]["name"]):
        load_config(run.folder / "config.yaml")  # which imports it
    model = load_model(run.folder)
    architecture = model.architecture
    fits = architecture["classes"] == list(examples.classes)
    if not fits or len(architecture["mean"]) != examples.clean.shape[1]:
        raise UserError(
            f"{run.folder / 'model.safetensors'}: a network for other images than those in "
            f"examples.safetensors; restore the file that training wrote"
        )
    return model


def survey(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    classes: int,
    threat: Threat,
    attack: LargeAttack,
    update: Callable[[int, int], object] = lambda done, of: None,
) -> Landscape:
    """Look at each model in eval mode around images x (n, C, H, W) in [0, 1] with labels y (n,).

    `update` is told how many parts of the work are done, of how many.
    """
    targets = other_classes(y, classes)
    parts = 1 + len(targets)
    surfaces, made = [], []
    for i, model in enumerate(models):
        surfaces.append(loss_surface(model, x, y, threat))
        update(i * parts + 1, len(models) * parts)
        for j, target in enumerate(targets):
            made.append(attack(model, x, target))
            update(i * parts + j + 2, len(models) * parts)
    shown = torch.cat([*made, x.repeat(len(targets), 1, 1, 1)])
    with torch.no_grad():  # (m + 1, m, targets, n)
        answers = torch.stack(
            [
                torch.cat([model(images).argmax(1) for images in shown.split(len(x))])
                for model in models
            ]
        ).view(len(models), len(models) + 1, *targets.shape)
    return Landscape(
        surfaces,
        attack,
        targets.numel(),
        target=targets[0].cpu().numpy(),
        made=torch.stack(made[:: len(targets)]).cpu().numpy(),
        answer=np.stack([answers[i, i, 0].cpu().numpy() for i in range(len(models))]),
        reached=(answers == targets).float().mean((2, 3)).T.cpu().numpy(),
    )


def other_classes(y: Tensor, classes: int) -> Tensor:
    """Three wrong classes of each label (n,), or as many as there are: int64 (targets, n).

    They lie at even distances round the list of classes.
    """
    count = min(_TARGETS, classes - 1)
    ahead = 1 + torch.arange(count, device=y.device) * (classes - 1) // count
    return (y + ahead[:, None]) % classes


def loss_surface(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Surface:
    """Return the cross-entropy loss of a model in eval mode around x (n, C, H, W), labels y (n,).

    The directions are the model's own steepest ascent at the image and a random one of -1 and 1
    in every pixel (Rademacher), which is the same for every model; each has the length eps in the
    threat's norm (Shafahi et al. 2019, figure 3). Images are not cut to [0, 1], which would bend
    the surface.
    """
    keys = rng.sample_keys(rng.stream_key("loss surface"), torch.arange(len(x), device=x.device))
    signs = (rng.bits(keys, tuple(x.shape[1:])) & 1) * 2 - 1
    gradient = _input_gradient(model, x, y)
    origin = torch.zeros_like(x)
    random, adversarial = (threat.ascend(origin, d, 1.0) for d in (signs.to(x), gradient))
    offsets = threat.eps * torch.arange(-_GRID, _GRID + 1, device=x.device) / _GRID
    along = offsets.view(-1, 1, 1, 1) * adversarial[:, None]
    labels = y.repeat_interleave(len(offsets))
    rows = []
    with torch.no_grad():
        for offset in offsets:
            points = (x + offset * random)[:, None] + along
            rows.append(_loss(model(points.flatten(0, 1)), labels).view(len(x), -1))
    loss = torch.stack(rows, 1)
    down, across = ((gradient * d).flatten(1).sum(1)[:, None] for d in (random, adversarial))
    slopes = (down * offsets)[:, :, None] + (across * offsets)[:, None]
    tangent = loss[:, _GRID, _GRID, None, None] + slopes
    return Surface(*(t.cpu().numpy() for t in (offsets, loss, tangent)))


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with frozen(model):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(_loss(model(x), y).sum(), x)[0]


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """In double: in fp32 that of a network that is sure rounds to 0."""
    return F.cross_entropy(logits.double(), y, reduction="none")
