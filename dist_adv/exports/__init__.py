"""A trained model as a folder to hand on: for the Hub, RobustBench, ONNX Runtime, torch.export."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dist_adv import files
from dist_adv.exports import card, graphs, robustbench
from dist_adv.exports.finished import Asked, Finished, read_finished

_WRITERS: Mapping[str, Callable[[Finished, Asked, Path], str]] = {
    "hub": card.write,
    "robustbench": robustbench.write,
    "onnx": graphs.write_onnx,
    "torch-export": graphs.write_program,
}


def export_run(run_dir: Path, out: Path, kind: str = "hub", asked: Asked | None = None) -> str:
    """Write a finished run to the new folder `out`, whole or not at all.

    kind: hub, robustbench, onnx or torch-export.

    Returns what was verified of it; for the Hub, whose files are the run's own, nothing.

    Raises UserError where the run has no final weights, does not fit the format, or `out` exists;
    RunFailure where the disk refuses, or where what was written gives other logits.
    """
    run = read_finished(run_dir)
    with files.new_folder(out) as folder:
        return _WRITERS[kind](run, asked or Asked(), folder)
