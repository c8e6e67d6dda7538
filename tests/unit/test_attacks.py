"""The attack behind reported numbers: optimal where the optimum is known, no kinder than others.

Judges: closed forms for linear models, a plain loop without any bookkeeping, foolbox, torchattacks.
"""

from itertools import pairwise

import foolbox
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks import PGD, ascend, frozen, parse_attack
from dist_adv.attacks.threat import L2, Linf, build
from dist_adv.config import EvalOptions
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.evaluation.results import wilson

EPS = 0.2


def keys(n: int) -> Tensor:
    return rng.sample_keys(rng.stream_key(0, "attack"), torch.arange(n))


# --- linear models: the optimum is known ---------------------------------------------------------


def linear_problem(classes: int, low: float, high: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model, 200 images between `low` and `high`, and labels that are mostly right."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double().requires_grad_(False)
    model[1].weight.copy_(torch.randn(classes, 12, generator=draw))
    model[1].bias.copy_(-model[1].weight.sum(1) * (low + high) / 2)
    x = low + (high - low) * torch.rand(200, 3, 2, 2, generator=draw, dtype=torch.float64)
    logits = model(x)
    return model, x, torch.where(torch.arange(200) < 180, logits.argmax(1), logits.argmin(1))


def worst_margin(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    """The smallest margin of the true class over the other of two within the ball, exactly."""
    slope = (model[1].weight[y] - model[1].weight[1 - y]).view_as(x)
    logits = model(x)
    margin = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
    if norm == "l2":  # the pixels' limits are out of reach
        return margin.squeeze(1) - eps * slope.flatten(1).norm(dim=1)
    lowest = torch.minimum(slope * (-x).clamp_min(-eps), slope * (1 - x).clamp_max(eps))
    return margin.squeeze(1) + lowest.flatten(1).sum(1)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
@pytest.mark.parametrize(
    ("norm", "eps", "low", "high"),
    [("linf", 0.04, 0.25, 0.75), ("linf", 0.08, 0, 1), ("l2", 0.1, 0.25, 0.75)],
)
def test_optimal_on_a_linear_model(norm, eps, low, high, kind, loss):
    """Sample by sample: survivors are those that no perturbation of the ball could fool."""
    model, x, y = linear_problem(2, low, high)
    worst = worst_margin(model, x, y, norm, eps)
    assert worst.abs().min() > 1e-4, "no ties"
    fgsm, pgd = PGD(1, eps, init="zero", loss=loss), PGD(60, eps / 4, loss=loss)
    attack = fgsm if kind == "fgsm" else pgd
    outcome = attack(model, x, y, build(norm, eps), keys(200))
    survives = outcome.survives(attack.steps, 1)
    assert survives.equal(worst > 0)
    assert 50 < survives.sum() < 150
    logits = model(x + outcome.delta)
    reached = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
    torch.testing.assert_close(reached[survives], worst[survives], rtol=0, atol=1e-5)
    assert (reached[~survives] < 0).all()


def autoattack_dlr(logits: Tensor, y: Tensor) -> Tensor:
    """As in AutoAttack's `dlr_loss`."""
    ordered, index = logits.sort(dim=1)
    right = (index[:, -1] == y).to(logits.dtype)
    true = logits[torch.arange(len(y)), y]
    best_other = ordered[:, -2] * right + ordered[:, -1] * (1 - right)
    return -(true - best_other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def carlini_margin(logits: Tensor, y: Tensor) -> Tensor:
    one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return (logits * (1 - one_hot) - 1e4 * one_hot).max(1).values - (logits * one_hot).sum(1)


LOSSES = {
    "ce": lambda logits, y: -logits.log_softmax(1).gather(1, y[:, None]).squeeze(1),
    "margin": carlini_margin,
    "dlr": autoattack_dlr,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_published_one(loss, pixels, digits_net):
    """One L2 step shows the whole direction of the loss's gradient."""
    x, y = pixels
    start = x.clone().requires_grad_()
    gradient = torch.autograd.grad(LOSSES[loss](digits_net(start), y).sum(), start)[0]
    size = gradient.flatten(1).norm(dim=1)
    expected = L2(EPS).project(EPS * gradient / size.view(-1, 1, 1, 1), x)
    outcome = PGD(1, EPS, init="zero", loss=loss)(digits_net, x, y, L2(EPS), keys(len(x)))
    right = (outcome.fell_at >= 0) & (size > 1e-6)
    assert right.sum() > 300
    torch.testing.assert_close(outcome.delta[right], expected[right], rtol=1e-3, atol=1e-5)


def test_half_precision_does_not_lose_small_gradients():
    """A confident answer has gradients of 1e-9, below the smallest number of fp16."""
    half = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).half().requires_grad_(False)
    half[1].weight.copy_(torch.tensor([[0.5], [-0.5]]))
    half[1].bias.copy_(torch.tensor([19, 0]))
    x, y = torch.zeros(5, 3, 2, 2).half(), torch.zeros(5, dtype=torch.int64)
    outcome = PGD(1, 0.25, init="zero")(half, x, y, Linf(0.25), keys(5))
    assert outcome.attacked == 5
    assert outcome.zero_gradients == 0


# --- what an outcome says ------------------------------------------------------------------------

STEPS, RESTARTS = 8, 4


@pytest.fixture(scope="module")
def problem(subject):
    """Images and a radius at which some fall at once, some late, some in a later restart."""
    x, y = subject.x[:150], subject.y[:150]
    return subject.net, x, y, Linf(subject.eps), keys(len(x))


def shared(problem, steps: int = STEPS, restarts: int = RESTARTS, **more):
    return PGD(steps, problem[3].eps / 8, restarts, **more)(*problem)


def test_shorter_runs_are_read_off(problem):
    whole = shared(problem)
    some_fall_late = False
    for steps in range(1, STEPS + 1):
        alone = shared(problem, steps, 1)
        assert whole.survives(steps, 1).equal(alone.survives(steps, 1)), steps
        some_fall_late |= bool((whole.fell_at == steps).any())
    assert some_fall_late


def test_fewer_restarts_are_read_off(problem):
    whole = shared(problem)
    assert (whole.fell_in > 0).any(), "or this test shows nothing"
    for restarts in range(1, RESTARTS + 1):
        alone = shared(problem, STEPS, restarts)
        assert whole.survives(STEPS, restarts).equal(alone.survives(STEPS, restarts)), restarts


def test_stronger_attacks_leave_no_more(problem):
    whole = shared(problem)
    for strengths in (
        [(steps, 1) for steps in range(STEPS + 1)],
        [(STEPS, restarts) for restarts in range(1, RESTARTS + 1)],
    ):
        left = [whole.survives(*strength) for strength in strengths]
        assert all((after <= before).all() for before, after in pairwise(left))
        assert left[-1].sum() < left[0].sum()


def test_radius_zero_is_natural_accuracy(pixels, digits_net):
    x, y = pixels
    for norm in ("linf", "l2"):
        outcome = PGD(5, 0.01, 2)(digits_net, x, y, build(norm, 0.0), keys(len(x)))
        assert outcome.survives(5, 2).equal(digits_net(x).argmax(1) == y)
        assert not outcome.delta.any()


class RecordedStarts(Linf):
    """Remembers the random points that it gave."""

    def random(self, keys: Tensor, shape: torch.Size) -> Tensor:
        start = super().random(keys, shape)
        self.__dict__.setdefault("given", []).append(start)
        return start


def test_outcome_is_that_of_a_plain_loop(problem):
    """Which step and restart, with which perturbation: against a loop that skips nothing."""
    model, x, y, ball, sample_keys = problem
    recorded = RecordedStarts(ball.eps)
    ours = shared((model, x, y, recorded, sample_keys))
    wrong = model(x).argmax(1) != y
    fell_at, fell_in = torch.where(wrong, -1, STEPS + 1), torch.zeros_like(y)
    last = torch.zeros_like(x)
    assert len(recorded.given) == RESTARTS
    for restart, starts in enumerate(recorded.given):
        standing = (fell_at == STEPS + 1).nonzero().squeeze(1)
        assert len(starts) == len(standing)
        for i, start in zip(standing.tolist(), starts, strict=True):
            one = x[i : i + 1]
            adversarial = (one + start).clamp(0, 1)
            for step in range(STEPS + 1):
                adversarial.requires_grad_()
                logits = model(adversarial)
                last[i] = adversarial.detach() - one
                if logits.argmax(1) != y[i]:
                    fell_at[i], fell_in[i] = step, restart
                    break
                loss = F.cross_entropy(logits, y[i : i + 1])
                gradient = torch.autograd.grad(loss, adversarial)[0]
                moved = adversarial.detach() + ball.eps / 8 * gradient.sign()
                adversarial = one + (moved - one).clamp(-ball.eps, ball.eps)
                adversarial = adversarial.clamp(0, 1)
    assert ours.fell_at.equal(fell_at)
    assert ours.fell_in.equal(fell_in)
    # A sign may differ where a gradient is within rounding of 0.
    assert ((ours.delta - last).abs() > 1e-5).float().mean() < 1e-4


def test_outcome_belongs_to_the_sample(problem):
    """Whichever samples it is attacked with: the same starts, the same fall."""
    model, x, y, ball, sample_keys = problem
    whole, some = shared(problem), torch.arange(2, len(y), 3)
    part = shared((model, x[some], y[some], ball, sample_keys[some]))
    assert part.fell_at.equal(whole.fell_at[some])
    assert part.fell_in.equal(whole.fell_in[some])
    torch.testing.assert_close(part.delta, whole.delta[some])


def test_every_restart_has_its_own_starts(problem):
    model, x, y, ball, sample_keys = problem
    recorded = RecordedStarts(ball.eps)
    PGD(1, 1e-4, 3)(model, x, y, recorded, sample_keys)
    first, second, third = recorded.given
    assert not any(a[:50].equal(b[:50]) for a, b in [(first, second), (second, third)])


def test_done_samples_cost_nothing(problem, watching):
    """The model sees wrong samples once, fallen ones never again."""
    model, x, *_ = problem
    rows: list[int] = []
    with watching(model, lambda seen: rows.append(len(seen))):
        outcome = shared(problem)
    expected = [len(x)]
    right = outcome.fell_at >= 0
    never = outcome.fell_at == STEPS + 1
    for restart in range(RESTARTS):
        for step in range(STEPS + 1):
            later = (outcome.fell_in == restart) & (outcome.fell_at >= step)
            standing = never | (outcome.fell_in > restart) | later
            expected.append(int((right & standing).sum()))
    assert rows == expected
    assert len(x) > rows[1] > rows[-1] > 0


def test_wrong_samples_are_never_attacked(problem):
    model, x, y, *rest = problem
    wrong = y + torch.where(torch.arange(len(y)) % 3 == 0, 1, 0)
    outcome = shared((model, x, wrong.remainder(10), *rest))
    mistaken = model(x).argmax(1) != wrong.remainder(10)
    assert (outcome.fell_at == -1).equal(mistaken)
    assert outcome.attacked == (~mistaken).sum()
    assert not outcome.delta[mistaken].any()
    assert outcome.delta[~mistaken].flatten(1).any(1).all()


def test_all_wrong_is_no_error(problem):
    model, x, _, *rest = problem
    wrong = (model(x).argmax(1) + 1) % 10
    outcome = shared((model, x, wrong, *rest))
    assert outcome.attacked == outcome.zero_gradients == 0
    assert not outcome.survives(STEPS, RESTARTS).any()


def test_perturbations_are_valid(problem):
    for ball in (Linf(EPS), L2(1.0)):
        model, x, y, _, sample_keys = problem
        delta = PGD(5, ball.eps / 4, 2)(model, x, y, ball, sample_keys).delta
        size = delta.abs().amax() if ball.norm == "linf" else delta.flatten(1).norm(dim=1).max()
        assert size <= ball.eps * (1 + 1e-6)
        assert (x + delta).min() >= 0
        assert (x + delta).max() <= 1


def test_zero_gradients_are_counted(problem):
    _, x, y, *rest = problem
    flat = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)).requires_grad_(False)
    flat[1].weight.zero_()
    flat[1].bias.copy_(F.one_hot(torch.tensor(3), 10))
    outcome = shared((flat, x, y, *rest))
    assert outcome.attacked == outcome.zero_gradients == (y == 3).sum()
    flat[1].weight[3, 17] = 1  # of one pixel among many
    outcome = shared((flat, x, y, *rest))
    assert outcome.attacked == (y == 3).sum()
    assert outcome.zero_gradients == 0


# --- what an attack leaves alone -----------------------------------------------------------------


def partly_frozen(x: Tensor) -> nn.Sequential:
    """For images of this shape."""
    _, channels, height, width = x.shape
    linear = nn.Linear(4 * (height - 2) * (width - 2), 10)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), linear)
    model[0].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    return model.eval()


def untouched(model: nn.Module) -> bool:
    asked = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert asked == ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"]
    return all((parameter.grad == 7).all() for parameter in model.parameters())


@pytest.mark.parametrize("steps", [1, 3])
def test_model_is_left_as_it_was(steps, problem):
    _, x, y, ball, sample_keys = problem
    model = partly_frozen(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PGD(steps, 0.05, 2)(model, x, y, ball, sample_keys)
    with frozen(model):
        ascend(model, x, y, torch.zeros_like(x), ball, steps, 0.05)
    assert untouched(model)
    assert not model.training
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_parameters_are_frozen_meanwhile(problem, watching):
    _, x, y, ball, sample_keys = problem
    model = partly_frozen(x)
    asked: list[bool] = []

    def see(_: Tensor) -> None:
        asked.extend(parameter.requires_grad for parameter in model.parameters())

    with watching(model, see):
        PGD(2, 0.05)(model, x, y, ball, sample_keys)
    assert asked
    assert not any(asked)


def test_model_that_raises_is_left_as_it_was(problem):
    _, x, y, ball, sample_keys = problem
    model = partly_frozen(x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        PGD(2, 0.05)(model, F.pad(x, (0, 1, 0, 1)), y, ball, sample_keys)
    assert untouched(model)


def test_global_random_numbers_decide_nothing(problem):
    torch.manual_seed(1)
    first = shared(problem)
    torch.manual_seed(2)
    assert shared(problem).delta.equal(first.delta)


def test_works_where_gradients_are_off(problem):
    with torch.no_grad():
        assert shared(problem).delta.equal(shared(problem).delta)


# --- independent judges --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ball", "judge"),
    [
        (Linf(EPS), foolbox.attacks.LinfPGD),
        (L2(1.0), foolbox.attacks.L2PGD),
    ],
)
def test_steps_are_foolbox_s(ball, judge, subject):
    """From the same start, without stopping at success: the same image after several steps."""
    x, y, net = subject.x, subject.y, subject.net
    size = ball.eps / 4
    with frozen(net):
        ours = x + ascend(net, x, y, torch.zeros_like(x), ball, 6, size)
    attack = judge(abs_stepsize=size, steps=6, random_start=False)
    model = foolbox.PyTorchModel(net, bounds=(0, 1))
    _, theirs, _ = attack(model, x, y, epsilons=ball.eps)
    apart = (ours - theirs).abs().flatten(1).amax(1)
    # A sign may differ where a gradient is within rounding of 0.
    assert (apart < 1e-4).float().mean() > 0.99


def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    return torchattacks.PGD(model, eps, eps / 4, steps, random_start=True)(x, y)


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    attack = foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=steps, random_start=True)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1]


@pytest.mark.parametrize("judge", [by_torchattacks, by_foolbox])
@pytest.mark.parametrize("steps", [1, 20])
def test_others_find_the_same_accuracy(judge, steps, subject, accelerator):
    """Same radius, steps and step size: within the interval that is reported with ours."""
    x, y, net, eps = subject.x, subject.y, subject.net, subject.eps
    options = EvalOptions(attacks=["natural", f"pgd-{steps}"], step_size=eps / 4)
    results, _ = evaluate(net, subject.data, Linf(eps), options, accelerator)
    natural, ours = results
    assert ours.accuracy < natural.accuracy - 0.05, "or this test shows nothing"
    torch.manual_seed(0)
    theirs = (net(judge(net, x, y, eps, steps)).argmax(1) == y).float().mean()
    low, high = wilson(ours.correct, ours.n)
    assert low <= theirs.item() <= high


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "steps", "restarts"),
    [
        ("natural", "natural", 0, 1),
        ("fgsm", "fgsm", 1, 1),
        ("pgd-1", "pgd", 1, 1),
        ("pgd-20", "pgd", 20, 1),
        ("pgd-50-10", "pgd", 50, 10),
    ],
)
def test_name(name, kind, steps, restarts):
    attack = parse_attack(name)
    assert (attack.name, attack.kind, attack.steps, attack.restarts) == (
        name,
        kind,
        steps,
        restarts,
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pgd", "pgd-"),
        ("pdg-10", "did you mean 'pgd-10'"),
        ("pgd10", "did you mean 'pgd-10'"),
        ("natrual", "did you mean 'natural'"),
        ("FGSM", "is no attack"),
        ("pgd-0", "at least 1 step"),
        ("pgd-10-0", "at least 1 step and 1 restart"),
        ("pgd--1", "is no attack"),
        ("pgd-10-", "is no attack"),
        ("pgd-10-2-3", "is no attack"),
        ("pgd-1.5", "is no attack"),
        ("pgd-1e3", "is no attack"),
        ("pgd-10 ", "is no attack"),
        ("pgd-10\n", "is no attack"),
        ("pgd-1\u0660", "is no attack"),
        ("pgd-99999999999", "is no attack"),
        ("", "choose from"),
        ("zzz", "choose from natural, noise, fgsm"),
    ],
)
def test_bad_name(name, said):
    with pytest.raises(ValueError, match=said):
        parse_attack(name)
