"""Networks as graphs that run without dist_adv: an ONNX file, or a program of torch.export.

One input, `images` (n, C, H, W), float32 in [0, 1], of any n; normalisation is inside.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_adv import packages, plugins
from dist_adv.errors import RunFailure, UserError
from dist_adv.exports.card import write_about
from dist_adv.exports.finished import Asked, Finished
from dist_adv.models import Classifier

# Of the largest logit. ONNX Runtime sums in another order than torch.
_TOLERANCE = 1e-4
_ONNX = """import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {{"images": images}})   # float32 (n, {}, {}, {}) in [0, 1]"""
_PROGRAM = """import torch
model = torch.export.load("model.pt2").module()
logits = model(images)   # float32 (n, {}, {}, {}) in [0, 1]"""


def write_onnx(run: Finished, asked: Asked, folder: Path) -> str:
    """Write model.onnx, whose output is `logits`; return how near it is to the network.

    Raises UserError where a package is missing, or the network cannot be exported.
    """
    for module in ("onnxscript", "onnxruntime"):
        packages.need(module, "--format onnx", "'dist-adv[onnx]'")
    import onnxruntime

    model, program = _program(run)
    path = folder / "model.onnx"
    try:
        converted = torch.onnx.export(program, dynamo=True, output_names=["logits"], verbose=False)
    except Exception as error:
        raise _unfit(run, error) from error
    assert converted is not None  # as it is for TorchScript only
    converted.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def read_back(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    verified = _compare(path.name, model, read_back, run.image())
    write_about(run, _ONNX.format(*run.image()), folder)
    return verified


def write_program(run: Finished, asked: Asked, folder: Path) -> str:
    """Write model.pt2; return how near it is to the network.

    Raises UserError where the network cannot be exported.
    """
    model, program = _program(run)
    path = folder / "model.pt2"
    torch.export.save(program, path)
    verified = _compare(path.name, model, torch.export.load(path).module(), run.image())
    write_about(run, _PROGRAM.format(*run.image()), folder)
    return verified


def _program(run: Finished) -> tuple[Classifier, torch.export.ExportedProgram]:
    model, images = run.model(), torch.rand(2, *run.image())
    sizes = {"images": {0: torch.export.Dim("n")}}
    try:
        return model, torch.export.export(model, (images,), dynamic_shapes=sizes)
    except Exception as error:
        raise _unfit(run, error) from error


def _unfit(run: Finished, error: Exception) -> UserError:
    name = run.architecture["model"]["name"]
    return UserError(
        f"{run.folder}: torch cannot export its network {name} ({plugins.told(error)[:300]}); "
        f"use --format hub"
    )


def _compare(
    name: str, model: Classifier, found: Callable[[Tensor], Tensor], image: tuple[int, ...]
) -> str:
    """Return by how much the logits of 1 and of 5 images differ. Raises RunFailure if they do."""
    furthest = 0.0
    with torch.inference_mode():
        for n in (1, 5):
            images = torch.rand(n, *image)
            expected = model(images)
            difference = (found(images) - expected).abs().max() / expected.abs().max()
            furthest = max(furthest, float(difference))
    if not furthest <= _TOLERANCE:  # NaN neither
        raise RunFailure(
            f"{name}: gives other logits than the network, by {furthest:.1e} of the largest; "
            f"nothing was exported"
        )
    return (
        f"verified: the logits of {name} are the network's to {furthest:.1e} of the largest, "
        f"for 1 and for 5 images"
    )
