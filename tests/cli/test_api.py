"""Training and evaluation from Python: networks, images and methods that a program gives."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

import dist_adv
from cases import make_images
from dist_adv.api import _tensors
from dist_adv.data import load_dataset
from dist_adv.distributed.start import as_it_was
from dist_adv.errors import UserError
from dist_adv.training import checks
from made_up_method import Carrying

TREE: dict[str, Any] = {
    "method": {"name": "natural"},
    "threat": {"eps": 0.1},
    "train": {"epochs": 2, "batch_size": 20, "threads": 1, "precision": "fp32"},
    "data": {"augment": False},
    "eval": {"attacks": ["natural"], "every": 0},
    "track": {"wandb": {"mode": "disabled"}},
}


def images(n: int = 60) -> tuple[Tensor, Tensor]:
    """Of three classes, the brighter the higher."""
    y = torch.arange(n) % 3
    noise = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (255 * (0.2 * noise + 0.3 * y[:, None, None, None])).byte(), y


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 12), nn.ReLU(), nn.Linear(12, 3))


class Pictures(torch.utils.data.Dataset):
    """Map-style, of pictures as Pillow has them."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.x, self.y = pair

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.x[i].permute(1, 2, 0).numpy()), int(self.y[i])


class Several(nn.Module):
    """Returns more than its logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :3], x


class Tutorial(nn.Module):
    """Flattens its feature map by `view`, which refuses one with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve, self.classify = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.convolve(x).relu(), 2)
        return self.classify(x.view(x.size(0), -1))


def test_a_network_may_take_views(tmp_path: Path) -> None:
    data, theirs = images(), Tutorial()
    tree = TREE | {"method": {"name": "pgd", "steps": 2, "alpha": 0.05}}
    dist_adv.train(tree, tmp_path / "run", model=theirs, data=(data, data))
    attacks = ["natural", "pgd-2", "autoattack"]
    dist_adv.evaluate(theirs, data, threat=dist_adv.Linf(0.01), attacks=attacks, limit=6)


def test_a_network_is_refused_where_amx_gets_it_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU is pretended; in bf16 it strides by 2 over a map of 1x1."""
    monkeypatch.setattr(checks, "has_amx", lambda: True)
    theirs = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Flatten()
    )
    data = images()
    tree = TREE | {"train": TREE["train"] | {"precision": "bf16"}}
    with pytest.raises(UserError, match=r"1 \(stride 2, a map of 1x1\); use fp32"):
        dist_adv.train(tree, tmp_path / "run", model=theirs, data=(data, data))
    assert not (tmp_path / "run").exists()
    dist_adv.train(TREE, tmp_path / "run", model=theirs, data=(data, data))


def test_a_network_starts_from_its_weights_and_has_the_trained_ones(tmp_path: Path) -> None:
    """As a plain loop over the same batches trains it; images are what the network gets."""
    data, theirs = images(), network()
    before = copy.deepcopy(theirs.state_dict())
    schedule = {"optim": {"schedule": "constant", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}}
    tree = TREE | schedule | {"train": TREE["train"] | {"batch_size": 60}}
    run = dist_adv.train(tree, tmp_path / "run", model=theirs, data=(data, data))
    ours = network()
    ours.load_state_dict(before)
    x = data[0].float() / 255
    for _ in range(2):
        loss = nn.functional.cross_entropy(ours(x), data[1])
        gradients = torch.autograd.grad(loss, list(ours.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(ours.parameters(), gradients, strict=True):
                weight -= 0.1 * gradient
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(weight, ours.state_dict()[name])
    assert run.evaluations["natural"].n == 60
    assert run.config["data"]["name"] == "given:images"


class Tuned(nn.Module):
    """For fine-tuning: BatchNorm stays in eval mode, the first layer as it is; two are one."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = dist_adv.models.layers.Normalize([0.4], [0.2])
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first.requires_grad_(False)
        block = nn.Conv2d(6, 6, 3, padding=1)
        self.blocks, self.last = nn.ModuleList([block, block]), nn.Linear(6, 3)

    def train(self, mode: bool = True) -> "Tuned":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.normalize(x)))
        for block in self.blocks:
            x = block(x).relu()
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["natural", "fast", "pgd", "free", "nuat", "consistency"])
@pytest.mark.parametrize("awp", [None, {}])
def test_a_network_is_trained_as_it_says(method: str, awp: Any, tmp_path: Path) -> None:
    theirs, data = Tuned(), images(20)
    before = copy.deepcopy(theirs.state_dict())
    tree = TREE | {"method": {"name": method}, "awp": awp}
    dist_adv.train(tree, tmp_path, model=theirs, data=(data, data))
    after = theirs.state_dict()
    assert {name for name in before if after[name].equal(before[name])} == {
        *("first.weight", "first.bias", "normalize.mean", "normalize.std"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    }
    assert after["blocks.0.weight"].equal(after["blocks.1.weight"])


def test_images_that_are_given_need_no_framing(tmp_path: Path) -> None:
    """A configuration of pictures, which has them cropped and resized."""
    framing = {"size": 32, "shorter": 36, "crop_scale": [0.5, 1], "randaugment": {"ops": 1}}
    tree = TREE | {"data": {"name": "imagefolder", "root": "none", **framing}}
    run = dist_adv.train(tree, tmp_path, model=network(), data=(images(), images()))
    assert run.config["data"]["size"] is None


def test_the_same_call_finds_the_run_done(tmp_path: Path) -> None:
    data = images()
    first, second = network(), network()
    dist_adv.train(TREE, tmp_path, model=first, data=(data, data))
    dist_adv.train(TREE, tmp_path, model=second, data=(data, data))
    for name, weight in first.state_dict().items():
        assert weight.equal(second.state_dict()[name])
    with pytest.raises(UserError, match="holds a run with another configuration"):
        dist_adv.train(TREE | {"threat": {"eps": 0.2}}, tmp_path, model=first, data=(data, data))


def test_a_method_and_its_options(tmp_path: Path) -> None:
    tree = TREE | {"method": {"alpha": 0.02}}
    run = dist_adv.train(
        tree, tmp_path, method=Carrying, model=network(), data=(images(), images())
    )
    assert run.config["method"]["name"] == "made_up_method:Carrying"
    assert run.env["method"]["settings"] == "alpha 0.02"


def test_a_method_in_place_of_a_files_own(tmp_path: Path) -> None:
    """Whose options mean nothing to it."""
    file = tmp_path / "fast.yaml"
    tree = TREE | {"method": {"name": "fast", "alpha": 0.03, "init": "zero"}}
    file.write_text(yaml.safe_dump(tree))
    data = (images(), images())
    run = dist_adv.train(file, tmp_path / "run", method=Carrying, model=network(), data=data)
    assert run.config["method"]["name"] == "made_up_method:Carrying"


@pytest.mark.parametrize(
    ("name", "mirrored"),
    [("cifar10", True), ("imagefolder", True), ("digits", False), (None, False)],
)
def test_images_are_mirrored_where_those_of_the_configuration_are(
    name: str | None, mirrored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "dist_adv.api.train_run",
        lambda config, *_: seen.append(load_dataset(config.data, "train").flip),
    )
    monkeypatch.setattr("dist_adv.api.read_runs", lambda folders: folders)
    tree = TREE | {"model": {"name": "preact_resnet18"}, "data": {"name": name} if name else {}}
    dist_adv.train(tree, tmp_path, data=(images(), images()))
    assert seen == [mirrored]


def test_evaluation_of_any_network(tmp_path: Path) -> None:
    """Tensors, floats and pictures are the same images; the network stays as it was."""
    x, y = images()
    net = network().train()
    asked = {"threat": dist_adv.Linf(0.05), "attacks": ["natural", "pgd-3"], "batch_size": 16}
    results = [
        dist_adv.evaluate(net, given, **asked)
        for given in ((x, y), (x.float() / 255, y), Pictures((x, y)), (np.asarray(x), y.numpy()))
    ]
    with torch.no_grad():
        right = int((net(x.float() / 255).argmax(1) == y).sum())
    assert [each["natural"].correct for each in results] == [right] * 4
    assert len({each["pgd-3"].correct for each in results}) == 1
    assert net.training
    more = nn.Sequential(net, nn.ConstantPad1d((0, 5), -99.0))  # classes that no label has
    assert dist_adv.evaluate(more, (x, y), **asked)["natural"].correct == right
    assert results[0]["pgd-3"].settings["eps"] == 0.05


class Numbers(Pictures):
    """Map-style, of arrays as NumPy has them, channels first as in the pairs."""

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.x[i].numpy(), int(self.y[i])


class Palettes(Pictures):
    """Map-style, of pictures that hold the places of their colours in a table."""

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        picture, label = super().__getitem__(i)
        return picture.convert("P", palette=Image.Palette.ADAPTIVE), label


def test_what_pictures_and_arrays_are() -> None:
    x, y = images(6)
    x[:, :, :, 3:] = x[:, :, :, :3]  # few colours
    for kind in (Pictures, Numbers, Palettes):
        found, labels = _tensors(kind((x, y)))
        assert found.equal(x), kind
        assert labels.equal(y)


def test_a_networks_own_attributes_are_its_own() -> None:
    net = network()
    net.architecture = "three layers"
    found = dist_adv.evaluate(net, images(9), threat=dist_adv.Linf(0.05), attacks=["natural"])
    assert found["natural"].n == 9


def test_evaluation_of_a_network_that_was_trained_here(tmp_path: Path) -> None:
    """Labels are numbers, fewer than its classes perhaps, whatever the classes are called."""
    make_images(tmp_path / "pictures")
    tree = TREE | {
        "data": {"name": "imagefolder", "root": str(tmp_path / "pictures"), "augment": False}
    }
    model = {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 4}
    dist_adv.train(tree | {"model": model}, tmp_path / "run")
    x, y = images(12)
    asked = {"threat": dist_adv.Linf(0.05), "attacks": ["natural"]}
    for labels in (y, y % 2):
        found = dist_adv.evaluate(dist_adv.load_model(tmp_path / "run"), (x, labels), **asked)
        assert found["natural"].n == 12
    with pytest.raises(UserError, match=r"labels go from 3 to 3 and there are 3 classes"):
        dist_adv.evaluate(dist_adv.load_model(tmp_path / "run"), (x, 0 * y + 3), **asked)


@pytest.mark.parametrize("switch", ["allow_tf32", "fp32_precision"])
def test_the_program_has_its_accelerator_again(switch: str, tmp_path: Path) -> None:
    """Its precision, its threads and fp32's form too, however the calls end.

    torch raises where its older switch of fp32 is read after the newer was set.
    """
    data, matmul = images(), torch.backends.cuda.matmul
    wanted = {"allow_tf32": True, "fp32_precision": "tf32"}[switch]
    with as_it_was():
        theirs = Accelerator(cpu=True, mixed_precision="bf16")
        setattr(matmul, switch, wanted)
        threads = torch.get_num_threads() + 1
        torch.set_num_threads(threads)
        dist_adv.train(TREE, tmp_path, model=network(), data=(data, data))
        dist_adv.evaluate(network(), data, threat=dist_adv.Linf(0.1))
        with pytest.raises(UserError):
            dist_adv.evaluate(nn.Linear(5, 3), data, threat=dist_adv.Linf(0.1))
        assert theirs.mixed_precision == "bf16"
        with theirs.autocast():
            assert network()(torch.ones(1, 3, 6, 6)).dtype == torch.bfloat16
        assert torch.get_num_threads() == threads
        assert getattr(matmul, switch) == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": (torch.rand(4, 3, 6, 6) + 1, torch.arange(4))}, r"must be in \[0, 1\]"),
        ({"data": (torch.rand(4, 3, 6), torch.arange(4))}, r"not uint8 \(N, C, H, W\)"),
        (
            {"attacks": ["pdg-10"]},
            r"eval\.attacks\.?.*'pdg-10' is no attack.*did you mean 'pgd-10'",
        ),
        (
            {"model": nn.Linear(5, 3)},
            r"the model fails on images of shape \(2, 3, 6, 6\): RuntimeError: mat1",
        ),
        ({"model": nn.Identity()}, r"the model returns \(2, 3, 6, 6\) for 2 images of 3 classes"),
        ({"model": Several()}, r"the model returns tuple for 2 images of 3 classes"),
        ({"limt": 3}, r"eval\.limt: unknown key; did you mean 'eval.limit'|limt: unknown key"),
    ],
)
def test_what_cannot_be_evaluated(change: dict[str, Any], said: str) -> None:
    asked = {"model": network(), "data": images(), "threat": dist_adv.Linf(0.1)}
    with pytest.raises(UserError, match=said):
        dist_adv.evaluate(**asked | change)


def test_a_given_network_is_asked_for_where_nobody_gives_it(tmp_path: Path) -> None:
    """By another program: here one that has forgotten."""
    dist_adv.train(TREE, tmp_path / "run", model=network(), data=(images(), images()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_adv.plugins._FOUND", {})
        with pytest.raises(
            UserError, match="'given:Sequential' was given in Python; give it again"
        ):
            dist_adv.load_config(tmp_path / "run" / "config.yaml")
