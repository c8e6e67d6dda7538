"""Networks of timm and of torchvision: made, trained, gone on with, saved, read and attacked."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchattacks
from safetensors.torch import load_file
from timm.models import save_for_hf

import dist_adv
from cases import make_images
from dist_adv.config import OptimOptions, parse_config
from dist_adv.distributed.optimizers import fused_optimizer
from dist_adv.errors import UserError
from dist_adv.models import build_model, load_model, read_weights, save_model
from dist_adv.models.libraries import TimmOptions, TorchvisionOptions
from dist_adv.plan.measure import Images, blank_network
from dist_adv.training.run import train_run

MEAN, STD, CLASSES = [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], ["a", "b", "c"]
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS = {
    "convnext": {"name": "timm", "arch": "convnext_atto", "stem": "conv", "args": SMALL},
    "vit": {"name": "timm", "arch": "vit_tiny_patch16_224", "stem": "conv", "args": VIT},
    "torchvision": {"name": "torchvision", "arch": "squeezenet1_1"},
}


def build(options: TimmOptions | TorchvisionOptions, size: tuple[int, int] = (32, 32), **more: Any):
    return build_model(options, MEAN, STD, CLASSES, 0, size, **more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    make_images(root, train=8, test=4, size=32)
    return root


def settings(pictures: Path, model: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "method": {"name": "fast", "alpha": 0.04, "guard": "none"},
        "threat": {"eps": 0.03},
        "model": model,
        "data": {"name": "imagefolder", "root": str(pictures)},
        "optim": {"name": "adamw", "lr": 0.001, "schedule": "cosine"},
        "train": {"epochs": 2, "batch_size": 8, "precision": "fp32", "threads": 1, **train},
        "eval": {"attacks": ["natural"], "every": 0},
        "track": {"wandb": {"mode": "disabled"}},
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_one_is_trained_read_back_and_attacked_by_others(network, pictures, tmp_path):
    config = parse_config(settings(pictures, NETWORKS[network], epochs=1), network)
    train_run(config, tmp_path / "run", "none")
    model = load_model(tmp_path / "run")
    assert model.architecture["library"].split()[0] == NETWORKS[network]["name"]
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    logits = model(x)
    assert logits.shape == (4, 3)
    adversarial = torchattacks.PGD(model, eps=0.03, alpha=0.01, steps=2)(x, y)
    assert 0 < (adversarial - x).abs().max() <= 0.0301
    found = dist_adv.evaluate(model, (x, y), threat=dist_adv.Linf(0.03), attacks=["pgd-2"])
    assert found["pgd-2"].n == 4


def test_layers_that_are_left_out_are_the_same_when_a_run_goes_on(pictures, tmp_path):
    """Bit for bit in mid-epoch; of other batches others are."""
    model = NETWORKS["convnext"] | {"drop_path": 0.5}
    config = parse_config(settings(pictures, model, save_steps=1, keep=10), "drop")
    train_run(config, tmp_path / "whole", "none")
    torch.rand(7)  # whatever the process has drawn before
    second = tmp_path / "whole" / "checkpoints" / "step-000000002"
    train_run(config, tmp_path / "again", str(second))
    plain = parse_config(settings(pictures, NETWORKS["convnext"]), "plain")
    train_run(plain, tmp_path / "plain", "none")
    whole, again, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again", "plain")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_programs_random_numbers_are_its_own(pictures, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dist_adv.train(settings(pictures, NETWORKS["convnext"], max_steps=1), tmp_path / "run")
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("size", [(64, 64), (32, 32)])
@pytest.mark.parametrize(
    ("arch", "args"),
    [("vit_tiny_patch16_224", VIT), ("convnext_atto", SMALL), ("resnet10t", {})],
)
def test_a_weights_file_is_enough_to_build_one_again(arch, args, size, tmp_path):
    stem = "default" if arch == "resnet10t" else "conv"
    model = build(TimmOptions(arch=arch, args=args, stem=stem), size).eval()
    save_model(tmp_path / "m.safetensors", model.architecture, model.state_dict())
    x = torch.rand(2, 3, *size)
    assert load_model(tmp_path / "m.safetensors")(x).allclose(model(x), atol=1e-6)


def test_a_stem_of_convolutions_halves_as_often_as_patches_do():
    for arch, args, first, count in (
        ("convnext_tiny", {"depths": [1, 1, 1, 1]}, 48, 2),
        ("vit_small_patch16_224", {"depth": 1}, 48, 4),
    ):
        net: Any = timm.create_model(arch, **args)
        ours = build(TimmOptions(arch=arch, args=args, stem="conv"), (224, 224)).net
        stem = ours.stem if arch.startswith("conv") else ours.patch_embed.proj
        halving = [each for each in stem if getattr(each, "stride", (1, 1)) == (2, 2)]
        assert [each.out_channels for each in halving] == [first << k for k in range(count)]
        x = torch.rand(1, 3, 224, 224)
        assert ours.forward_features(x).shape == net.forward_features(x).shape


def test_published_weights_come_with_their_normalisation(tmp_path):
    """From a folder, as a cluster without a network has them: every layer but the last."""
    source = timm.create_model("resnet10t", num_classes=7).eval()
    source.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3)}
    save_for_hf(source, tmp_path / "there", safe_serialization=True)
    options = TimmOptions(arch=f"local-dir:{tmp_path / 'there'}", pretrained=True)
    model = build(options)
    assert model.architecture["mean"] == [0.1, 0.2, 0.3]
    assert model.architecture["model"]["arch"] == "resnet10t"
    theirs, ours = source.state_dict(), model.net.state_dict()
    assert {name for name in theirs if not theirs[name].equal(ours[name])} == {
        "fc.weight",
        "fc.bias",
    }
    assert ours["fc.weight"].shape == (3, 512)
    fresh = build(options, pretrained=False)
    assert not torch.equal(fresh.net.conv1[0].weight, model.net.conv1[0].weight)
    # Neither reading it back nor planning looks for the folder's weights.
    save_model(tmp_path / "m.safetensors", model.architecture, model.state_dict())
    (tmp_path / "there" / "model.safetensors").unlink()
    x = torch.rand(2, 3, 32, 32)
    assert load_model(tmp_path / "m.safetensors")(x).allclose(model.eval()(x), atol=1e-6)
    tree = {"method": {"name": "fast"}, "model": options.model_dump()}
    blank_network(parse_config(tree, "plan"), Images(10, 3, (32, 32), 3))
    with pytest.raises(UserError, match=r"model\.arch: local-dir:.*No suitable checkpoints"):
        build(options)


def test_published_weights_of_colours_take_grey_images(tmp_path):
    """timm adds up the first layer's; the normalisation is the mean of theirs."""
    source = timm.create_model("resnet10t", num_classes=7)
    source.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.5)}
    save_for_hf(source, tmp_path / "there", safe_serialization=True)
    options = TimmOptions(arch=f"local-dir:{tmp_path / 'there'}", pretrained=True)
    model = build_model(options, [0.5], [0.25], ["a", "b"], 0, (32, 32))
    assert model.architecture["mean"] == pytest.approx([0.2])
    assert model.architecture["std"] == pytest.approx([0.3])
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 2)


def test_a_head_of_other_classes_is_put_on_torchvisions(monkeypatch):
    """A stand-in for the download."""
    from torchvision import models

    known = models.get_model("resnet18")
    monkeypatch.setattr(
        models.ResNet18_Weights, "get_state_dict", lambda *_, **__: known.state_dict()
    )
    model = build(TorchvisionOptions(arch="resnet18", pretrained=True))
    assert model.net.fc.out_features == 3
    assert model.net.conv1.weight.equal(known.conv1.weight)
    assert model.architecture["mean"] == [0.485, 0.456, 0.406]


def test_what_there_is_none_of():
    for options, says in (
        (TimmOptions(arch="convnext_tinny"), "is not known to timm; did you mean 'convnext_tiny'"),
        (
            TimmOptions(arch="convnext_atto", args={"bananas": 3}),
            "'bananas'.*mend model.arch or model.args",
        ),
        (TimmOptions(arch="resnet10t", stem="conv"), "stem: resnet10t is no ConvNeXt and no"),
        (TimmOptions(arch="vit_small_patch14_dinov2", stem="conv"), "which no halvings make"),
        (TimmOptions(arch="local-dir:/nowhere"), "cannot be had .*config.json"),
        (
            TorchvisionOptions(arch="googlenet", pretrained=True),
            "the published weights of googlenet do not fit",
        ),
        (TorchvisionOptions(arch="squeezenet1_1", pretrained=True), "of squeezenet1_1 do not fit"),
        (TorchvisionOptions(arch="resnet8"), "is not known to torchvision; did you mean"),
    ):
        with pytest.raises(UserError, match=f"^model.*{says}"):
            build(options, (28, 28))
    with pytest.raises(UserError, match="take 3 channels, and these images have 1; use "):
        build_model(TorchvisionOptions(arch="resnet18"), [0.5], [0.5], CLASSES, 0)
    for key in ("num_classes", "in_chans", "checkpoint_path"):
        with pytest.raises(ValueError, match=f"{key}: the data say it"):
            TimmOptions(arch="resnet10t", args={key: 3})


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"timm is not installed; pip install 'dist-adv\[timm\]'"):
        build(TimmOptions(arch="resnet10t"))


def test_weights_of_another_version_are_said_to_be(tmp_path):
    model = build(TimmOptions(arch="convnext_atto", args=SMALL))
    state = model.state_dict()
    state["net.renamed"] = state.pop("net.head.fc.weight")
    architecture = model.architecture | {"library": "timm 0.9.2"}
    save_model(tmp_path / "m.safetensors", architecture, state)
    with pytest.raises(UserError, match=r"made with timm 0\.9\.2, and this is timm \d"):
        load_model(tmp_path / "m.safetensors")


def test_training_starts_from_one(pictures, tmp_path):
    """Whose size of images is in the file, and not in the configuration."""
    config = settings(pictures, NETWORKS["vit"], max_steps=1)
    train_run(parse_config(config, "first"), tmp_path / "first", "none")
    config["train"]["start"] = str(tmp_path / "first")
    train_run(parse_config(config, "second"), tmp_path / "second", "none")
    assert read_weights(tmp_path / "second" / "model.safetensors")
    config["model"] = NETWORKS["vit"] | {"pretrained": True}  # which a start is instead of
    train_run(parse_config(config, "pretrained"), tmp_path / "pretrained", "none")
    config["model"] = NETWORKS["vit"] | {"stem": "default"}
    with pytest.raises(UserError, match="stem: conv there, default here"):
        train_run(parse_config(config, "third"), tmp_path / "third", "none")


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("vit", ("net.cls_token", "net.blocks.0", "net.blocks.1", "net.head")),
        ("convnext", ("net.stem", "net.stages.1", "net.stages.2", "net.head")),
    ],
)
def test_earlier_layers_have_smaller_rates(network, layers, pictures, tmp_path):
    """From one update without decay: each layer's change is a share of what it is without."""
    weights = {}
    for name, lr, decay in (("first", 1e-30, 1.0), ("one", 1e-2, 1.0), ("half", 1e-2, 0.5)):
        tree = settings(pictures, NETWORKS[network], epochs=1, max_steps=1)
        tree["method"] = {"name": "natural"}
        tree["optim"] = {"momentum": 0, "weight_decay": 0, "schedule": "constant"}
        tree["optim"] |= {"lr": lr, "layer_decay": decay}
        train_run(parse_config(tree, "x"), tmp_path / name, "none")
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    shares = {}
    for layer in layers:
        one, half = (
            torch.cat(
                [
                    (each - weights["first"][name]).flatten()
                    for name, each in weights[run].items()
                    if name.startswith(layer)
                ]
            )
            for run in ("one", "half")
        )
        shares[layer] = (half.norm() / one.norm()).item()
        torch.testing.assert_close(half, shares[layer] * one, rtol=1e-2, atol=1e-7)
    found = torch.tensor(list(shares.values())).log2()
    assert torch.allclose(found, found.round(), atol=1e-2), shares
    assert all(a < b for a, b in itertools.pairwise(found.round().tolist())), shares
    assert found[-1].round() == 0  # the head's is whole


def test_layers_of_other_networks_are_not_known(pictures, tmp_path):
    tree = settings(pictures, NETWORKS["torchvision"], epochs=1)
    tree["optim"]["layer_decay"] = 0.7
    with pytest.raises(UserError, match=r"optim\.layer_decay: only networks of timm"):
        train_run(parse_config(tree, "x"), tmp_path / "run", "none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("decay_norms", [True, False])
def test_layers_decay_as_the_whole_does(decay_norms):
    options = OptimOptions(layer_decay=0.5, weight_decay=0.1, decay_norms=decay_norms)
    model = build(TimmOptions(**NETWORKS["vit"]))
    groups = fused_optimizer(model, options).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        spared = [not decay_norms and each.dim() < 2 for each in group["params"]]
        assert [group["weight_decay"] == 0 for _ in spared] == spared
