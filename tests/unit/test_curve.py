"""Points of the curve: what is measured, on how many images, and what may choose a best epoch."""

import pytest
from accelerate import Accelerator
from torch import nn

from dist_adv.attacks.threat import Linf
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.training.clock import Best, Clock
from dist_adv.training.curve import Curve


@pytest.mark.parametrize("held_out", [True, False])
def test_a_point(
    held_out: bool, accelerator: Accelerator, digits: Dataset, digits_net: nn.Module
) -> None:
    options = EvalOptions(curve_attack="pgd-2", curve_limit=50, limit=7)
    curve = Curve(options, digits, held_out, Linf(0.2), accelerator)
    figures, examples = curve.measure(digits_net, lambda: None)
    assert curve.best is None
    curve.remember(figures, Clock(epoch=3, step=12), 3.0)
    assert (figures["curve_attack"], figures["curve_n"]) == ("pgd-2", 50)
    assert figures["curve_split"] == ("held-out" if held_out else "test")
    accuracies = [figures[f"{name}_accuracy"] for name in ("test", "pgd", "fgsm")]
    assert accuracies == sorted(accuracies, reverse=True)  # PGD-2 goes half as far as FGSM
    assert examples is not None
    assert curve.best == (Best(12, 3.0, figures["pgd_accuracy"]) if held_out else None)
