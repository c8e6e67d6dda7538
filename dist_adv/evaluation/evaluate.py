"""The only place where robustness is measured.

Eval mode, fp32, images in [0, 1], exactly n of them at any number of ranks; the worst case over
restarts and iterates; every figure with its attack, its interval and what looks wrong about it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dist_adv.attacks import PGD, Attack, correct, parse_attack
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.attacks.threat import Threat
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.evaluation.images import Images
from dist_adv.evaluation.results import Examples, Result
from dist_adv.evaluation.tally import Tally
from dist_adv.evaluation.unfinished import Unfinished
from dist_adv.text import shown

Progress = Callable[[str, int, int], None]
"""Called with (attack, images done by all ranks, images)."""


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
    unfinished: Unfinished | None = None,
) -> tuple[list[Result], Examples | None]:
    """Accuracy of a plain fp32 model under each attack, on `limit` random images or on all.

    Attacks with one restart are read off the longest run that contains them: PGD-10 is what
    PGD-50 from the same start had done after ten steps, so it costs nothing more.

    `between` is called before every chunk, on every rank as often; what it raises ends it all.
    With `unfinished` every chunk is kept as soon as all ranks have done theirs, and what it has
    already is not done again, at whatever number of ranks and chunk size.

    Returns the results in the order of `attacks`, and examples of the last attack that was run
    (None without one). Raises UserError where the model does not fit the images, and where
    AutoAttack is wanted and cannot run.
    """
    model.eval()
    images = Images(dataset, options, limit, accelerator, between)
    _check_fit(model, dataset, options)
    wanted = [parse_attack(name) for name in dict.fromkeys(attacks)]
    ensemble = None
    if "autoattack" in attacks:  # not installed: said before anything is measured
        ensemble = AutoAttack(model, threat, options.seed, accelerator.device)
    found: dict[str, Result] = {}
    examples = None
    if "natural" in attacks:
        found["natural"] = _natural(model, images, Tally(accelerator, "natural", 2, unfinished))
    for leader, members in _shared_runs(wanted):
        # Survivors of each member, then: images attacked, zero gradients there, sum of losses.
        tally = Tally(accelerator, leader.name, len(members) + 3, unfinished)
        results, examples = _attacked(
            model, images, threat, options, tally, leader, members, progress
        )
        found |= {result.attack: result for result in results}
    if ensemble:
        tally = Tally(accelerator, "autoattack", 2, unfinished)
        found["autoattack"], examples = _autoattacked(
            model, images, threat, options, tally, ensemble, progress
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


def _natural(model: nn.Module, images: Images, tally: Tally) -> Result:
    with torch.inference_mode():
        x, _, _ = images.load(images.order[:100])
        jitter = (model(x) - model(x)).abs().max().item()
        for x, y, _ in images.chunks(tally):
            logits = model(x)
            loss = F.cross_entropy(logits, y, reduction="sum")
            tally.add(correct(logits, y).sum(), loss)
    survivors, loss_sum = tally.totals()
    flags = []
    if jitter > 1e-3:
        flags.append(
            f"the output is not deterministic (two passes differ by {jitter:.2g}): "
            f"gradient attacks underestimate its weakness"
        )
    mean = _mean(loss_sum, images.n)
    return Result("natural", int(survivors), images.n, mean, tally.elapsed(), "natural", {}, flags)


def _attacked(
    model: nn.Module,
    images: Images,
    threat: Threat,
    options: EvalOptions,
    tally: Tally,
    leader: Attack,
    members: Sequence[Attack],
    progress: Progress,
) -> tuple[list[Result], Examples]:
    """Run `leader` and read every member off it."""
    if leader.kind == "fgsm":
        attack = PGD(1, threat.eps, init="zero", loss=options.loss)
    else:
        step_size = options.step_size or threat.eps / 4
        attack = PGD(leader.steps, step_size, leader.restarts, loss=options.loss)
    examples = None
    for x, y, keys in images.chunks(tally):
        outcome = attack(model, x, y, threat, keys)
        if examples is None and tally.done == 0:
            shown = x[:8], outcome.delta[:8], y[:8]
            examples = _examples(model, leader.name, images.dataset.classes, *shown)
        with torch.inference_mode():
            loss = F.cross_entropy(model(x + outcome.delta), y, reduction="sum")
        survivors = [outcome.survives(each.steps, each.restarts).sum() for each in members]
        tally.add(*survivors, outcome.attacked, outcome.zero_gradients, loss)
        progress(leader.name, min(images.n, tally.done + images.round), images.n)
    *all_survivors, attacked, zero_gradients, loss_sum = tally.totals()
    if examples is None:  # the first chunk was done before an interruption
        x, y, keys = images.load(images.order[:8])
        delta = attack(model, x, y, threat, keys).delta
        examples = _examples(model, leader.name, images.dataset.classes, x, delta, y)
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
        **_precision(images.device),
    }
    results = [
        Result(
            member.name,
            int(survivors),
            images.n,
            _mean(loss_sum, images.n) if member is leader else None,
            tally.elapsed(),
            leader.name,
            {**settings, "steps": member.steps, "restarts": member.restarts},
            list(flags),
        )
        for member, survivors in zip(members, all_survivors, strict=True)
    ]
    return results, examples


def _autoattacked(
    model: nn.Module,
    images: Images,
    threat: Threat,
    options: EvalOptions,
    tally: Tally,
    attack: AutoAttack,
    progress: Progress,
) -> tuple[Result, Examples]:
    """AutoAttack on images that are right without it (it drops the others itself)."""
    attack.warnings.messages = tally.messages
    examples = None
    for x, y, _ in images.chunks(tally):
        adversarial = attack(x, y)
        if examples is None and tally.done == 0:
            shown = x[:8], (adversarial - x)[:8], y[:8]
            examples = _examples(model, "autoattack", images.dataset.classes, *shown)
        with torch.inference_mode():
            logits = model(adversarial)
        loss = F.cross_entropy(logits, y, reduction="sum")
        tally.add(correct(logits, y).sum(), loss)
        progress("autoattack", min(images.n, tally.done + images.round), images.n)
    survivors, loss_sum = tally.totals()
    if examples is None:
        x, y, _ = images.load(images.order[:8])
        examples = _examples(model, "autoattack", images.dataset.classes, x, attack(x, y) - x, y)
    settings = {
        "norm": threat.norm,
        "eps": threat.eps,
        **attack.settings,
        "seed": options.seed,
        **_precision(images.device),
    }
    said = [*attack.left_out, *gather_object(attack.warnings.messages)]
    flags = [f"AutoAttack: {message}" for message in said]
    return (
        Result(
            "autoattack",
            int(survivors),
            images.n,
            _mean(loss_sum, images.n),
            tally.elapsed(),
            "autoattack",
            settings,
            sorted(set(flags)),
        ),
        examples,
    )


def _precision(device: torch.device) -> dict[str, Any]:
    """fp32, and whether the GPU rounded the factors of its products to TF32's 10 bits."""
    switches = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return {"precision": "fp32", "tf32": device.type == "cuda" and any(switches)}


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
