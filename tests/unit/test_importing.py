"""Somebody's checkpoint answers as its own network does, or one line says what it is."""

import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import public_networks as public
from colours import colours, learn
from dist_adv import cli, load_model
from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.importing.choice import Choice, choose
from dist_adv.importing.normalisation import settle
from dist_adv.models import PreActResNet18Options, WideResNetOptions, build_model
from dist_adv.models.foreign_keys import PUBLIC, public_keys, sizes

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
BUFFERS = [*MEAN, *STD]


def read(file: Path, network: str, *overrides: str, normalise: str | None = None) -> Choice:
    names = ["method.name=natural", f"model.name={network}"]
    return choose(file, load_config(None, [*names, *overrides]), normalise)


def answers(net: nn.Module, size: int = 16) -> Tensor:
    x = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return net(x)


def check_same(choice: Choice, theirs: nn.Module) -> None:
    """To the rounding of sums in another order; logits of these networks are far apart."""
    ours = answers(choice.build([str(k) for k in range(choice.classes)]))
    expected = answers(theirs)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# --- the formats of the field --------------------------------------------------------------------


def as_fast_adversarial(path: Path) -> nn.Module:
    """The state itself; images are normalised outside of the network."""
    net = public.scrambled(public.PreActResNet(raw=True))
    torch.save(net.state_dict(), path)
    return public.named(norm=public.Constants(MEAN, STD, ("m", "s")), net=net)


def as_robust_overfitting(path: Path) -> nn.Module:
    """Under DataParallel, beside an optimiser, in the older format of torch.save."""
    net = public.scrambled(public.PreActResNet())
    content = {"state_dict": nn.DataParallel(net).state_dict(), "opt": {"state": {}}, "epoch": 9}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return public.named(norm=public.Constants(MEAN, STD, ("m", "s")), net=net)


def as_trades(path: Path) -> nn.Module:
    """With the second copy of the first stage, and images in [0, 1]."""
    net = public.scrambled(public.WideResNet(sub_block=True))
    torch.save(nn.DataParallel(net).state_dict(), path)
    return net


def as_awp(path: Path) -> nn.Module:
    net = public.scrambled(public.WideResNet(depth=16))
    content = {"state_dict": nn.DataParallel(net).state_dict(), "test_robust_acc": 0.56}
    torch.save(content, path)
    return public.named(norm=public.Constants(MEAN, STD, ("m", "s")), net=net)


def as_robustbench_preact(path: Path) -> nn.Module:
    """Wong2020Fast: no final norm, buffers mu and sigma."""
    net = public.Normalising(public.PreActResNet(raw=True, final_norm=False), MEAN, STD)
    public.scrambled(net)
    torch.save(net.state_dict(), path)
    return net.eval()


def as_robustbench_wide(path: Path) -> nn.Module:
    """A normalisation before the network, both in one module, under DataParallel."""
    norm = public.Constants(MEAN, STD, ("mean", "std"))
    net = public.scrambled(public.WideResNet(widen=1, sub_block=True))
    whole = public.named(normalize=norm, model=net)
    torch.save({"model_state_dict": nn.DataParallel(whole).state_dict()}, path)
    return whole


FORMATS: dict[str, tuple[Callable[[Path], nn.Module], str, tuple[str, ...], str | None]] = {
    "fast_adversarial": (
        as_fast_adversarial,
        "preact_resnet18",
        ("model.shortcut=raw",),
        "cifar10",
    ),
    "robust_overfitting": (as_robust_overfitting, "preact_resnet18", (), "cifar10"),
    "TRADES": (as_trades, "wide_resnet", (), "none"),
    "AWP": (as_awp, "wide_resnet", (), "cifar10"),
    "RobustBench's PreActResNet18": (
        as_robustbench_preact,
        "preact_resnet18",
        ("model.shortcut=raw",),
        None,
    ),
    "RobustBench's WideResNet": (as_robustbench_wide, "wide_resnet", (), None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_public_checkpoints_answer_as_their_networks(name, tmp_path):
    make, network, overrides, normalise = FORMATS[name]
    theirs = make(tmp_path / "theirs.pt")
    check_same(read(tmp_path / "theirs.pt", network, *overrides, normalise=normalise), theirs)


@pytest.mark.parametrize(
    ("network", "options", "theirs"),
    [
        ("preact_resnet18", PreActResNet18Options(width=4), public.PreActResNet()),
        (
            "preact_resnet18",
            PreActResNet18Options(width=4, final_norm=False),
            public.PreActResNet(final_norm=False),
        ),
        (
            "wide_resnet",
            WideResNetOptions(depth=16, widen=2, width=4),
            public.WideResNet(depth=16),
        ),
        ("wide_resnet", WideResNetOptions(depth=10, widen=1, width=4), public.WideResNet(widen=1)),
    ],
)
def test_names_are_a_bijection(network, options, theirs):
    """Every key of ours has the name of one of theirs, and none of theirs is left: both ways."""
    ours = build_model(options, MEAN, STD, ["a", "b", "c"], 0).net.state_dict()
    named = public_keys(network, ours)
    assert list(named) == list(ours)
    expected = theirs.state_dict()
    assert sorted(named.values()) == sorted(expected)
    assert all(expected[name].shape == ours[key].shape for key, name in named.items())
    theirs.load_state_dict({named[key]: each for key, each in ours.items()})


# --- containers, prefixes, numbers ---------------------------------------------------------------

State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: each for key, each in state.items()}


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    **{
        key: partial(lambda key, state: {"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, key)
        for key in ("state_dict", "model", "net", "model_state_dict", "last", "best")
    },
    "two deep": lambda state: {"best": {"epoch": 3, "state_dict": state}, "args": {"lr": 0.1}},
}
PREFIXES = ("module.", "model.", "module.model.", "base_model.", "_orig_mod.", "net.", "0.", "1.")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return public.scrambled(public.PreActResNet())


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_containers(container, prefix, net, tmp_path):
    file = tmp_path / "a.pt"
    torch.save(CONTAINERS[container](prefixed(prefix, net.state_dict())), file)
    check_same(read(file, "preact_resnet18", normalise="none"), net)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix, net, tmp_path):
    """And how the file was packed is said."""
    file = tmp_path / "a.pt"
    torch.save({"state_dict": prefixed(prefix, net.state_dict())}, file)
    choice = read(file, "preact_resnet18", normalise="none")
    check_same(choice, net)
    assert choice.foreign.format == f"torch.save, state_dict, prefix {prefix}"


def test_sequential_of_normalisation_and_network(net, tmp_path):
    whole = nn.Sequential(public.Constants(MEAN, STD, ("mean", "std")), net)
    torch.save(nn.DataParallel(whole).state_dict(), tmp_path / "a.pt")
    check_same(read(tmp_path / "a.pt", "preact_resnet18"), whole)


def test_safetensors(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    choice = read(tmp_path / "a.safetensors", "preact_resnet18", normalise="none")
    check_same(choice, net)
    assert choice.foreign.format == "safetensors"


@pytest.mark.parametrize(
    ("taken", "left"), [("model_state_dict", "unaveraged_model_state_dict"), ("last", "best")]
)
def test_of_two_sets_of_weights_one_is_taken_aloud(taken, left, net, tmp_path):
    other = public.scrambled(public.PreActResNet(), seed=1).state_dict()
    torch.save({left: other, taken: net.state_dict()}, tmp_path / "a.pt")
    choice = read(tmp_path / "a.pt", "preact_resnet18", normalise="none")
    check_same(choice, net)
    assert choice.foreign.notes == [f"Of {taken}, {left} the weights in {taken} were taken."]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_numbers_become_fp32(dtype, net, tmp_path):
    state = {
        key: each.to(dtype) if each.is_floating_point() else each
        for key, each in net.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pt")
    choice = read(tmp_path / "a.pt", "preact_resnet18", normalise="none")
    assert str(dtype).removeprefix("torch.") in choice.foreign.notes[0]
    found = choice.build(["a", "b", "c"]).net.state_dict()
    for key, name in public_keys("preact_resnet18", found).items():
        assert found[key].dtype in (torch.float32, torch.int64)
        if found[key].is_floating_point():
            assert torch.equal(found[key], state[name].float())


def test_a_final_norm_that_is_not_used(tmp_path):
    """It is in the file all the same; the option says that it does nothing."""
    net = public.scrambled(public.PreActResNet(used=False))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    options = ("model.final_norm=false",)
    check_same(read(tmp_path / "a.pt", "preact_resnet18", *options, normalise="none"), net)


@pytest.mark.parametrize(
    ("network", "theirs", "options"),
    [
        (
            "preact_resnet18",
            public.PreActResNet(width=8, classes=7),
            {"width": 8, "final_norm": True},
        ),
        (
            "preact_resnet18",
            public.PreActResNet(final_norm=False, classes=7),
            {"final_norm": False},
        ),
        ("wide_resnet", public.WideResNet(16, 3, 7), {"depth": 16, "widen": 3, "width": 4}),
        ("wide_resnet", public.WideResNet(10, 1, 7), {"depth": 10, "widen": 1}),
    ],
)
def test_sizes_are_read_off_the_shapes(network, theirs, options):
    found = sizes(network, theirs.state_dict())
    assert options.items() <= found.options.items()
    assert (found.channels, found.classes) == (3, 7)


# --- normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("none", [0, 0, 0, 1, 1, 1]),
        ("cifar10", BUFFERS),
        ("0.5:0.25", [0.5] * 3 + [0.25] * 3),
        ("0.1,0.2,0.3:0.4,0.5,0.6", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ],
)
def test_normalisation_as_given(option, expected):
    assert settle(Path("a.pt"), None, None, option, 3).constants == expected


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (None, "--normalise: missing, and a.pt does not say"),
        ("cifar", "did you mean 'cifar10'"),
        ("0.5", "is not known, and no MEAN:STD such as"),
        ("0.5:", "no MEAN:STD"),
        ("0.5,0.5:0.2", "normalises 2 channels and the network takes 3"),
        ("125:60", "not in pixel units"),
        ("0.5:0", "not in pixel units"),
        ("nan:1", "not in pixel units"),
    ],
)
def test_normalisation_that_is_none(option, says):
    with pytest.raises(UserError, match=says):
        settle(Path("a.pt"), None, None, option, 3)


def test_the_file_s_normalisation_is_taken_and_must_not_be_contradicted():
    inside = ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
    for option in (None, "cifar10"):
        found = settle(Path("a.pt"), *inside, option, 3)
        assert found.constants == BUFFERS
        assert found.in_file
    for option in ("none", "cifar100"):
        with pytest.raises(UserError, match=f"{option} is not what a.pt has in it .*leave it out"):
            settle(Path("a.pt"), *inside, option, 3)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(once) -> Path:
    """Colour images on disk, and `theirs.pt`: a network with raw shortcuts that has learnt them."""

    def make(folder: Path) -> None:
        for split, seed, n in (("train", 0, 10), ("test", 1, 100)):
            data = colours(n, seed=seed)
            for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
                path = folder / "images" / split / str(label.item()) / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        torch.manual_seed(0)
        net = public.PreActResNet(raw=True, width=4, classes=10)
        whole = nn.Sequential(public.Constants([0.5] * 3, [0.25] * 3, ("m", "s")), net)
        learn(whole, colours(600))
        torch.save({"net": nn.DataParallel(net).state_dict(), "epoch": 3}, folder / "theirs.pt")
        whole.eval()
        x = colours(100, seed=1)
        with torch.no_grad():
            correct = (whole(x.images.float() / 255).argmax(1) == x.labels).float().mean()
        (folder / "accuracy").write_text(str(correct.item()))

    return once("learnt-by-somebody", make)


def command(folder: Path, out: Path, *options: str) -> list[str]:
    images = ["data.name=imagefolder", f"data.root={folder / 'images'}"]
    file = str(folder / "theirs.pt")
    return ["import", file, "--as", "preact_resnet18", *images, "--out", str(out), *options]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli._run(arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dist-adv: ")
    return line


def test_expected_accuracy_is_measured(learnt, tmp_path, capsys):
    """The folder is one that load_model reads, and says where the network comes from."""
    expected = float((learnt / "accuracy").read_text())
    assert expected > 0.5
    right = ["model.shortcut=raw", "--normalise", "0.5:0.25"]
    said = ["--expect-clean", f"{100 * expected:.1f}"]
    assert cli._run(command(learnt, tmp_path / "out", *right, *said)) == 0
    assert f"imported: {tmp_path / 'out'}" in capsys.readouterr().out
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["README.md", "config.json", "model.safetensors"]
    model = load_model(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about == model.architecture
    assert about["model"]["shortcut"] == "raw"
    assert about["imported"]["natural"]["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert about["imported"]["natural"]["n"] == 100
    test = colours(100, seed=1)  # written as classes 0, 1, 2 ... in the order of their names
    with torch.no_grad():
        right = model(test.images.float() / 255).argmax(1) == test.labels
    assert right.float().mean().item() == pytest.approx(expected, abs=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (about["imported"]["sha256"], "theirs.pt", "prefix module.", "was expected"):
        assert part in card


def test_another_accuracy_is_refused_and_what_would_fit_is_said(learnt, tmp_path, capsys):
    """The wrong shortcut: the right one is found by trying."""
    expected = 100 * float((learnt / "accuracy").read_text())
    options = ["--normalise", "0.5:0.25", "--expect-clean", f"{expected:.1f}"]
    line = refused(command(learnt, tmp_path / "out", *options), capsys)
    assert f"--expect-clean: {expected:.1f}".rstrip("0").rstrip(".") in line
    assert "of 100 test images (" in line
    fits = line.split("what would fit is ")[1]
    assert "model.shortcut=raw model.final_norm=true --normalise 0.5" in fits
    assert "activated" not in fits
    assert list(tmp_path.iterdir()) == []


def test_nothing_fits(learnt, tmp_path, capsys):
    options = ["model.shortcut=raw", "--normalise", "0.5:0.25", "--expect-clean", "3"]
    line = refused(command(learnt, tmp_path / "out", *options), capsys)
    assert "none of 19 other choices of shortcut, final norm and normalisation fits" in line


def test_unproven_is_said(learnt, tmp_path, capsys):
    options = ["model.shortcut=raw", "--normalise", "0.5:0.25", "--limit", "20"]
    assert cli._run(command(learnt, tmp_path / "out", *options)) == 0
    assert "nothing proves model.shortcut=raw" in capsys.readouterr().err
    assert "no accuracy was expected" in (tmp_path / "out" / "README.md").read_text()
    about = load_model(tmp_path / "out").architecture["imported"]
    assert about["natural"]["n"] == 20


# --- what is none --------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.canary, "executed")


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def without(state: Mapping[str, Tensor], key: str) -> State:
    return {name: each for name, each in state.items() if name != key}


STATE = public.scrambled(public.PreActResNet()).state_dict()
DEEPER = public.PreActResNet(blocks=(3, 4, 6, 3)).state_dict()
FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "web page": (
        lambda folder: b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>",
        "is a web page and no checkpoint, as Google Drive gives it",
    ),
    "empty": (lambda folder: b"", "is empty"),
    "words": (lambda folder: b"no weights " * 50, "neither a checkpoint of torch.save nor a"),
    "code": (
        lambda folder: saved({"state_dict": STATE, "args": Payload(folder / "canary")}),
        r"holds more than tensors \(getattr\), which could run code and was not opened",
    ),
    "code, older format": (
        lambda folder: saved(
            {"args": Payload(folder / "canary")}, _use_new_zipfile_serialization=False
        ),
        "holds more than tensors",
    ),
    "plain pickle": (
        lambda folder: pickle.dumps(Payload(folder / "canary")),
        "neither a checkpoint of torch.save nor a safetensors file",
    ),
    "module": (
        lambda folder: saved(public.PreActResNet()),
        r"holds more than tensors \(public_networks.PreActResNet\), which could run code and was",
    ),
    "numpy": (
        lambda folder: saved({"state_dict": STATE, "acc": np.float64(0.8)}),
        r"holds more than tensors \(numpy",
    ),
    "cut short": (lambda folder: saved(STATE)[:-2000], "is cut short; download it again"),
    "cut short, older format": (
        lambda folder: saved(STATE, _use_new_zipfile_serialization=False)[:-2000],
        "is cut short; download it again",
    ),
    "no tensors": (
        lambda folder: saved({"epoch": 3, "lr": 0.1}),
        r"no weights by name \(epoch, lr",
    ),
    "a tensor": (lambda folder: saved(torch.zeros(3)), r"no weights by name \(Tensor\)"),
    "sparse": (
        lambda folder: saved({**STATE, "conv1.weight": torch.zeros(4, 3).to_sparse()}),
        "no weights by name",
    ),
    "missing": (
        lambda folder: saved(prefixed("module.", without(STATE, "layer3.1.bn2.running_var"))),
        r"has no layer3.1.bn2.running_var, unlike preact_resnet18",
    ),
    "no head": (lambda folder: saved(without(STATE, "linear.weight")), "has no linear.weight"),
    "more": (
        lambda folder: saved({**STATE, "fc2.weight": torch.zeros(3, 3)}),
        "also has fc2.weight, unlike",
    ),
    "beside the prefix": (
        lambda folder: saved({**prefixed("module.", STATE), "head.bias": torch.zeros(3)}),
        r"has head.bias beside the network, which is module.\*",
    ),
    "deeper": (
        lambda folder: saved(DEEPER),
        r"also has layer1.2.bn1.weight, .* and 75 more",
    ),
    "another shape": (
        lambda folder: saved({**STATE, "layer2.0.conv1.weight": torch.zeros(8, 4, 5, 5)}),
        r"layer2.0.conv1.weight is of shape \(8, 4, 5, 5\), not \(8, 4, 3, 3\)",
    ),
    "another network": (
        lambda folder: saved(public.WideResNet().state_dict()),
        "has no linear.weight, unlike preact_resnet18",
    ),
    "half a normalisation": (
        lambda folder: saved({**STATE, "mu": torch.zeros(3)}),
        "mu are no mean and standard deviation",
    ),
    "classes": (
        lambda folder: saved(public.PreActResNet(classes=10).state_dict()),
        "is for 10 classes and imagefolder has 3; name the data",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(name, images, tmp_path, capsys):
    """One line that names the file, exit status 2, nothing written and nothing executed."""
    content, says = FILES[name]
    file = tmp_path / "theirs.pt"
    file.write_bytes(content(tmp_path))
    where = ["data.name=imagefolder", f"data.root={images}", "--normalise", "none"]
    out = ["--out", str(tmp_path / "out")]
    line = refused(["import", str(file), "--as", "preact_resnet18", *where, *out], capsys)
    assert line.startswith(f"dist-adv: {file}: ")
    assert re.search(says, line)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


def test_a_canary_would_be_seen(tmp_path):
    """The code in these files runs where somebody lets it."""
    pickle.loads(FILES["plain pickle"][0](tmp_path))
    assert (tmp_path / "canary").read_text() == "executed"


@pytest.mark.parametrize(
    ("network", "overrides", "says"),
    [
        ("preact_resnet18", ["model.width=64"], "is of model.width=4, not 64; leave model.width"),
        ("preact_resnet18", ["model.norm=group"], "is of model.norm=batch, not group"),
        ("wide_resnet", ["model.depth=28"], "is of model.depth=16, not 28; leave model.depth out"),
    ],
)
def test_options_that_are_not_the_file_s(network, overrides, says, tmp_path):
    kinds = {"preact_resnet18": public.PreActResNet, "wide_resnet": partial(public.WideResNet, 16)}
    torch.save(kinds[network]().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=says):
        read(tmp_path / "a.pt", network, *overrides, normalise="none")


def test_no_final_norm_where_one_is_wanted(tmp_path):
    torch.save(public.PreActResNet(final_norm=False).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"is of model.final_norm=false, not true"):
        read(tmp_path / "a.pt", "preact_resnet18", "model.final_norm=true", normalise="none")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.pt", "--as", "preact_resnet18", "--out", "new"], "nothing.pt: no such file"),
        (["folder", "--as", "preact_resnet18", "--out", "new"], "folder: is a folder; name"),
        (["a.pt", "--as", "resnet18", "--out", "new"], "--as: 'resnet18' is not known"),
        (
            ["a.pt", "--as", "preact_resnet18", "--out", "folder"],
            "folder: cannot be written (File exists)",
        ),
        (
            ["a.pt", "--as", "preact_resnet18", "--out", "new", "train.seed=3"],
            "'train.seed=3': an import takes keys of model and data",
        ),
        (
            ["a.pt", "--as", "preact_resnet18", "--out", "new", "model.name=wide_resnet"],
            "the network is that of --as",
        ),
        (
            ["a.pt", "--as", "preact_resnet18", "--out", "new", "model.widht=4"],
            "model.widht: unknown key; did you mean 'width'",
        ),
        (["own.safetensors", "--as", "wide_resnet", "--out", "new"], "of this project already"),
    ],
)
def test_commands_that_are_refused(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    torch.save(STATE, "a.pt")
    save_file({"a": torch.zeros(3)}, "own.safetensors", {"architecture": "{}"})
    assert says in refused(["import", *arguments], capsys)
    assert not Path("new").exists()


def test_table_is_of_networks_that_there_are():
    for name in PUBLIC:
        assert load_config(None, ["method.name=natural", f"model.name={name}"]).model.name == name
