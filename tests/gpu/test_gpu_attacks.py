"""A network is as robust on a GPU as on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from dist_adv.attacks import ascend, frozen
from dist_adv.attacks.threat import Linf
from dist_adv.config import EvalOptions
from dist_adv.data import DataOptions, load_dataset
from dist_adv.distributed import start
from dist_adv.evaluation.evaluate import evaluate

EPS, IMAGES = 0.2, 120


@contextmanager
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield start.start_accelerator("fp32")
    AcceleratorState._reset_state(reset_partial_state=True)


def robust_network() -> nn.Module:
    """A network of digits, of which some fall: trained on the CPU, with attacks in one step."""
    data = load_dataset(DataOptions(name="digits"), "train")
    x, y = data.images.float() / 255, data.labels
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(200):
        some = torch.randint(len(x), (128,))
        start_ = torch.empty_like(x[some]).uniform_(-EPS, EPS)
        with frozen(net) as model:
            delta = ascend(model, x[some], y[some], start_, Linf(EPS), 1, 1.25 * EPS)
        adam.zero_grad()
        F.cross_entropy(net(x[some] + delta), y[some]).backward()
        adam.step()
    return net


@pytest.mark.parametrize("attacks", [["natural", "fgsm", "pgd-20", "pgd-10-2"], ["autoattack"]])
def test_as_many_survive_as_on_a_cpu(attacks, gpu, started, monkeypatch):
    """Up to a few: whoever is close to a border may fall for another order of sums."""
    net, data = robust_network(), load_dataset(DataOptions(name="digits"), "test")
    options, threat = EvalOptions(attacks=attacks, limit=IMAGES), Linf(EPS)
    with on_cpu(monkeypatch) as accelerator:
        expected, _ = evaluate(net, data, threat, options, accelerator)
    found, _ = evaluate(net.to(gpu), data, threat, options, started("fp32"))
    for there, here in zip(found, expected, strict=True):
        assert there.n == here.n == IMAGES
        assert 0.2 < here.accuracy < 1
        assert abs(there.accuracy - here.accuracy) * IMAGES <= 2
