"""Images before and after an attack."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_adv.report.figures.album import Album
from dist_adv.report.tables import attack_name, threat_name
from dist_adv.runs.run import Examples, Run

_RIGHT, _WRONG = "#00704F", "#B84300"
_MAX_EXAMPLES = 8


def draw(album: Album, run: Run, who: str) -> None:
    """Draw the example images of a run, which is called `who` where it is not drawn."""
    examples = run.examples
    if examples is None:
        return
    count = min(len(examples.label), _MAX_EXAMPLES)
    clean, adversarial = examples.clean[:count], examples.adversarial[:count]
    change = adversarial - clean
    peak = float(np.abs(change).max())
    gain = max(1, int(0.5 / peak)) if peak else 1
    figure = Figure(figsize=(1.17 * count + 0.6, 4.8), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    rows = (
        ("clean", clean, examples.clean_prediction),
        (f"perturbation\n(amplified {gain} times)", np.clip(0.5 + gain * change, 0, 1), None),
        ("adversarial", adversarial, examples.adversarial_prediction),
    )
    for row, (name, images, predictions) in zip(grid, rows, strict=True):
        row[0].set_ylabel(name)
        for i, (axes, image) in enumerate(zip(row, images, strict=True)):
            show(axes, image)
            if predictions is not None:
                _caption(axes, examples, int(examples.label[i]), int(predictions[i]))
    attack = attack_name(examples.attack)
    kept = [
        int((predictions[:count] == examples.label[:count]).sum())
        for predictions in (examples.clean_prediction, examples.adversarial_prediction)
    ]
    album.add(
        figure,
        f"examples-{run.label}",
        f"Examples under {attack}",
        f"{count} test images, the perturbations that {attack} finds, and their sums: {who} "
        f"classifies {kept[0]} of the images rightly, and {kept[1]} of the sums.",
        f"Test images, the perturbations that {attack} finds within {threat_name(run)}, and their "
        "sums. Grey means no change, as where the model errs on the image as it is; the "
        f"perturbation is amplified {gain} times to be seen at all. Under each image stand its "
        "true class and, after the arrow, the prediction: "
        "green with a check mark if right, red with a cross if wrong.",
    )


def show(axes: Axes, image: np.ndarray) -> None:
    """Show the image (C, H, W) in [0, 1]; the mean of channels that are neither grey nor RGB."""
    pixels = np.moveaxis(image, 0, -1)
    if pixels.shape[-1] not in (1, 3):
        pixels = pixels.mean(-1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color="#cccccc")


def _caption(axes: Axes, examples: Examples, label: int, prediction: int) -> None:
    right = prediction == label
    axes.set_xlabel(
        f"{examples.classes[label]}\n"
        f"\N{RIGHTWARDS ARROW} {examples.classes[prediction]} "
        + ("\N{CHECK MARK}" if right else "\N{BALLOT X}"),
        color=_RIGHT if right else _WRONG,
        fontsize=8,
    )
