"""The curve: accuracy after an epoch, on held-out training images or else on test images."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from dist_adv.attacks.threat import Threat
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.results import Examples
from dist_adv.training.clock import Best, Clock


class Curve:
    """Points of the curve, each a measurement of one network, and the best epoch so far.

    held_out: the images are of the training split, so that they may choose a best epoch. Test
    images choose nothing.
    """

    def __init__(
        self,
        options: EvalOptions,
        images: Dataset,
        held_out: bool,
        threat: Threat,
        accelerator: Accelerator,
    ) -> None:
        attacks = ["natural", "fgsm", options.curve_attack]
        few = {"attacks": attacks, "limit": options.curve_limit, "compile": "none"}
        self.options = options.model_copy(update=few)
        self.images, self.held_out = images, held_out
        self.threat, self.accelerator = threat, accelerator
        self.best: Best | None = None

    def measure(
        self, model: nn.Module, between: Callable[[], None]
    ) -> tuple[dict[str, Any], Examples | None]:
        """Return the figures of a network by their names in metrics.jsonl, and example images.

        between: as of `evaluate`. Every rank calls this.
        """
        (natural, fgsm, pgd), examples = evaluate(
            model,
            self.images,
            self.threat,
            self.options,
            self.accelerator,
            Supervision(between=between),
        )
        figures = {
            "curve_split": "held-out" if self.held_out else "test",
            "test_loss": natural.loss,
            "test_accuracy": natural.accuracy,
            "fgsm_accuracy": fgsm.accuracy,
            "pgd_loss": pgd.loss,
            "pgd_accuracy": pgd.accuracy,
            "curve_attack": pgd.attack,
            "curve_n": pgd.n,
        }
        return figures, examples

    def remember(self, figures: dict[str, Any], clock: Clock, epochs: float) -> None:
        """Take an epoch for the best so far where its figures on held-out images say so."""
        accuracy = figures["pgd_accuracy"]
        if self.held_out and (not self.best or accuracy > self.best.accuracy):
            self.best = Best(clock.step, epochs, accuracy)
