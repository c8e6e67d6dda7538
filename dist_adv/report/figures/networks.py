"""Networks side by side: the loss around an image, and what a large attack makes of images."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dist_adv.report.figures.album import Album
from dist_adv.report.figures.colours import GREY
from dist_adv.report.figures.examples import show
from dist_adv.report.networks import Comparison, attack_of, grid_of
from dist_adv.report.tables import method_name, method_title
from dist_adv.text import percentage

_DOT = "#D55E00"


def draw(album: Album, comparison: Comparison) -> None:
    who = ", ".join(f"{run.label} ({method_name(run)})" for run in comparison.runs)
    chosen = f"Of each method the run with the best robust accuracy is shown: {who}."
    album.add(
        surfaces(comparison),
        "loss-surfaces",
        "The loss around a test image",
        f"A test image, and the loss around it as a surface under each of {_titles(comparison)}: "
        f"around all example images it moves by {_ranges(comparison)}.",
        f"The cross-entropy loss on {grid_of(comparison)}. Height and colour have one scale for "
        "all. The dot is the image, the one with the median range under the first network. Where "
        "the surface is steep, a change that nobody sees changes the answer; where it is bent, a "
        "single gradient step is a poor attack. Above each surface are range and deviation from "
        f"the table, means over all example images. {chosen}",
        f"around the images the loss moves by {_ranges(comparison)}.",
    )
    album.add(
        large_attacks(comparison),
        "large-perturbations",
        "What a large attack makes of test images",
        "A row of test images, and below it what the attack on each of "
        f"{_titles(comparison)} makes of them: the other networks see the class in "
        f"{_convinced(comparison)}.",
        "The top row says which class each image is driven to, the others what the attacked "
        f"network takes the result for, after {attack_of(comparison)}. A network that has to be "
        "shown shapes and colours of the class judges by what people see, too; one that is content "
        "with what looks like noise does not. Whether the other networks see the class is in the "
        f"table. {chosen}",
        "in the images made by attacking one network the others see the class, too, as often as "
        f"this: {_convinced(comparison)}.",
    )


def _titles(comparison: Comparison) -> str:
    return ", ".join(f"{method_title(run)} ({run.label})" for run in comparison.runs)


def _ranges(comparison: Comparison) -> str:
    return ", ".join(
        f"{surface.range.mean():.2f} ({method_title(run)})"
        for run, surface in zip(comparison.runs, comparison.landscape.surfaces, strict=True)
    )


def _convinced(comparison: Comparison) -> str:
    """How often, on average over the other networks, each attack's images reach their target."""
    count = len(comparison.runs)
    reached = comparison.landscape.reached[:count]
    others = (reached.sum(1) - reached.diagonal()) / (count - 1)
    return ", ".join(
        f"{percentage(share)} ({method_title(run)})"
        for run, share in zip(comparison.runs, others, strict=True)
    )


def surfaces(comparison: Comparison) -> Figure:
    """Return an image, and its loss surface under each network."""
    seen, examples = comparison.landscape.surfaces, comparison.examples
    ranges, count = seen[0].range, len(comparison.runs)
    shown = int(ranges.argsort()[(len(ranges) - 1) // 2])
    linf = comparison.landscape.attack.threat.norm == "linf"
    unit, offsets = "1/255" if linf else "L2 norm", seen[0].offsets * (255 if linf else 1)
    middle = len(offsets) // 2
    ticks = offsets[[0, middle, -1]]
    top = 1.02 * max(surface.loss[shown].max() for surface in seen)
    figure = Figure(figsize=(1 + 2.25 * count, 2.7))
    widths = (1, *[2.25] * count)
    right = 1 - 0.35 / figure.get_figwidth()  # room for the last axis's label
    sides = {"left": 0.01, "right": right, "bottom": 0.08, "top": 0.96}
    panels = figure.add_gridspec(1, count + 1, width_ratios=widths, wspace=0.1, **sides)
    image = figure.add_subplot(panels[0])
    show(image, examples.clean[shown])
    image.set_xlabel(examples.classes[examples.label[shown]])
    for i, (run, surface) in enumerate(zip(comparison.runs, seen, strict=True)):
        loss = surface.loss[shown]
        axes: Any = figure.add_subplot(panels[i + 1], projection="3d")
        axes.patch.set_visible(False)  # it would cover a label of the panel before
        axes.plot_surface(
            *np.meshgrid(offsets, offsets),
            loss,
            cmap="viridis",
            vmin=0,
            vmax=top,
            edgecolor="white",
            linewidth=0.25,
        )
        axes.plot(0, 0, loss[middle, middle], "o", color=_DOT, markeredgecolor="white", zorder=9)
        numbers = f"range {surface.range.mean():.2f}, deviation {surface.deviation.mean():.2f}"
        axes.set_title(f"{method_title(run)}\n{numbers}", y=0.97)
        axes.set(zlim=(0, top), xticks=ticks, yticks=ticks)
        axes.set_xlabel(f"adversarial\n({unit})", labelpad=-2)
        axes.set_ylabel(f"random\n({unit})", labelpad=-2)
        axes.set_zlabel("loss", labelpad=-4)
        axes.tick_params(pad=-2, labelsize=8)
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.view_init(elev=20, azim=-60)
        axes.set_box_aspect((1, 1, 0.9), zoom=0.95)
    return figure


def large_attacks(comparison: Comparison) -> Figure:
    """Return a row of test images, and below it what the attack on each network makes of them."""
    landscape, examples = comparison.landscape, comparison.examples
    names = examples.classes
    rows, count = len(comparison.runs) + 1, len(examples.label)
    figure = Figure(figsize=(1.17 * count + 0.6, 1.45 * rows), layout="constrained")
    clean, *made = figure.subplots(rows, count, squeeze=False)
    clean[0].set_ylabel("clean")
    for i, axes in enumerate(clean):
        show(axes, examples.clean[i])
        target = names[landscape.target[i]]
        axes.set_xlabel(f"{names[examples.label[i]]}\n\N{RIGHTWARDS ARROW} {target}", fontsize=8)
    for run, row, images, answers in zip(
        comparison.runs, made, landscape.made, landscape.answer, strict=True
    ):
        row[0].set_ylabel(method_title(run))
        for i, axes in enumerate(row):
            show(axes, images[i])
            reached = answers[i] == landscape.target[i]
            mark = "\N{CHECK MARK}" if reached else "\N{BALLOT X}"
            colour = "black" if reached else GREY
            axes.set_xlabel(f"{names[answers[i]]} {mark}", fontsize=8, color=colour)
    return figure
