"""Attacks as `evaluate` runs them, and which others can be read off each.

One run of PGD-50 from a start has done PGD-10 after ten steps: what falls by then falls in both.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dist_adv import plugins, rng
from dist_adv.attacks import PGD, AttackSpec, attack_kind, correct, frozen, parse_attack
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.attacks.spec import ENSEMBLE
from dist_adv.attacks.threat import Threat
from dist_adv.config import EvalOptions
from dist_adv.errors import UserError
from dist_adv.evaluation.images import Images

_GRADIENTS = ("attacked", "zero gradients")
"""How many images took a first step, and how many of them had an input gradient of exactly 0."""
_SQUARE = 0.002
"""The share of all images that Square may find after the others, as in AutoAttack's own check."""


@dataclass(frozen=True)
class Attacked:
    """What became of n images.

    x: the images (n, C, H, W) in [0, 1]; y: their labels (n,). images: what fooled the network,
    else the last that was tried; logits: (n, classes), of these. survivors: for each member of
    the attack, bool (n,), still right. counts: what the attack counts, in its order.
    """

    x: Tensor
    y: Tensor
    images: Tensor
    logits: Tensor
    survivors: Sequence[Tensor]
    counts: Sequence[int] = ()

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        x, y, images, logits = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("x", "y", "images", "logits")
        )
        survivors = zip(*(part.survivors for part in parts), strict=True)
        counts = zip(*(part.counts for part in parts), strict=True)
        return cls(
            x, y, images, logits, [torch.cat(each) for each in survivors], [*map(sum, counts)]
        )


class Attack(ABC):
    """An attack on one network.

    name: what it is called; members: the names of the attacks that it gives the figures of.
    messages: warnings so far, of this process: kept with the sums where an evaluation is
    interrupted. counted: what it counts, in `Attacked.counts`. together: the ranks share their
    images out anew in it, so that one without images calls it, too.
    """

    name: str
    members: Sequence[str]
    messages: list[str]
    counted: Sequence[str] = ()
    together = False

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Attacked:
        """Attack x (n, C, H, W) in [0, 1] with labels y (n,); keys (n,) make the random starts."""

    @abstractmethod
    def settings(self, member: str) -> dict[str, Any]:
        """Return what a figure must be read with, for results.jsonl."""

    def flags(self, counts: Mapping[str, float]) -> list[str]:
        """Return what looks wrong about the figures; counts are those of all images and ranks."""
        return []


class Natural(Attack):
    """The attack that changes nothing."""

    name, members = "natural", ("natural",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.messages: list[str] = []

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Attacked:
        with torch.inference_mode():
            logits = self.model(x)
        return Attacked(x, y, x, logits, [correct(logits, y)])

    def settings(self, member: str) -> dict[str, Any]:
        return {}


class Gradient(Attack):
    """FGSM, or a run of PGD and all shorter ones from the same starts."""

    counted = _GRADIENTS

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        threat: Threat,
        options: EvalOptions,
        members: Sequence[AttackSpec],
    ) -> None:
        """members: the strongest first, which is run."""
        self.model, self.images, self.threat, self.seed = model, images, threat, options.seed
        self.specs = {member.name: member for member in members}
        self.members = list(self.specs)
        self.messages: list[str] = []
        strongest = members[0]
        self.name = strongest.name
        if strongest.kind == "fgsm":
            self.attack = PGD(1, threat.eps, init="zero", loss=options.loss)
        else:
            step_size = options.step_size or threat.eps / 4
            self.attack = PGD(strongest.steps, step_size, strongest.restarts, loss=options.loss)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Attacked:
        outcome = self.attack(self.model, x, y, self.threat, keys)
        survivors = [outcome.survives(each.steps, each.restarts) for each in self.specs.values()]
        images = x + outcome.delta
        with torch.inference_mode():
            logits = self.model(images)
        counts = outcome.attacked, outcome.zero_gradients
        return Attacked(x, y, images, logits, survivors, counts)

    def settings(self, member: str) -> dict[str, Any]:
        return {
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "step_size": self.attack.step_size,
            "init": self.attack.init,
            "loss_fn": self.attack.loss,
            "seed": self.seed,
            "iterate": "first that fools, else the last",
            "steps": self.specs[member].steps,
            "restarts": self.specs[member].restarts,
            **_precision(self.images.device),
        }

    def flags(self, counts: Mapping[str, float]) -> list[str]:
        return _vanishing(counts, "the images", "; try eval.loss=margin")


class Noise(Attack):
    """Random points of the ball, of which the worst counts: no network withstands less."""

    name, members = "noise", ("noise",)
    draws = 10

    def __init__(self, model: nn.Module, images: Images, threat: Threat, seed: int) -> None:
        self.model, self.images, self.threat, self.seed = model, images, threat, seed
        self.messages: list[str] = []

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Attacked:
        worst = x
        with torch.inference_mode():
            logits = self.model(x)
            for draw in range(self.draws):
                keys_of_draw = rng.substream(keys, f"noise {draw}")
                near = x + self.threat.project(self.threat.random(keys_of_draw, x.shape), x)
                tried = self.model(near)
                fooled = correct(logits, y) & ~correct(tried, y)
                worst = torch.where(fooled.view(-1, 1, 1, 1), near, worst)
                logits = torch.where(fooled[:, None], tried, logits)
        return Attacked(x, y, worst, logits, [correct(logits, y)])

    def settings(self, member: str) -> dict[str, Any]:
        return _settings(self, {"draws": self.draws})


class Ensemble(Attack):
    """AutoAttack, or one of its four alone. The ranks share out anew what each attack has left.

    Raises UserError for a network of a single class, and of too few for APGD-T alone.
    """

    counted = (*_GRADIENTS, *ENSEMBLE)
    together = True

    def __init__(self, model: nn.Module, images: Images, threat: Threat, name: str) -> None:
        self.model, self.images, self.threat = model, images, threat
        self.seed, self.name, self.members = images.seed, name, (name,)
        self.messages: list[str] = []
        with torch.inference_mode():
            self.classes = model(images.load(images.order[:1])[0]).shape[1]
        attacks = ENSEMBLE if name == "autoattack" else (name,)
        self.attack = AutoAttack(model, threat, self.classes, attacks, images.share)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Attacked:
        right = correct(self._logits(x), y)
        ended = self.attack(x[right], y[right], keys[right])
        counts = dict.fromkeys(self.counted, 0)
        for each in ended:
            counts["attacked"] += each.attacked
            counts["zero gradients"] += each.zero_gradients
            if each.attack:
                counts[each.attack] += len(each.x)
        x, y, keys, images = (
            torch.cat([mine[~right], *(getattr(each, name) for each in ended)])
            for name, mine in {"x": x, "y": y, "keys": keys, "images": x}.items()
        )
        mixed = keys.argsort()  # for the pictures, which show the first
        x, y, images = x[mixed], y[mixed], images[mixed]
        logits = self._logits(images)
        return Attacked(x, y, images, logits, [correct(logits, y)], [*counts.values()])

    def _logits(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(0, self.classes)
        with torch.inference_mode():
            return torch.cat(self.attack.parts(self.model, x))

    def settings(self, member: str) -> dict[str, Any]:
        return _settings(self, self.attack.settings)

    def flags(self, counts: Mapping[str, float]) -> list[str]:
        said = [f"AutoAttack: {each}" for each in self.attack.left_out]
        if len(self.attack.searches) > 1 and counts["square"] > _SQUARE * self.images.n:
            said.append(
                f"AutoAttack: Square, which takes no gradient, finds {counts['square']:.0f} of "
                f"{self.images.n} images that the others leave: gradients do not lead there"
            )
        return said + _vanishing(counts, "APGD's starts")


class Other(Attack):
    """Somebody's own attack: `kind(options, threat)`, called with (model, x, y, keys).

    It returns images. What left the ball is projected into it, and where one is not finite the
    image stays as it was, both of which flags say.

    Raises UserError where it cannot be made, fails, or returns something else.
    """

    def __init__(
        self, model: nn.Module, images: Images, threat: Threat, options: EvalOptions, name: str
    ) -> None:
        self.model, self.images, self.threat = model, images, threat
        self.name, self.members, self.seed = name, (name,), options.seed
        self.messages: list[str] = []
        kind, its = attack_kind(name)
        self.options = its.model_validate(options.attack_options.get(name, {}))
        with self._told():
            self.attack = kind(self.options, threat)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Attacked:
        with self._told(), frozen(self.model):
            images = self.attack(self.model, *(each.clone() for each in (x, y, keys)))
        if not isinstance(images, Tensor) or images.shape != x.shape:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"eval.attacks: {self.name} returns {found}, not images {x.shape}")
        delta = images.detach().to(x) - x
        finite = delta.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        if not finite.all():
            self.messages.append("some of its images were not finite; they count as they were")
        delta = torch.where(finite, delta, 0)
        inside = self.threat.project(delta, x)
        if (delta - inside).abs().max() > 1e-5:
            self.messages.append("its images left the ball or [0, 1] and were projected")
        images = x + inside
        with torch.inference_mode():
            logits = self.model(images)
        return Attacked(x, y, images, logits, [correct(logits, y)])

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (UserError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise UserError(f"eval.attacks: {self.name} fails: {plugins.told(error)}") from error

    def settings(self, member: str) -> dict[str, Any]:
        return _settings(self, {"options": self.options.model_dump()})

    def flags(self, counts: Mapping[str, float]) -> list[str]:
        return sorted(set(gather_object(self.messages)))


def _vanishing(counts: Mapping[str, float], where: str, remedy: str = "") -> list[str]:
    attacked, zero_gradients = (counts[name] for name in _GRADIENTS)
    if not attacked or zero_gradients / attacked <= 0.05:
        return []
    return [
        f"the input gradient is exactly 0 for {zero_gradients / attacked:.0%} of {where}: "
        f"the loss saturates and the attack is weak{remedy}"
    ]


def _settings(attack: Noise | Ensemble | Other, own: dict[str, Any]) -> dict[str, Any]:
    """Return an attack's own settings, with the ball and how numbers are computed."""
    ball = {"norm": attack.threat.norm, "eps": attack.threat.eps}
    return {**ball, **own, "seed": attack.seed, **_precision(attack.images.device)}


def _precision(device: torch.device) -> dict[str, Any]:
    """fp32, and whether the GPU rounded the factors of its products to TF32's 10 bits."""
    switches = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return {"precision": "fp32", "tf32": device.type == "cuda" and any(switches)}


def build_attacks(
    model: nn.Module, images: Images, threat: Threat, options: EvalOptions
) -> list[Attack]:
    """Return as few attacks as give every figure of `options`, in the order in which they run.

    Raises UserError where AutoAttack is wanted of a network of too few classes.
    """
    wanted = [parse_attack(name) for name in dict.fromkeys(options.attacks)]
    attacks: list[Attack] = []
    kinds = {spec.kind for spec in wanted}
    if "natural" in kinds:
        attacks.append(Natural(model))
    if "noise" in kinds:
        attacks.append(Noise(model, images, threat, options.seed))
    attacks += [
        Gradient(model, images, threat, options, members) for members in _shared_runs(wanted)
    ]
    ensembles = [name for name in (*ENSEMBLE, "autoattack") if name in kinds]
    attacks += [Ensemble(model, images, threat, name) for name in ensembles]
    others = [spec.name for spec in wanted if spec.kind == "other"]
    attacks += [Other(model, images, threat, options, name) for name in others]
    return attacks


def _shared_runs(wanted: Sequence[AttackSpec]) -> list[list[AttackSpec]]:
    """Return groups of attacks that one run gives, that one first; the weakest group first."""
    groups: list[list[AttackSpec]] = []
    strength = [spec for spec in wanted if spec.kind == "pgd"]
    strength.sort(key=lambda spec: (spec.steps, spec.restarts), reverse=True)
    for spec in strength:
        for group in groups:
            if spec.restarts == 1 or spec.steps == group[0].steps:
                group.append(spec)
                break
        else:
            groups.append([spec])
    groups += [[spec] for spec in wanted if spec.kind == "fgsm"]
    return groups[::-1]
