"""Training and evaluation from Python: on any network, any images, any method.

Under a launcher (torchrun, accelerate launch) every rank runs the program and makes the same calls.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_adv import data as datasets
from dist_adv import methods, models, plugins
from dist_adv.attacks.threat import Threat
from dist_adv.config import Config, EvalOptions, load_config, parse_config
from dist_adv.data import DataOptions
from dist_adv.distributed.start import as_it_was, start_accelerator
from dist_adv.evaluation import evaluate as evaluation
from dist_adv.evaluation.doubts import doubts
from dist_adv.evaluation.results import Result
from dist_adv.methods import Method
from dist_adv.models import ModelOptions
from dist_adv.runs.run import Run, read_runs
from dist_adv.training.run import train_run

Images = tuple[Any, Any] | torch.utils.data.Dataset[Any]
"""Images and labels: a pair of tensors (N, C, H, W) and (N,), or a map-style Dataset of pairs.

Images are uint8, or float in [0, 1] of which 256 levels are kept.
"""


def train(
    config: Config | Mapping[str, Any] | str | Path,
    run_dir: str | Path,
    *,
    model: nn.Module | None = None,
    data: tuple[Images, Images] | None = None,
    method: type[Method[Any]] | None = None,
    resume: str = "auto",
) -> Run:
    """Train in a run folder and evaluate the final weights, or go on with what is there.

    Args:
        config: a configuration, its tree, or a YAML file; what is given below replaces the kind
            of its section, whose other keys stay.
        run_dir: the folder of the run; one that exists goes on.
        model: a network, images (n, C, H, W) in [0, 1] to logits (n, classes). It starts from the
            weights that it has, and has the trained ones in the end.
        data: images to train on and to test on, in place of `data.name`. They are mirrored at
            random where those are: CIFAR's and folders', not digits; and never without a name.
        method: a class of training methods; its options are those of the section `method`.
        resume: `auto`, `none` for a new folder, or a checkpoint to start from.

    Returns:
        The run as reports read it: `evaluations`, `epochs`, `folder`.

    Raises:
        UserError: the pieces do not fit.
        RunFailure: the run cannot go on.
        Preempted: it was asked to stop; the same call goes on.
    """
    tree = _tree(config)
    if model is not None:
        name = plugins.give(type(model).__name__, models.GROUP, _Network(model))
        tree["model"] = {"name": name}
    if data is not None:
        mirrored = tree.get("data", {}).get("name") in datasets.MIRRORED
        name = plugins.give("images", datasets.GROUP, _Pair(*data, flip=mirrored))
        common = DataOptions.model_fields.keys() - {"name", "root", *datasets.RESIZING}
        section = {key: value for key, value in tree.get("data", {}).items() if key in common}
        tree["data"] = section | {"name": name}
    if method is not None:
        name, section = plugins.refer(method, methods.GROUP), tree.get("method", {})
        if not isinstance(config, Mapping):  # a whole one, with all that its own method has
            section = {key: section[key] for key in method.Options.model_fields if key in section}
        tree["method"] = section | {"name": name}
    with as_it_was():
        train_run(parse_config(tree, "config"), Path(run_dir), resume)
    (run,) = read_runs([Path(run_dir)])
    if model is not None:
        weights = load_file(run.folder / "model.safetensors")
        model.load_state_dict({key: weights[f"net.{key}"] for key in model.state_dict()})
    return run


def evaluate(
    model: nn.Module,
    data: Images,
    *,
    threat: Threat,
    attacks: Sequence[str] = ("natural", "fgsm", "pgd-10"),
    **options: Any,
) -> dict[str, Result]:
    """Measure a network's accuracy under attacks, in eval mode and fp32.

    Args:
        model: images (n, C, H, W) in [0, 1] to logits (n, classes); normalisation inside. Its mode
            and device are what they were afterwards.
        data: the images to measure on.
        threat: the ball, such as `dist_adv.Linf(8 / 255)` or `dist_adv.L2(0.5)`.
        attacks: names, as of `eval.attacks` in a configuration.
        **options: further keys of that section: limit, batch_size, step_size, loss, seed ...

    Returns:
        A result for each attack, by name: accuracy, n, settings, flags.

    Raises:
        UserError: an attack or option is not known, or the model does not fit the images.
    """
    tree = {"method": {"name": "natural"}, "eval": {"attacks": list(attacks), **options}}
    chosen: EvalOptions = parse_config(tree, "evaluate").eval
    known = model.architecture["classes"] if isinstance(model, models.Classifier) else None
    images = datasets.of_tensors("given:images", *_tensors(data), known)
    first = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(0))
    training = {module: module.training for module in model.modules()}
    with as_it_was():
        accelerator = start_accelerator("fp32")
        try:
            model.to(accelerator.device)
            shape, classes = images.images.shape[1:], len(images.classes)
            models.check_answers(model, "the model", shape, classes, more=True)
            plain = model if isinstance(model, models.Classifier) else models.Contiguous(model)
            results, _ = evaluation.evaluate(plain, images, threat, chosen, accelerator)
            doubtful = doubts(plain, images, chosen) if "natural" in chosen.attacks else []
        finally:
            model.to(first.device)
            for module, mode in training.items():
                module.training = mode
    for result in results:
        result.flags.extend(doubtful if result.attack == "natural" else [])
    return {result.attack: result for result in results}


def _tree(config: Config | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, str | Path):
        config = load_config(config)
    return config.model_dump() if isinstance(config, Config) else dict(config)


class _Network:
    """Stands in a configuration for a network that a program gave: copies of it."""

    Options = ModelOptions
    normalize = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, options: ModelOptions, channels: int, classes: int) -> nn.Module:
        return copy.deepcopy(self.model)


class _Pair:
    """Stands in a configuration for the images that a program gave."""

    Options = DataOptions

    def __init__(self, train: Images, test: Images, flip: bool) -> None:
        self.flip = flip
        self.splits = {"train": _tensors(train), "test": _tensors(test)}

    def __call__(self, options: DataOptions) -> "_Pair":
        return self

    def load(self, split: str) -> tuple[Tensor, Tensor, list[str]]:
        """Return images, labels and the names of classes, which are those of both splits."""
        classes = 1 + max(int(labels.max()) for _, labels in self.splits.values())
        images, labels = self.splits[split]
        return images, labels, [str(label) for label in range(classes)]


def _tensors(given: Images) -> tuple[Tensor, Tensor]:
    if isinstance(given, tuple):
        images, labels = given
        return torch.as_tensor(images).cpu(), torch.as_tensor(labels).cpu()
    pairs = [given[i] for i in range(len(given))]  # type: ignore[arg-type]
    return torch.stack([_image(image) for image, _ in pairs]), torch.tensor(
        [int(label) for _, label in pairs]
    )


def _image(image: Any) -> Tensor:
    """Return (C, H, W) of numbers that are so, or of a picture of Pillow's."""
    if isinstance(image, Tensor | np.ndarray):
        return torch.as_tensor(image)
    palette = image.mode == "P"
    pixels = torch.from_numpy(np.array(image.convert("RGB") if palette else image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
