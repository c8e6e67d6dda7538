"""Other libraries' attacks on the network of `load_model`, and AutoAttack, on colour images.

Every attack of torchattacks, foolbox and ART within an L-inf or L2 ball takes it as it is: images
in the usual layout go in, finite ones within the ball come out. What is left out is named with
the reason. Budgets are tiny: that they run is tested here, how strong they are is not.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import art.attacks.evasion
import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from dist_adv.models import Classifier, PreActResNet18Options, build_model, load_model, save_model

LINF, L2 = 8 / 255, 0.5
Ball = tuple[str, float] | None
"""Norm and radius, or None for an attack that looks for the smallest change and has no radius."""
Case = tuple[dict[str, Any], Ball]

NO_BALL = None
IN_LINF, IN_L2 = ("linf", LINF), ("l2", L2)


@pytest.fixture(scope="module")
def model(colours, tmp_path_factory) -> Classifier:
    """A network that `load_model` read, in train.py's layout when it was written."""
    net = build_model(PreActResNet18Options(width=4), [0.5] * 3, [0.25] * 3, colours.classes, 0)
    x, y = colours.images.float() / 255, colours.labels
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for start in range(0, len(x), 50):
        loss = F.cross_entropy(net(x[start : start + 50]), y[start : start + 50])
        adam.zero_grad()
        loss.backward()
        adam.step()
    path = tmp_path_factory.mktemp("colours") / "model.safetensors"
    save_model(path, net.architecture, net.state_dict())
    return load_model(path)


@pytest.fixture(scope="module")
def batch(model, colours) -> tuple[Tensor, Tensor]:
    """Six images that the network is right about."""
    x, y = colours.images.float() / 255, colours.labels
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:6]
    assert len(right) == 6
    return x[right], y[right]
