"""The guard's decisions, on figures with known answers and on recorded curves; what it measures."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cases import config
from dist_adv import load_model, rng
from dist_adv.attacks import PGD
from dist_adv.attacks.threat import Linf
from dist_adv.config import load_config, parse_config
from dist_adv.data import DataOptions, load_dataset
from dist_adv.data.datasets import Files
from dist_adv.evaluation.alignment import alignment
from dist_adv.evaluation.images import subset
from dist_adv.models import build_model
from dist_adv.training.clock import Clock
from dist_adv.training.collapse import BENT, SAMPLE, Guard, Measured, on_sample
from dist_adv.training.run import train_run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CURVES = ROOT / "benchmarks" / "results" / "2026-11-26-guard" / "curves.csv"


def gap(pgd: float, fgsm: float, n: int = SAMPLE) -> Measured:
    return Measured(n, pgd, fgsm, chance=0.12)


# Before and after: accuracy under PGD-5 and FGSM; how many images; has it collapsed?
EPOCHS = {
    "to nothing, FGSM rises": ((0.45, 0.48), (0.0, 0.85), SAMPLE, True),
    "to nothing, FGSM stays": ((0.45, 0.48), (0.0, 0.48), SAMPLE, True),
    "a third is lost, FGSM loses a little": ((0.45, 0.5), (0.28, 0.47), SAMPLE, True),
    "both fall alike: a high learning rate": ((0.45, 0.5), (0.25, 0.3), SAMPLE, False),
    "FGSM falls by half as much": ((0.45, 0.5), (0.25, 0.4), SAMPLE, False),
    "FGSM falls, by a third as much": ((0.45, 0.5), (0.15, 0.4), SAMPLE, True),
    "both to chance": ((0.45, 0.5), (0.1, 0.1), SAMPLE, False),
    # Four standard deviations, sqrt(2 * 0.45 * 0.55 / 512) each, are 12.4 points.
    "within the noise of 512 images": ((0.51, 0.55), (0.39, 0.55), SAMPLE, False),
    "beyond it": ((0.515, 0.55), (0.385, 0.55), SAMPLE, True),
    "the same fall on 64 images is noise": ((0.515, 0.55), (0.385, 0.55), 64, False),
    "rises": ((0.2, 0.25), (0.3, 0.5), SAMPLE, False),
    "FGSM parts, PGD stays": ((0.3, 0.35), (0.3, 0.7), SAMPLE, False),
    # The first epochs: a constant answer withstands every attack, the first real ones do not.
    "no better than a constant answer": ((0.12, 0.12), (0.01, 0.15), SAMPLE, False),
}


@pytest.mark.parametrize(("before", "now", "n", "collapsed"), EPOCHS.values(), ids=EPOCHS)
def test_what_counts_as_a_collapse(before, now, n, collapsed):
    assert gap(*now, n).collapsed(gap(*before, n)) == collapsed


def test_the_rule_of_wong_et_al():
    """A fall of more than 0.2, whatever the batch and whatever becomes of FGSM."""
    assert Measured(64, 0.29).collapsed(Measured(64, 0.5))
    assert not Measured(64, 0.31).collapsed(Measured(64, 0.5))


def alarms(curve: list[Measured]) -> list[int]:
    """In which epochs (from 1) the guard trips, as `Guard.look` asks it."""
    before, found = None, []
    for number, now in enumerate(curve, 1):
        if before and now.collapsed(before):
            found.append(number)
        before = now.reference(before)
    return found


def test_a_slow_collapse_adds_up():
    slow = [gap(0.5 - 0.04 * i, 0.55) for i in range(8)]
    assert not any(now.collapsed(before) for before, now in itertools.pairwise(slow))
    assert alarms(slow)[0] == 5


def test_a_collapse_is_said_once():
    assert alarms([gap(0.4, 0.5), *[gap(0.0, 0.8)] * 5]) == [2]


def test_a_collapse_after_a_recovery_is_said_again():
    good, bad = gap(0.4, 0.5), gap(0.0, 0.8)
    assert alarms([good, bad, good, good, bad, bad]) == [2, 5]


def test_wong_et_al_compare_with_the_pass_before():
    curve = [Measured(64, accuracy) for accuracy in (0.6, 0.5, 0.35, 0.2, 0.6, 0.3)]
    assert alarms(curve) == [6]


def test_an_early_sign_is_said_when_it_comes(said):
    """Also in the first epoch, and again after it had gone."""
    guard = Guard(parse_config({"method": {"name": "fast"}}, "test").method)
    told = []
    for epoch, cosine in enumerate((0.1, 0.15, 0.3, 0.19, 0.1, 0.2, 0.1), 1):
        said.clear()
        now = replace(gap(0.4, 0.5), alignment=cosine)
        guard.look(now, Clock(epoch=epoch), 1, torch.nn.Identity())
        told += [epoch] * ("the loss bends within the ball" in said.text)
    assert told == [1, 4, 7]


def recorded() -> dict[str, list[Measured]]:
    curves: dict[str, list[Measured]] = {}
    with CURVES.open() as file:
        for row in csv.DictReader(file):
            now = gap(float(row["pgd"]), float(row["fgsm"]))
            curves.setdefault(row["run"], []).append(now)
    return curves


def test_recorded_runs_trip_where_they_collapsed_and_nowhere_else():
    """Curves of real runs: benchmarks/results/2026-11-26-guard.md says which."""
    found = {run: alarms(curve) for run, curve in recorded().items()}
    healthy = {run: where for run, where in found.items() if run.startswith("healthy")}
    assert len(healthy) == 5
    assert not any(healthy.values())
    collapses = {run: where for run, where in found.items() if run not in healthy}
    begun = {"zero-64": 13, "zero-64-s1": 11}  # PGD-5 accuracy falls by 15 and 18 points
    assert {run: where[0] for run, where in collapses.items()} == begun


# --- what it measures ----------------------------------------------------------------------------

LINF = Linf(0.1)


def test_accuracy_is_that_of_two_attacks_on_the_sample(accelerator, digits, digits_net):
    """Against the attacks themselves, image by image, each with its own random start."""
    found = on_sample(digits_net, digits, LINF, accelerator, 100, lambda: None)
    order = torch.arange(len(digits))  # fewer than 512: all
    x, y = digits.images.float() / 255, digits.labels
    keys = rng.sample_keys(rng.stream_key(0, "attack"), order)
    pgd = PGD(5, 0.1 / 4)(digits_net, x, y, LINF, keys).survives(5, 1)
    fgsm = PGD(1, 0.1, init="zero")(digits_net, x, y, LINF, keys).survives(1, 1)
    assert (found.n, found.pgd, found.fgsm) == (
        len(digits),
        pgd.double().mean().item(),
        fgsm.double().mean().item(),
    )
    assert found.chance == digits.labels.bincount().max().item() / len(digits)
    assert {0.0, 1.0, found.pgd} != {0.0, 1.0, found.fgsm}  # the attacks are two


def test_it_is_the_same_512_images_every_time(accelerator, digits_net, watching):
    train = load_dataset(DataOptions(name="digits"), "train")
    seen: list[torch.Tensor] = []
    with watching(digits_net, seen.append):
        one = on_sample(digits_net, train, LINF, accelerator, 512, lambda: None)
        n = len(seen)
        two = on_sample(digits_net, train, LINF, accelerator, 512, lambda: None)
    assert one == two
    assert one.n == SAMPLE == len(seen[0])
    assert all(torch.equal(a, b) for a, b in zip(seen[:n], seen[n:], strict=True))
    expected = train.images[subset(len(train), SAMPLE)].float() / 255
    assert torch.equal(seen[0], expected)  # not augmented


@pytest.mark.parametrize("chunk", [7, 1000])
def test_memory_does_not_change_it(chunk, accelerator, digits, digits_net):
    whole = on_sample(digits_net, digits, LINF, accelerator, 500, lambda: None)
    assert on_sample(digits_net, digits, LINF, accelerator, chunk, lambda: None) == whole


def test_it_does_not_matter_where_the_images_are(images, accelerator):
    """In memory, or read off the disk as they are used."""
    settings = parse_config(config("fast-random", "batch", images, small=True), "case")
    resident = load_dataset(settings.data, "train")
    streamed = load_dataset(settings.data.model_copy(update={"resident_gb": 0.0}), "train")
    assert isinstance(streamed.images, Files)
    model = build_model(settings.model, *resident.statistics(), resident.classes, 0)
    found = [
        on_sample(model, data, LINF, accelerator, 50, lambda: None) for data in (resident, streamed)
    ]
    assert found[0] == found[1]
    assert found[0].n == 120  # all there are


class Valley(torch.nn.Module):
    """The loss of class 0 rises to both sides of a half, that of class 1 falls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rise = (x.flatten(1) - 0.5).square().sum(1)
        return torch.stack([-rise, rise], 1)


def test_alignment_is_the_cosine_of_gradients_at_both_ends_of_a_step():
    """1 where the step goes on uphill; -1 where it goes through the valley, to where it rises."""
    x = torch.full((3, 1, 2, 2), 0.55)
    x[2] = 0.5  # no gradient at all
    found = alignment(Valley(), x, torch.tensor([0, 1, 0]), LINF)
    assert found.tolist() == pytest.approx([1, -1, 0])


def test_alignment_is_free_of_scale(digits, digits_net):
    """Also of a loss so small that its gradient's square is 0 in single precision."""
    x, y = digits.images.float() / 255, digits.labels
    small = torch.nn.Sequential(digits_net, Scaled(1e-30))
    at_chance = torch.nn.Sequential(digits_net, Scaled(1e-5))
    expected = alignment(at_chance, x, y, LINF)
    assert expected.abs().min() > 0
    torch.testing.assert_close(alignment(small, x, y, LINF), expected, rtol=0, atol=0.05)


class Scaled(torch.nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.by * logits


def test_the_sample_is_aligned_as_its_images_are_on_average(accelerator, digits, digits_net):
    found = on_sample(digits_net, digits, LINF, accelerator, 7, lambda: None)
    x, y = digits.images.float() / 255, digits.labels
    expected = alignment(digits_net, x, y, LINF).mean().item()
    assert found.alignment == pytest.approx(expected, abs=1e-4)
    assert found.record()["guard_alignment"] == found.alignment


@pytest.mark.slow
def test_a_run_that_collapses_is_stopped_with_the_weights_from_before(tmp_path, accelerator, said):
    """FGSM from the image itself, a large radius, no crops: digits collapse within 20 epochs."""
    overrides = [
        *("method.init=zero", "method.alpha=0.3", "threat.eps=0.3", "data.augment=false"),
        *("model.name=wide_resnet", "model.depth=10", "model.widen=1", "model.width=16"),
        *("method.guard=stop", "eval.every=0", "eval.attacks=[natural]"),
    ]
    run_dir = tmp_path / "run"
    settings = load_config(CONFIGS / "digits" / "fast.yaml", overrides)
    train_run(settings, run_dir, "none")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    epochs = [record for record in map(json.loads, lines) if record["kind"] == "epoch"]
    *_, before, last = epochs
    assert [record["guard_tripped"] for record in epochs] == [False] * (len(epochs) - 1) + [True]
    assert last["guard_accuracy"] < before["guard_accuracy"]
    kept = load_model(run_dir)
    assert kept.architecture["trained"]["epoch"] == before["epoch"]
    data = load_dataset(settings.data, "train")
    found = on_sample(kept, data, Linf(0.3), accelerator, 500, lambda: None)
    aligned = found.record().pop("guard_alignment")
    assert aligned == pytest.approx(before["guard_alignment"], abs=1e-3)
    assert replace(found, alignment=None).record().items() <= before.items()
    # The early sign came before.
    signs = [record["epoch"] for record in epochs if record["guard_alignment"] < BENT]
    assert signs[0] < before["epoch"]
    assert f"the loss bends within the ball in epoch {signs[0]:g}" in said.text
