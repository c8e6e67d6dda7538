"""`eval.compile`: the same figures, from a network whose layers are fused."""

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from attacked_by_ranks import short
from colours import colours
from dist_adv.attacks.threat import build
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.evaluation.evaluate import evaluate

ATTACKS = ["natural", "fgsm", "pgd-5", "autoattack"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return colours(61, seed=1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Right about most of the images; in fp64, so that nothing hangs on rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)),
    )
    many = colours(400)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(many.images / 255), many.labels).backward()
        optimizer.step()
    net.insert(0, Double())
    return net.double()


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def measured(
    network: nn.Module, data: Dataset, accelerator: Accelerator, **options: Any
) -> dict[str, tuple[int, float | None]]:
    with short(steps=4, queries=30):
        results, _ = evaluate(
            network,
            data,
            build("linf", 0.03),
            EvalOptions(attacks=ATTACKS, batch_size=40, **options),
            accelerator,
        )
    return {result.attack: (result.correct, result.loss) for result in results}


def test_a_graph_serves_any_number_of_images(
    network: nn.Module, data: Dataset, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with gradients and one without, whatever the mode and layout. Nothing is fused here."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    torch.compiler.reset()
    expected = measured(network, data, accelerator)
    found = measured(network, data, accelerator, compile="default")
    assert 0 < found["autoattack"][0] < found["pgd-5"][0] < found["natural"][0]
    assert found == expected
    assert len(graphs) == 2
    assert all(parameter.requires_grad for parameter in network.parameters())
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.compile
def test_a_fused_network_is_judged_alike(
    network: nn.Module, data: Dataset, accelerator: Accelerator
) -> None:
    expected = measured(network, data, accelerator)
    found = measured(network, data, accelerator, compile="default")
    for attack, (correct, loss) in expected.items():
        assert found[attack][0] == correct
        assert found[attack][1] == pytest.approx(loss, rel=1e-6)
