"""The only place where robustness is measured.

Eval mode, fp32, images in [0, 1], exactly n of them at any number of ranks; the worst case over
restarts and iterates; every figure with its attack, its interval and what looks wrong about it.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from dist_adv.attacks import parse_attack
from dist_adv.attacks.parts import Parts
from dist_adv.attacks.threat import Threat
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.evaluation.attacks import Attack, Attacked, build_attacks
from dist_adv.evaluation.fused import Fused
from dist_adv.evaluation.images import Images
from dist_adv.evaluation.results import Examples, Result
from dist_adv.evaluation.tally import Tally
from dist_adv.evaluation.unfinished import Unfinished
from dist_adv.text import shown

log = logging.getLogger("dist_adv")


@dataclass(frozen=True)
class Supervision:
    """Callbacks of `evaluate`, and where it keeps what is done.

    progress: called with (attack, images done by all ranks, images) after every chunk. between:
    called before every chunk, on every rank as often; what it raises ends it all. unfinished:
    keeps every chunk as soon as all ranks have done theirs; what it has is not done again, at
    whatever number of ranks and chunk size.
    """

    progress: Callable[[str, int, int], None] = lambda attack, done, of: None
    between: Callable[[], None] = lambda: None
    unfinished: Unfinished | None = None


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    threat: Threat,
    options: EvalOptions,
    accelerator: Accelerator,
    supervision: Supervision = Supervision(),
) -> tuple[list[Result], Examples | None]:
    """Measure a network's accuracy under each of `options.attacks`. Every rank calls this.

    Attacks with one restart are read off the longest run that contains them: PGD-10 is what
    PGD-50 from the same start had done after ten steps, so it costs nothing more.

    Args:
        model: a plain fp32 network, images (n, C, H, W) in [0, 1] to logits; put in eval mode.
        dataset: the images, of which `options.limit` random ones are measured, or all.
        threat: the ball in which the attacks look.
        options: attacks, step size, loss, seed, images a chunk of a rank.

    Returns:
        The results in the order of `options.attacks`, and examples of the last attack that was
        run (None without one).

    Raises:
        UserError: the model does not fit the images, or an attack the model.
    """
    model.eval()
    images = Images(dataset, options, accelerator, supervision.between)
    check_fit(model, dataset, options)
    if options.compile != "none":
        log.info("the first images wait for torch.compile ...")
        model = Fused(model)
    attacks = build_attacks(model, images, threat, options)
    found: dict[str, Result] = {}
    examples, fresh = None, True
    for attack in attacks:
        # Survivors of each member, what the attack counts, and the sum of losses.
        size = len(attack.members) + len(attack.counted) + 1
        tally = Tally(accelerator, attack.name, size, supervision.unfinished)
        fresh = tally.done == 0
        results, examples = _measure(attack, model, images, tally, supervision)
        found |= {result.attack: result for result in results}
    last = attacks[-1] if attacks else None
    if last and not fresh:  # the first ones were done before an interruption
        samples = images.order[: 8 * images.ranks][images.rank :: images.ranks]
        if last.together or len(samples):
            examples = _examples(last, model, images, last(*images.load(samples)))
    results = [found[name] for name in dict.fromkeys(options.attacks)]
    _flag_contradictions(results)
    return results, examples


def _measure(
    attack: Attack, model: nn.Module, images: Images, tally: Tally, supervision: Supervision
) -> tuple[list[Result], Examples | None]:
    """Run an attack on all images, and read every member off it."""
    attack.messages += tally.messages
    tally.messages = attack.messages
    examples, parts = None, Parts()
    for x, y, keys in images.chunks(tally, attack.together):
        whole = attack.together  # where memory is too little it knows what to halve
        out = attack(x, y, keys) if whole else Attacked.joined(parts(attack, x, y, keys))
        if examples is None and tally.done == 0:
            examples = _examples(attack, model, images, out)
        loss = F.cross_entropy(out.logits, out.y, reduction="sum")
        tally.add(*(each.sum() for each in out.survivors), *out.counts, loss)
        done = min(images.n, tally.done + images.round)
        supervision.progress(attack.name, done, images.n)
    totals, members = tally.totals(), len(attack.members)
    flags = attack.flags(dict(zip(attack.counted, totals[members:-1], strict=True)))
    results = [
        Result(
            member,
            int(survivors),
            images.n,
            _mean(totals[-1], images.n) if member == attack.name else None,
            tally.elapsed(),
            attack.name,
            attack.settings(member),
            list(flags),
        )
        for member, survivors in zip(attack.members, totals[:members], strict=True)
    ]
    return results, examples


def _mean(loss_sum: float, n: int) -> float | None:
    """Return None where a loss was not finite: JSON has no other word for it."""
    return loss_sum / n if math.isfinite(loss_sum) else None


def _examples(attack: Attack, model: nn.Module, images: Images, out: Attacked) -> Examples | None:
    """Return the first eight; None where an attack changes nothing, or this rank has no image."""
    if attack.name == "natural" or len(out.y) == 0:
        return None
    x, y, adversarial = out.x[:8], out.y[:8], out.images[:8].clamp(0, 1)
    with torch.inference_mode():
        before, after = model(x).argmax(1), model(adversarial).argmax(1)
    classes = images.dataset.classes
    return Examples(attack.name, classes, *(t.cpu() for t in (x, adversarial, y, before, after)))


def check_fit(model: nn.Module, dataset: Dataset, options: EvalOptions) -> None:
    """Raise UserError where a model, or the loss, does not fit a data set."""
    if options.loss == "dlr" and len(dataset.classes) < 3:
        raise UserError("eval.loss: dlr needs three classes or more; use margin")
    architecture = getattr(model, "architecture", None)
    if architecture is None:
        return
    classes, channels = len(architecture["classes"]), len(architecture["mean"])
    if classes != len(dataset.classes):
        raise UserError(
            f"data: {dataset.name} has {len(dataset.classes)} classes and the model {classes}; "
            f"use the data that it was trained on"
        )
    pairs = zip(dataset.classes, architecture["classes"], strict=True)
    for label, (theirs, ours) in enumerate(pairs):
        if theirs != ours:
            raise UserError(
                f"data: class {label} of {dataset.name} is '{shown(theirs)}' and the model's "
                f"'{shown(ours)}'; call the classes as in the data that it was trained on"
            )
    if channels != dataset.images.shape[1]:
        raise UserError(
            f"data: images of {dataset.name} have {dataset.images.shape[1]} channels and the "
            f"model takes {channels}; use the data that it was trained on"
        )


def _flag_contradictions(results: Sequence[Result]) -> None:
    """Mark figures that cannot both be taken at face value."""
    by_name = {result.attack: result for result in results}
    fgsm = by_name.get("fgsm")
    pgds = [result for result in results if parse_attack(result.attack).kind == "pgd"]
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
