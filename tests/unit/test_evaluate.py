"""Reported accuracies: exact counts, the same however they are computed, and marked if doubtful."""

import json
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dist_adv.attacks.threat import L2, Linf
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.evaluation.evaluate import Supervision, _flag_contradictions, evaluate
from dist_adv.evaluation.results import Result, wilson
from dist_adv.evaluation.unfinished import Entry, Unfinished
from dist_adv.models import PreActResNet18Options, build_model

THREAT = Linf(0.2)
ALL = ["natural", "fgsm", "pgd-10", "pgd-20", "pgd-20-3"]


@pytest.fixture(scope="module")
def measure(accelerator):
    """`measure(model, data, names)`: the results by name."""

    def run(model, data, attacks, limit=None, threat=THREAT, process=accelerator, **options):
        settings = EvalOptions(attacks=attacks, limit=limit, **options)
        results, examples = evaluate(model, data, threat, settings, process)
        assert [result.attack for result in results] == list(dict.fromkeys(attacks))
        run.examples = examples
        return {result.attack: result for result in results}

    return run


def counts(results: dict[str, Result]) -> dict[str, int]:
    return {name: result.correct for name, result in results.items()}


@pytest.mark.parametrize(
    ("correct", "n"), [(0, 1), (1, 1), (0, 359), (359, 359), (180, 359), (1, 1000), (4567, 10_000)]
)
def test_wilson_interval(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(correct, n) == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_interval_is_of_proportions():
    """Rounding takes no bound below 0 or above 1."""
    for n in range(1, 400):
        assert 0 <= wilson(0, n)[0] < wilson(0, n)[1] <= 1
        assert 0 <= wilson(n, n)[0] < wilson(n, n)[1] <= 1


def test_counts_are_exact(measure, subject):
    """359 images in chunks of 7 are 359 images; counts and losses are those of a plain pass."""
    results = measure(subject.net, subject.data, ["natural", "pgd-10"], batch_size=7)
    n, y = len(subject.y), subject.y
    assert {result.n for result in results.values()} == {n}
    logits = subject.net(subject.x)
    assert results["natural"].correct == (logits.argmax(1) == y).sum()
    assert results["natural"].loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert results["pgd-10"].accuracy == results["pgd-10"].correct / n
    assert results["pgd-10"].loss > results["natural"].loss


def test_chunks_change_nothing(measure, subject):
    data, threat = subject.data, Linf(subject.eps)
    small, large = (
        measure(subject.net, data, ALL, 100, threat, batch_size=size, step_size=0.1 * subject.eps)
        for size in (7, 500)
    )
    assert counts(small) == counts(large)
    assert small["pgd-20-3"].loss == pytest.approx(large["pgd-20-3"].loss, rel=1e-3)
    assert counts(large)["natural"] > counts(large)["pgd-10"] > counts(large)["pgd-20-3"]


@pytest.mark.parametrize(
    "together",
    [
        ["pgd-10", "pgd-50"],
        ["pgd-10", "pgd-50-3"],
        ["pgd-50", "pgd-50-3", "pgd-10"],
        ["pgd-5-4", "pgd-10", "pgd-50-3", "pgd-5-2"],
        ["pgd-10", "natural", "fgsm", "pgd-10"],
    ],
)
def test_shared_runs_equal_runs_alone(together, measure, digits, digits_net):
    """An accuracy never depends on what else was asked for."""
    options = {"limit": 200, "step_size": 0.01}
    shared = measure(digits_net, digits, together, **options)
    for name in together:
        alone = measure(digits_net, digits, [name], **options)[name]
        assert (name, alone.correct) == (name, shared[name].correct)
        assert alone.settings == shared[name].settings
        assert shared[name].loss in (None, pytest.approx(alone.loss))


def test_weak_attacks_are_read_off_strong_ones(measure, digits, digits_net, watching):
    """PGD-10 beside PGD-20 costs nothing."""
    rows: list[int] = []
    for attacks in (["pgd-20"], ["pgd-10", "pgd-20", "pgd-5"]):
        seen: list[int] = []
        with watching(digits_net, lambda x, seen=seen: seen.append(len(x))):
            results = measure(digits_net, digits, attacks)
        assert results["pgd-20"].measured_in == "pgd-20"
        rows.append(sum(seen))
    assert results["pgd-10"].measured_in == "pgd-20"
    assert rows[0] == rows[1]


def test_radius_zero_is_natural_accuracy(measure, digits, digits_net):
    attacks = ["natural", "fgsm", "pgd-5-2"]
    results = counts(measure(digits_net, digits, attacks, threat=Linf(0.0), step_size=0.01))
    assert results["natural"] == results["fgsm"] == results["pgd-5-2"]


def test_fgsm_is_one_step_of_the_radius_from_the_image(measure, subject):
    x, y, net = subject.x, subject.y, subject.net
    start = x.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(net(start), y), start)[0]
    adversarial = (x + subject.eps * gradient.sign()).clamp(0, 1)
    right = (net(x).argmax(1) == y) & (net(adversarial).argmax(1) == y)
    found = measure(net, subject.data, ["fgsm"], threat=Linf(subject.eps))["fgsm"]
    assert found.correct == right.sum()


def test_step_size(measure, digits, digits_net):
    """A quarter of the radius unless told otherwise."""
    losses = {}
    for asked, size in ((None, 0.05), (0.05, 0.05), (0.2, 0.2)):
        result = measure(digits_net, digits, ["pgd-1"], step_size=asked)["pgd-1"]
        assert result.settings["step_size"] == pytest.approx(size)
        losses[asked] = result.loss
    assert losses[None] == losses[0.05] < losses[0.2]


def test_restarts_and_steps_find_more(measure, digits, digits_net):
    attacks = ["natural", "pgd-2", "pgd-8", "pgd-8-4"]
    correct = counts(measure(digits_net, digits, attacks, step_size=0.025))
    assert list(correct.values()) == sorted(set(correct.values()), reverse=True)


def test_seed_makes_the_starts(measure, digits, digits_net):
    losses = [
        measure(digits_net, digits, ["pgd-1"], seed=seed, step_size=0.001)["pgd-1"].loss
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


class Rank:
    """One of several ranks, whose sums are its own share."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.process_index, self.num_processes = rank, ranks
        self.device = torch.device("cpu")

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return value


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_images(ranks, limit, measure, subject):
    """Each image on one rank, with the same start: the shares add up, n is the same on all."""
    net, data, threat = subject.net, subject.data, Linf(subject.eps)
    whole = measure(net, data, ALL, limit, threat, Rank(0, 1))
    parts = [measure(net, data, ALL, limit, threat, Rank(r, ranks)) for r in range(ranks)]
    for name in ALL:
        assert sum(part[name].correct for part in parts) == whole[name].correct
        assert {part[name].n for part in parts} == {whole[name].n} == {limit or len(data)}


class ReadsLabel(nn.Module):
    """Answers with the label that is written into every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(labels_in(x), 10).float() + 0 * x.mean(dim=(1, 2, 3))[:, None]


def labels_in(x: Tensor) -> Tensor:
    return (x[:, 0, 0, 0] * 255 / 20).round().long()


def made_up(labels: Tensor, images: Tensor | None = None, classes: int = 10) -> Dataset:
    if images is None:
        images = (labels * 20).to(torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)
    return Dataset("made up", images, labels, [str(k) for k in range(classes)], 0, False)


def test_limit_is_a_fixed_balanced_subset(measure, watching):
    """The first images of a folder that is sorted by class would be of one class."""
    data, model = made_up(torch.arange(10).repeat_interleave(100)), ReadsLabel()
    seen: list[list[int]] = []
    for size in (500, 30):
        labels: list[Tensor] = []
        with watching(model, lambda x, labels=labels: labels.append(labels_in(x))):
            result = measure(model, data, ["natural"], 200, batch_size=size)["natural"]
        assert result.n == result.correct == 200
        seen.append(torch.cat(labels).tolist())
    assert seen[0] == seen[1]
    assert (
        stats.chisquare(torch.bincount(torch.tensor(seen[0]), minlength=10).numpy()).pvalue > 1e-3
    )
    assert measure(model, data, ["natural"], 5000)["natural"].n == 1000


def test_model_is_in_eval_mode_and_sees_valid_fp32_images(measure, digits, watching):
    model = build_model(PreActResNet18Options(width=2), [0.5], [0.3], digits.classes, 0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[tuple[bool, float, float, torch.dtype]] = []

    def see(x: Tensor) -> None:
        modes = [part.training for part in model.modules()]
        seen.append((any(modes), x.min().item(), x.max().item(), x.dtype))

    with watching(model, see):
        measure(model, digits, ["natural", "fgsm", "pgd-2-2"], 40)
        measure(model, digits, ["pgd-2"], 40, threat=L2(2.0))
    training, low, high, dtypes = (set(each) for each in zip(*seen, strict=True))
    assert training == {False}
    assert min(low) >= 0
    assert max(high) <= 1
    assert dtypes == {torch.float32}
    assert not model.training
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_record_says_how_it_was_measured(measure, digits, digits_net):
    record = measure(digits_net, digits, ["pgd-20-3"], 50, seed=4)["pgd-20-3"].record()
    expected = {
        "attack": "pgd-20-3",
        "n": 50,
        "accuracy": record["correct"] / 50,
        "ci95": wilson(record["correct"], 50),
        "norm": "linf",
        "eps": 0.2,
        "steps": 20,
        "restarts": 3,
        "step_size": 0.05,
        "init": "random",
        "loss_fn": "ce",
        "seed": 4,
        "precision": "fp32",
        "tf32": False,
        "flags": [],
    }
    assert {key: record[key] for key in expected} == expected


def test_examples_are_of_the_strongest_attack(measure, subject):
    net, data, threat = subject.net, subject.data, Linf(subject.eps)
    measure(net, data, ["fgsm", "pgd-20", "natural", "pgd-5"], threat=threat)
    shown = measure.examples
    assert shown.attack == "pgd-20"
    assert shown.clean.shape == shown.adversarial.shape == (8, *data.images.shape[1:])
    assert (shown.adversarial - shown.clean).abs().max() <= subject.eps + 1e-6
    assert net(shown.clean).argmax(1).equal(shown.clean_prediction)
    assert net(shown.adversarial).argmax(1).equal(shown.adversarial_prediction)
    measure(net, data, ["natural"])
    assert measure.examples is None


# --- what looks wrong is said --------------------------------------------------------------------


def test_sound_results_have_no_flags(measure, digits, digits_net):
    assert not any(result.flags for result in measure(digits_net, digits, ALL).values())


class Scaled(nn.Module):
    """Logits so large that the softmax is exactly 0 or 1: cross-entropy has no gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


def test_saturated_model_is_flagged(measure, digits, digits_net):
    """Its accuracy under cross-entropy is an illusion; the loss that it is told to try shows it."""
    model = Scaled(digits_net)
    fooled = measure(model, digits, ["fgsm", "pgd-20"])
    for result in fooled.values():
        assert any("input gradient is exactly 0" in flag for flag in result.flags)
    honest = measure(model, digits, ["pgd-20"], loss="margin")["pgd-20"]
    assert honest.flags == []
    assert honest.accuracy < fooled["pgd-20"].accuracy - 0.2
    dlr = measure(model, digits, ["pgd-20"], loss="dlr")["pgd-20"]
    assert dlr.accuracy == pytest.approx(honest.accuracy, abs=0.05)


class Broken(nn.Module):
    """No numbers for images whose mean is above 0.3."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean(dim=(1, 2, 3), keepdim=True).flatten(1) > 0.3
        return self.net(x).masked_fill(bright, torch.nan)


def test_nan_is_no_right_answer(measure, digits, pixels, digits_net):
    """The argmax of NaN is class 0: zeros would be right, and stay so under any attack."""
    x, y = pixels
    dark = x.mean(dim=(1, 2, 3)) <= 0.3
    assert ((y == 0) & ~dark).sum() > 10, "or this test shows nothing"
    results = measure(Broken(digits_net), digits, ["natural", "pgd-5"])
    right = dark & (digits_net(x).argmax(1) == y)
    assert results["natural"].correct == right.sum()
    assert results["pgd-5"].correct <= right.sum()
    for result in results.values():
        json.dumps(result.record(), allow_nan=False)  # NaN is no JSON


class Masked(nn.Module):
    """Right at the image and at a full step from it, wrong between: what single steps overfit to.

    For grey images of 0.5; the margin of the true class 0 is 1 - 3 sin(pi h / eps) at a mean
    perturbation of h.
    """

    def forward(self, x: Tensor) -> Tensor:
        h = x.mean(dim=(1, 2, 3)) - 128 / 255
        margin = 1 - 3 * torch.sin(torch.pi * h.clamp_min(0) / 0.2) - h
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_fgsm_far_above_pgd_is_flagged(measure):
    grey = torch.full((20, 1, 4, 4), 128, dtype=torch.uint8)
    data = made_up(torch.zeros(20, dtype=torch.int64), grey, classes=2)
    results = measure(Masked(), data, ["fgsm", "pgd-10"])
    assert counts(results) == {"fgsm": 20, "pgd-10": 0}
    assert any("catastrophic overfitting" in flag for flag in results["pgd-10"].flags)


@pytest.mark.parametrize(
    ("weak", "strong", "flagged"),
    [(400, 400, False), (400, 410, False), (400, 500, True), (500, 400, False)],
)
def test_stronger_attack_that_leaves_more_is_flagged(weak, strong, flagged):
    """Beyond noise only."""
    results = [
        Result(f"pgd-{steps}", correct, 1000, None, 1, "", {"steps": steps, "restarts": 1})
        for steps, correct in ((10, weak), (50, strong))
    ]
    _flag_contradictions(results)
    assert [bool(result.flags) for result in results] == [False, flagged]


# --- a model that does not fit the data ----------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "classes", "loss", "said"),
    [
        ([0.5], 3, "ce", "10 classes and the model 3"),
        ([0.5] * 3, 10, "ce", "1 channels and the model takes 3"),
    ],
)
def test_model_of_other_data_is_refused(mean, classes, loss, said, measure, digits):
    names = [str(k) for k in range(classes)]
    model = build_model(PreActResNet18Options(width=2), mean, [0.3] * len(mean), names, 0)
    with pytest.raises(UserError, match=said):
        measure(model, digits, ["natural"], loss=loss)


@pytest.mark.parametrize("names", [["b", "a"], ["a", "c"]], ids=["other order", "another"])
def test_labels_of_other_classes_are_refused(names, measure):
    """As many classes as the model has, but label 0 or 1 means another one."""
    data = made_up(torch.tensor([0, 1, 1]), classes=2)
    data.classes[:] = ["a", "b"]
    model = build_model(PreActResNet18Options(width=2), [0.5], [0.3], names, 0)
    with pytest.raises(UserError, match=r"class [01] of made up is '.' and the model's '.'"):
        measure(model, data, ["natural"])


def test_dlr_needs_three_classes(measure):
    data = made_up(torch.tensor([0, 1, 1]), classes=2)
    model = build_model(PreActResNet18Options(width=2), [0.5], [0.3], data.classes, 0)
    for network in (model, nn.Sequential(model)):  # of ours, and of anybody
        with pytest.raises(UserError, match="dlr needs three classes"):
            measure(network, data, ["pgd-2"], loss="dlr")
    assert measure(model, data, ["pgd-2"], loss="margin")["pgd-2"].n == 3


def test_progress_counts_images(accelerator, digits, digits_net):
    said: list[tuple[str, int, int]] = []

    def progress(*what: object) -> None:
        said.append(what)

    options = EvalOptions(attacks=["pgd-2"], batch_size=200)
    evaluate(digits_net, digits, THREAT, options, accelerator, Supervision(progress))
    assert said == [("pgd-2", 200, 359), ("pgd-2", 359, 359)]


def test_the_same_evaluation_may_be_started_twice(accelerator, tmp_path):
    """Each process writes the file of both whole, and finds nothing of the other's half done."""
    about, entry = {"weights": "a"}, Entry(sums=[1.0] * 50)

    def write():
        unfinished = Unfinished(tmp_path, about, accelerator)
        for _ in range(100):
            unfinished.keep("pgd-10", entry)

    processes = [multiprocessing.get_context("fork").Process(target=write) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert Unfinished(tmp_path, about, accelerator).entries == {"pgd-10": entry}
    assert len(list(tmp_path.iterdir())) == 1


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("chunks_before", [0, 1, 3, 4, 5])  # three, then three
def test_an_interrupted_evaluation_goes_on(
    chunks_before, accelerator, digits, digits_net, tmp_path
):
    """In another chunk size too, with the figures of one that nothing happened to."""
    attacks, settings = ["natural", "pgd-3", "pgd-5-2"], {"seed": 3, "step_size": 0.1}
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls > chunks_before:
            raise Interrupted

    def run(size: int, between=lambda: None, about=None, progress=lambda *what: None):
        kept = Unfinished(tmp_path, {"about": about}, accelerator)
        options = EvalOptions(attacks=attacks, limit=90, batch_size=size, **settings)
        supervision = Supervision(progress, between, kept)
        results, examples = evaluate(digits_net, digits, THREAT, options, accelerator, supervision)
        kept.finished()
        return [result.record() | {"seconds": 0, "time": 0} for result in results], examples

    expected, pictures = run(90, about="another")
    with pytest.raises(Interrupted):
        run(30, between)
    assert len(list(tmp_path.iterdir())) == (chunks_before > 0)
    seen: list[tuple[str, int]] = []
    found, examples = run(20, progress=lambda attack, done, of: seen.append((attack, done)))
    for line, other in zip(found, expected, strict=True):
        loss, its_loss = line.pop("loss"), other.pop("loss")
        assert loss == (its_loss and pytest.approx(its_loss, rel=1e-4))
    assert found == expected
    assert torch.equal(examples.adversarial, pictures.adversarial)
    left = 90 - 30 * max(0, chunks_before - 3)
    chunks = [done for attack, done in seen if attack != "natural"]
    assert len(chunks) == -(-left // 20)  # nothing is done again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"natural": 1}', "[" * 10_000, '{"natural": {}}'])
def test_what_is_left_of_an_evaluation_may_be_damaged(content, accelerator, tmp_path, said):
    kept = Unfinished(tmp_path, {}, accelerator)
    kept.path.write_text(content)
    assert Unfinished(tmp_path, {}, accelerator).find("natural", 2) is None
    assert "measuring from the beginning" in said.text
