"""Networks: the published ones, rebuilt from their file alone, and files that are refused."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import dist_adv
from dist_adv.errors import UserError
from dist_adv.models import (
    PreActResNet18Options,
    ResNet50Options,
    WideResNetOptions,
    build_model,
    load_model,
    save_model,
)
from dist_adv.training import checks
from dist_adv.training.checks import check_strides
from made_up_runs import scrambled

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
CLASSES = [str(k) for k in range(10)]
SMALL = [
    PreActResNet18Options(width=4),
    PreActResNet18Options(width=8, norm="group"),
    PreActResNet18Options(width=4, shortcut="raw", final_norm=False),
    WideResNetOptions(depth=10, widen=2, width=4),
    WideResNetOptions(depth=8, widen=2, width=4, norm="group"),
    ResNet50Options(width=4),
    ResNet50Options(width=8, norm="group", stem="imagenet"),
]


def build(options, seed: int = 0):
    return build_model(options, MEAN, STD, CLASSES, seed)


def images(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (PreActResNet18Options(), 11_172_170),
        (WideResNetOptions(depth=28), 36_479_194),
        (WideResNetOptions(depth=32), 45_901_914),
        (WideResNetOptions(depth=34), 46_160_474),
        (ResNet50Options(stem="imagenet"), 23_528_522),
        (ResNet50Options(stem="cifar"), 23_520_842),
    ],
)
def test_number_of_parameters(options, parameters):
    """The published networks have so many (three channels, ten classes)."""
    with torch.device("meta"):
        model = build(options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_resnet50_is_torchvision_s():
    """Same names and shapes, and with the same weights the same logits."""
    theirs = scrambled(torchvision.models.resnet50(num_classes=10)).eval()
    ours = build(ResNet50Options(stem="imagenet", width=64)).eval()
    ours.net.load_state_dict(theirs.state_dict())
    x = images(2, 64)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        expected = theirs((x - mean) / std)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


class PublishedPreActBlock(nn.Module):
    """As in pytorch-cifar and Rice et al.'s robust_overfitting; raw: as in Wong et al.'s code."""

    def __init__(self, in_planes: int, planes: int, stride: int, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x):
        out = torch.relu(self.bn1(x))
        shortcut = x
        if hasattr(self, "shortcut"):
            shortcut = self.shortcut(x) if self.raw else self.shortcut(out)
        return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + shortcut


def published_preact_resnet18(width: int, raw: bool, final_norm: bool) -> nn.Module:
    planes = [width, width, *(width * 2**stage for stage in range(4) for _ in range(2))]
    blocks = [
        PublishedPreActBlock(planes[i + 1], planes[i + 2], 2 if i in (2, 4, 6) else 1, raw)
        for i in range(8)
    ]
    norm = [nn.BatchNorm2d(8 * width), nn.ReLU()] if final_norm else []
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        *blocks,
        *norm,
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("shortcut", ["activated", "raw"])
def test_preact_resnet18_is_the_published_one(shortcut, final_norm):
    """With the same weights, in the order in which both networks have them, the same logits."""
    theirs = scrambled(published_preact_resnet18(4, shortcut == "raw", final_norm)).eval()
    options = PreActResNet18Options(width=4, shortcut=shortcut, final_norm=final_norm)
    ours = build(options).eval()
    names, tensors = list(ours.net.state_dict()), list(theirs.state_dict().values())
    ours.net.load_state_dict(dict(zip(names, tensors, strict=True)))
    x = images(3, 32)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs((x - mean) / std), rtol=1e-4, atol=1e-5)


def test_shortcuts_of_the_same_weights_answer_otherwise():
    """No name and no shape tells the two apart: a file has to say which it is."""
    activated = build(PreActResNet18Options(width=4))
    raw = build(PreActResNet18Options(width=4, shortcut="raw"))
    raw.load_state_dict(activated.state_dict())
    assert (raw.eval()(images()) - activated.eval()(images())).abs().max() > 1e-3


@pytest.mark.parametrize("options", SMALL, ids=repr)
@pytest.mark.parametrize("size", [8, 32])
def test_any_image_size_and_both_norms(options, size):
    model = build(options).eval()
    logits = model(images(2, size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    kinds = {type(module) for module in model.modules()}
    assert (nn.BatchNorm2d in kinds) == (options.norm == "batch")
    assert (nn.GroupNorm in kinds) == (options.norm == "group")


GRADIENTS = """
import torch
from dist_adv.models.layers import conv

torch.manual_seed(0)
for inputs in (1, 2, 4, 7, 12, 16):
    for size in (8, 15, 32, 64):
        layer = conv(inputs, 2 * inputs, kernel=1, stride=2).to(memory_format=torch.channels_last)
        x = torch.rand(32, inputs, size, size).to(memory_format=torch.channels_last)
        y = layer(x.requires_grad_())
        ours = torch.autograd.grad(y, (layer.weight, x), out := torch.rand_like(y))
        with torch.backends.mkldnn.flags(enabled=False):
            plain = torch.nn.functional.conv2d(x, layer.weight, stride=2)
            theirs = torch.autograd.grad(plain, (layer.weight, x), out)
        for one, other in zip((y, *ours), (plain, *theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert ours[1].is_contiguous(memory_format=torch.channels_last)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_strided_projections_are_right_on_any_cpu(isa):
    """oneDNN's own corrupt the heap where channels are few: at any size with AVX2, from 48 on
    with AVX-512. A CPU that has more than it is told to use is as one that has not."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", GRADIENTS], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("options", [each for each in SMALL if each.norm == "group"], ids=repr)
def test_group_norm_mixes_no_samples(options):
    """In train mode too: what makes the weights the same at any number of ranks."""
    model, x = build(options).double().train(), images().double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_width_sets_the_channels():
    for width in (4, 6, 16):
        model = build(PreActResNet18Options(width=width))
        assert model.net.stem.out_channels == width
        assert model.net.linear.in_features == 8 * width


def test_wrn_depths_have_their_shortcuts():
    """Depth 6n + 2 is the network of Madry et al., whose shortcuts have no parameters."""
    for depth, projections in ((10, 3), (8, 0), (34, 3), (32, 0)):
        model = build(WideResNetOptions(depth=depth, widen=2, width=2))
        kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert kernels.count((1, 1)) == projections


@pytest.mark.parametrize("depth", [1, 4, 7, 9, 29, 31])
def test_wrn_of_no_depth(depth):
    with pytest.raises(ValueError, match="is not 6n"):
        WideResNetOptions(depth=depth)


def test_normalisation_is_inside():
    """Users hand over images in [0, 1]; the constants travel as buffers, not as parameters."""
    model, x = build(SMALL[0]).eval(), images()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    torch.testing.assert_close(model(x), model.net((x - mean) / std))
    state = model.state_dict()
    assert state["normalize.mean"].flatten().tolist() == pytest.approx(MEAN)
    assert state["normalize.std"].flatten().tolist() == pytest.approx(STD)
    assert not [name for name, _ in model.named_parameters() if "normalize" in name]


@pytest.mark.parametrize("options", SMALL[:5:3], ids=repr)
def test_weights_depend_on_the_seed_alone(options):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(options, 3).state_dict()
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    second, other = build(options, 3).state_dict(), build(options, 4).state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (
            lambda x: x[:, :1],
            ValueError,
            r"\(n, 3, height, width\).*not \(4, 1, 16, 16\)",
        ),
        (lambda x: x[:, [0, 1, 2, 0]], ValueError, r"not \(4, 4, 16, 16\)"),
        (lambda x: x.permute(0, 2, 3, 1), ValueError, r"not \(4, 16, 16, 3\)"),
        (lambda x: x[0], ValueError, r"not \(3, 16, 16\)"),
        (lambda x: (255 * x).byte(), TypeError, r"not torch.uint8; use x.float\(\) / 255"),
        (lambda x: x > 0.5, TypeError, "not torch.bool"),
    ],
)
def test_other_tensors_than_images_are_refused(spoil, error, said):
    """One channel would be broadcast to three, bytes be taken for floats of up to 255."""
    with pytest.raises(error, match=said):
        build(SMALL[0]).eval()(spoil(images()))


def test_doubles_are_rounded():
    """NumPy's floats have twice the digits of the weights."""
    model = build(SMALL[0]).eval()
    assert model(images().double()).equal(model(images()))
    assert model.double()(images()).dtype == torch.float64


def by_compile(model: nn.Module, x: torch.Tensor):
    return torch.compile(model, backend="eager", fullgraph=True)


def by_export(model: nn.Module, x: torch.Tensor):
    sizes = {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()


@pytest.mark.parametrize(
    "make",
    [
        by_compile,
        by_export,
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.jit.script(model),
        lambda model, x: torch.fx.symbolic_trace(model),
        lambda model, x: copy.deepcopy(model),
    ],
    ids=["compile", "export", "trace", "script", "fx", "deepcopy"],
)
def test_others_take_the_network_apart(make):
    """The check of the images is no branch that tracing would stumble over, or warn of."""
    model, x = build(SMALL[0]).eval(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        made = make(model, x)
    with torch.no_grad():
        torch.testing.assert_close(made(x[:2]), model(x[:2]))


def test_half_precision():
    model = build(SMALL[0]).eval()
    with torch.no_grad():
        expected = model(images())
        found = model.bfloat16()(images().bfloat16())
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


# --- files ---------------------------------------------------------------------------------------


def saved(path: Path, options=SMALL[0]):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = scrambled(build(options)).eval()
    save_model(path, model.architecture, model.state_dict())
    return model.to(memory_format=torch.contiguous_format)  # as `load_model` returns it


@pytest.mark.parametrize("options", SMALL, ids=repr)
@pytest.mark.parametrize("as_folder", [True, False])
def test_round_trip_is_bit_for_bit(options, as_folder, tmp_path):
    model = saved(tmp_path / "model.safetensors", options).train()
    again = dist_adv.load_model(tmp_path if as_folder else tmp_path / "model.safetensors")
    assert again.architecture == model.architecture
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(state[name].equal(tensor) for name, tensor in again.state_dict().items())
    assert not any(module.training for module in again.modules())
    assert again(images()).equal(model.eval()(images()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_file_from_before_there_was_a_choice_of_shortcuts(tmp_path):
    """Its architecture has no such keys, and the network is the one that there was."""
    model = saved(tmp_path / "model.safetensors")
    old = {key: model.architecture["model"][key] for key in ("name", "width", "norm")}
    save_model(
        tmp_path / "model.safetensors", model.architecture | {"model": old}, model.state_dict()
    )
    again = load_model(tmp_path)
    assert again(images()).equal(model(images()))
    assert again.architecture == model.architecture


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "executed")


def pickled(path: Path) -> bytes:
    return pickle.dumps({"weights": Payload(path.parent / "canary")})


def torch_saved(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Payload(path.parent / "canary")}, buffer)
    return buffer.getvalue()


def with_metadata(path: Path, metadata: dict[str, str] | None) -> bytes:
    save_file({"weight": torch.zeros(3)}, path, metadata)
    return path.read_bytes()


def architecture(**changes: object) -> dict[str, str]:
    model = {"name": "preact_resnet18", "width": 4, "norm": "batch"}
    whole = {"model": model, "mean": MEAN, "std": STD, "classes": CLASSES} | changes
    kept = {key: value for key, value in whole.items() if value is not None}
    return {"architecture": json.dumps(kept)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path: None, "no such weights file; has the run finished"),
        (lambda path: b"", "not a readable safetensors file"),
        (lambda path: b"garbage" * 100, "not a readable safetensors file"),
        (lambda path: path.read_bytes()[:100], "not a readable safetensors file"),
        (lambda path: path.read_bytes()[: path.stat().st_size // 2], "not a readable safetensors"),
        (lambda path: path.read_bytes()[:-1], "not a readable safetensors file"),
        (pickled, "not a readable safetensors file"),
        (torch_saved, "not a readable safetensors file"),
        (lambda path: with_metadata(path, None), "has no architecture of dist_adv"),
        (lambda path: with_metadata(path, {"format": "pt"}), "has no architecture of dist_adv"),
        (lambda path: with_metadata(path, {"architecture": "vit"}), "has no architecture"),
        (lambda path: with_metadata(path, {"architecture": '"vit"'}), "has no architecture"),
        (lambda path: with_metadata(path, {"architecture": "[]"}), "has no architecture"),
        (
            lambda path: with_metadata(path, architecture(model={"name": "vit"})),
            "'vit' is not known",
        ),
        (lambda path: with_metadata(path, architecture(classes=None)), "has no architecture"),
        (lambda path: with_metadata(path, architecture(mean=None)), "has no architecture"),
        (lambda path: with_metadata(path, architecture()), "weights do not fit"),
    ],
)
def test_file_that_is_no_model(content, said, tmp_path):
    """One line that names the file; nothing in it is ever executed."""
    path = tmp_path / "model.safetensors"
    saved(path)
    replacement = content(path)
    path.unlink()
    if replacement is not None:
        path.write_bytes(replacement)
    for given in (path, tmp_path):
        with pytest.raises(UserError, match=said) as raised:
            load_model(given)
        assert str(tmp_path) in str(raised.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("precision", "amx", "pixels", "refused"),
    [
        ("bf16", True, 2, True),
        ("bf16", True, 4, False),
        ("bf16", False, 2, False),
        ("no", True, 2, False),
    ],
)
def test_strides_that_amx_gets_wrong(
    precision: str, amx: bool, pixels: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU is pretended: of most machines it is another."""
    monkeypatch.setattr(checks, "has_amx", lambda: amx)
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"))
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 1, stride=2),  # a pixel's product, whatever the stride
        nn.BatchNorm2d(4),  # which takes no statistics of one image
    )
    told = (
        pytest.raises(UserError, match=r"train\.precision: .*: 1 \(stride 2, a map of 1x1\); use")
        if refused
        else nullcontext()
    )
    with told:
        check_strides(accelerator, network, (3, pixels, pixels))
    assert not any(module._forward_pre_hooks for module in network)
