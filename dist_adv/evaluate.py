"""The only place where robustness is measured.

Eval mode, fp32, images in [0, 1], exactly n of them at any number of ranks; the worst case over
restarts and iterates; every figure with its attack, its interval and what looks wrong about it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks import PGD, Attack, correct, parse_attack
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.parallel import total
from dist_adv.threat import Threat

Progress = Callable[[str, int, int], None]
"""Called with (attack, images done by this rank, images of this rank)."""


@dataclass(frozen=True)
class Result:
    """One attack on one model."""

    attack: str
    correct: int
    n: int
    loss: float | None
    seconds: float
    measured_in: str
    settings: dict[str, Any]
    flags: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    def record(self) -> dict[str, Any]:
        """The line of results.jsonl."""
        return {
            "attack": self.attack,
            "accuracy": self.accuracy,
            "correct": self.correct,
            "n": self.n,
            "ci95": wilson(self.correct, self.n),
            "loss": self.loss,
            **self.settings,
            "seconds": round(self.seconds, 3),
            "measured_in": self.measured_in,
            "flags": self.flags,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


@dataclass(frozen=True)
class Examples:
    """A few images before and after the strongest attack, (k, C, H, W) in [0, 1], labels (k,)."""

    attack: str
    classes: list[str]
    clean: Tensor
    adversarial: Tensor
    label: Tensor
    clean_prediction: Tensor
    adversarial_prediction: Tensor


def wilson(correct: int, n: int) -> list[float]:
    """95 % Wilson score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    p, d = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / d
    half = z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


class _Images:
    """This rank's share of the images to measure on, in chunks on the device.

    The first `limit` images of a fixed random order, so that a folder sorted by class gives a
    balanced set, whatever the ranks. Rank r takes r, r + W, r + 2 W, ...: each image once.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: EvalOptions,
        limit: int | None,
        accelerator: Accelerator,
        between: Callable[[], None],
    ) -> None:
        order = rng.permutation(rng.stream_key("subset"), len(dataset))[:limit]
        self.n = len(order)
        self.dataset, self.device = dataset, accelerator.device
        self.mine = order[accelerator.process_index :: accelerator.num_processes]
        self.between, self.chunk_size = between, options.batch_size
        largest_share = math.ceil(self.n / accelerator.num_processes)
        self.chunks = math.ceil(largest_share / self.chunk_size)
        self.key = rng.stream_key(options.seed, "attack")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x (n, C, H, W) in [0, 1], y (n,), keys (n,) of each chunk."""
        for number in range(self.chunks):
            self.between()
            samples = self.mine[number * self.chunk_size : (number + 1) * self.chunk_size]
            if len(samples) == 0:  # this rank's share is smaller
                continue
            x = self.dataset.images[samples].to(self.device).to(torch.get_default_dtype()).div_(255)
            y = self.dataset.labels[samples].to(self.device)
            keys = rng.sample_keys(self.key, samples.to(self.device))
            yield x.contiguous(memory_format=torch.channels_last), y, keys


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    threat: Threat,
    options: EvalOptions,
    accelerator: Accelerator,
    attacks: Sequence[str],
    limit: int | None = None,
    progress: Progress = lambda attack, done, of: None,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[Result], Examples | None]:
    """Accuracy of a plain fp32 model under each attack, on `limit` random images or on all.

    Attacks with one restart are read off the longest run that contains them: PGD-10 is what
    PGD-50 from the same start had done after ten steps, so it costs nothing more.

    `between` is called before every chunk, on every rank as often; what it raises ends it all.

    Returns the results in the order of `attacks`, and examples of the last attack that was run
    (None without one). Raises UserError where the model does not fit the images.
    """
    model.eval()
    images = _Images(dataset, options, limit, accelerator, between)
    _check_fit(model, dataset, options)
    wanted = [parse_attack(name) for name in dict.fromkeys(attacks)]
    found: dict[str, Result] = {}
    examples = None
    if "natural" in attacks:
        found["natural"] = _natural(model, images, accelerator)
    for leader, members in _shared_runs(wanted):
        results, examples = _attacked(
            model, images, threat, options, accelerator, leader, members, progress
        )
        found |= {result.attack: result for result in results}
    if "autoattack" in attacks:
        found["autoattack"], examples = _autoattacked(
            model, images, threat, options, accelerator, progress
        )
    results = [found[attack.name] for attack in wanted]
    _flag_contradictions(results)
    return results, examples


def _shared_runs(wanted: Sequence[Attack]) -> list[tuple[Attack, list[Attack]]]:
    """(attack to run, attacks that can be read off it), weakest first."""
    runs: list[tuple[Attack, list[Attack]]] = []
    strength = [attack for attack in wanted if attack.kind == "pgd"]
    strength.sort(key=lambda attack: (attack.steps, attack.restarts), reverse=True)
    for attack in strength:
        for leader, members in runs:
            if attack.restarts == 1 or attack.steps == leader.steps:
                members.append(attack)
                break
        else:
            runs.append((attack, [attack]))
    runs += [(attack, [attack]) for attack in wanted if attack.kind == "fgsm"]
    return runs[::-1]


def _natural(model: nn.Module, images: _Images, accelerator: Accelerator) -> Result:
    began = time.perf_counter()
    counts = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    jitter = 0.0
    with torch.inference_mode():
        for number, (x, y, _) in enumerate(images):
            logits = model(x)
            if number == 0:
                jitter = (model(x) - logits).abs().max().item()
            loss = F.cross_entropy(logits, y, reduction="sum")
            counts += torch.stack([correct(logits, y).sum(), loss])
    survivors, loss_sum = total(accelerator, counts).tolist()
    flags = []
    if jitter > 1e-3:
        flags.append(
            f"the output is not deterministic (two passes differ by {jitter:.2g}): "
            f"gradient attacks underestimate its weakness"
        )
    seconds = time.perf_counter() - began
    mean = _mean(loss_sum, images.n)
    return Result("natural", int(survivors), images.n, mean, seconds, "natural", {}, flags)


def _attacked(
    model: nn.Module,
    images: _Images,
    threat: Threat,
    options: EvalOptions,
    accelerator: Accelerator,
    leader: Attack,
    members: Sequence[Attack],
    progress: Progress,
) -> tuple[list[Result], Examples | None]:
    """Run `leader` and read every member off it."""
    began = time.perf_counter()
    if leader.kind == "fgsm":
        attack = PGD(1, threat.eps, init="zero", loss=options.loss)
    else:
        step_size = options.step_size or threat.eps / 4
        attack = PGD(leader.steps, step_size, leader.restarts, loss=options.loss)
    # Survivors of each member, then: images attacked, zero gradients among them, sum of losses.
    counts = torch.zeros(len(members) + 3, dtype=torch.float64, device=accelerator.device)
    examples, done = None, 0
    for x, y, keys in images:
        outcome = attack(model, x, y, threat, keys)
        with torch.inference_mode():
            loss = F.cross_entropy(model(x + outcome.delta), y, reduction="sum")
        survivors = [outcome.survives(each.steps, each.restarts).sum() for each in members]
        numbers = [*survivors, outcome.attacked, outcome.zero_gradients, loss]
        counts += torch.stack([torch.as_tensor(n, device=counts.device).double() for n in numbers])
        if examples is None:
            shown = x[:8], outcome.delta[:8], y[:8]
            examples = _examples(model, leader.name, images.dataset.classes, *shown)
        done += len(x)
        progress(leader.name, done, len(images.mine))
    *all_survivors, attacked, zero_gradients, loss_sum = total(accelerator, counts).tolist()
    flags = []
    if attacked and zero_gradients / attacked > 0.05:
        flags.append(
            f"the input gradient is exactly 0 for {zero_gradients / attacked:.0%} of the images: "
            f"the loss saturates and the attack is weak; try eval.loss=margin"
        )
    settings = {
        "norm": threat.norm,
        "eps": threat.eps,
        "step_size": attack.step_size,
        "init": attack.init,
        "loss_fn": attack.loss,
        "seed": options.seed,
        "iterate": "first that fools, else the last",
        "precision": "fp32",
    }
    results = [
        Result(
            member.name,
            int(survivors),
            images.n,
            _mean(loss_sum, images.n) if member is leader else None,
            time.perf_counter() - began,
            leader.name,
            {**settings, "steps": member.steps, "restarts": member.restarts},
            list(flags),
        )
        for member, survivors in zip(members, all_survivors, strict=True)
    ]
    return results, examples


def _autoattacked(
    model: nn.Module,
    images: _Images,
    threat: Threat,
    options: EvalOptions,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[Result, Examples | None]:
    """AutoAttack standard on images that are right without it (it drops the others itself)."""
    began = time.perf_counter()
    attack = AutoAttack(model, threat, options.seed, accelerator.device)
    counts = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    examples, done = None, 0
    for x, y, _ in images:
        adversarial = attack(x, y)
        with torch.inference_mode():
            logits = model(adversarial)
        loss = F.cross_entropy(logits, y, reduction="sum")
        counts += torch.stack([correct(logits, y).sum(), loss])
        if examples is None:
            shown = x[:8], (adversarial - x)[:8], y[:8]
            examples = _examples(model, "autoattack", images.dataset.classes, *shown)
        done += len(x)
        progress("autoattack", done, len(images.mine))
    survivors, loss_sum = total(accelerator, counts).tolist()
    settings = {
        "norm": threat.norm,
        "eps": threat.eps,
        "version": "standard",
        "seed": options.seed,
        "precision": "fp32",
    }
    seconds = time.perf_counter() - began
    flags = [f"AutoAttack: {message}" for message in gather_object(attack.warnings.messages)]
    return (
        Result(
            "autoattack",
            int(survivors),
            images.n,
            _mean(loss_sum, images.n),
            seconds,
            "autoattack",
            settings,
            sorted(set(flags)),
        ),
        examples,
    )


def _mean(loss_sum: float, n: int) -> float | None:
    """None where a loss was not finite: JSON has no other word for it."""
    return loss_sum / n if math.isfinite(loss_sum) else None


def _examples(
    model: nn.Module, attack: str, classes: list[str], x: Tensor, delta: Tensor, y: Tensor
) -> Examples:
    adversarial = (x + delta).clamp(0, 1)
    with torch.inference_mode():
        before, after = model(x).argmax(1), model(adversarial).argmax(1)
    return Examples(attack, classes, *(t.cpu() for t in (x, adversarial, y, before, after)))


def _check_fit(model: nn.Module, dataset: Dataset, options: EvalOptions) -> None:
    """The edge where a model meets a data set that it may not have been trained on."""
    architecture = getattr(model, "architecture", None)
    if architecture is None:
        return
    classes, channels = len(architecture["classes"]), len(architecture["mean"])
    if classes != len(dataset.classes):
        raise UserError(
            f"data: {dataset.name} has {len(dataset.classes)} classes and the model {classes}; "
            f"use the data that it was trained on"
        )
    if channels != dataset.images.shape[1]:
        raise UserError(
            f"data: images of {dataset.name} have {dataset.images.shape[1]} channels and the "
            f"model takes {channels}; use the data that it was trained on"
        )
    if options.loss == "dlr" and classes < 3:
        raise UserError("eval.loss: dlr needs three classes or more; use margin")


def _flag_contradictions(results: Sequence[Result]) -> None:
    """Mark figures that cannot both be taken at face value."""
    by_name = {result.attack: result for result in results}
    fgsm = by_name.get("fgsm")
    pgds = [result for result in results if result.attack.startswith("pgd")]
    for weaker in pgds:
        # A sound model loses a quarter of its FGSM accuracy to PGD, a collapsed one all of it.
        if fgsm and weaker.accuracy < fgsm.accuracy / 2 and fgsm.accuracy - weaker.accuracy > 0.2:
            weaker.flags.append(
                f"FGSM leaves {fgsm.accuracy:.1%} and {weaker.attack} {weaker.accuracy:.1%}: "
                f"the sign of catastrophic overfitting or masked gradients"
            )
        for stronger in pgds:
            harder = all(
                stronger.settings[key] >= weaker.settings[key] for key in ("steps", "restarts")
            )
            noise = 2 * math.sqrt(0.25 / weaker.n)
            if harder and stronger.accuracy > weaker.accuracy + noise:
                stronger.flags.append(
                    f"leaves more than the weaker {weaker.attack} ({weaker.accuracy:.1%}): "
                    f"the attack is not converging"
                )
