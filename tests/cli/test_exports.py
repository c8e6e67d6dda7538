"""`dist-adv export` in each format, read back by what it is for, or by a stand-in that says so.

The networks are of random weights on colour images; what is compared are their logits.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from torch import Tensor

import public_networks
import zoo
from dist_adv import cli, load_model
from dist_adv.errors import RunFailure, UserError
from dist_adv.exports import graphs
from dist_adv.models import (
    ModelOptions,
    PreActResNet18Options,
    ResNet50Options,
    WideResNetOptions,
)
from hub_server import Server
from made_up_runs import add_examples, add_network, evaluation, make_run
from serving import serving

WRN = WideResNetOptions(depth=10, widen=1)
NATURAL = evaluation("natural", 0.8125, n=10_000, dataset="cifar10")
AUTOATTACK = evaluation("natural", 0.4375, n=10_000, dataset="cifar10") | {
    **{"attack": "autoattack", "norm": "linf", "eps": 8 / 255, "version": "standard"},
    **{"attacks": ["apgd-ce", "apgd-t", "fab-t", "square"], "target_classes": 9},
}
PGD = evaluation("pgd-20", 0.5, n=1000, dataset="cifar10")

Export = Callable[..., tuple[int, list[str], list[str]]]
"""(exit status, lines of standard output, lines of standard error but the first announcement)."""


def finished(
    options: ModelOptions = WRN, *results: dict[str, Any], channels: int = 3, size: int = 32
) -> None:
    """A run in the working folder, called `run`."""
    run = make_run(Path("run"), results=list(results))
    add_network(run, options, channels)
    add_examples(run, channels, size)


@pytest.fixture
def export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Export:
    """`dist-adv export run --out new ...`, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def export(*arguments: str) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        status = cli._run(["export", "run", "--out", "new", *arguments])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return export


def refused(done: tuple[int, list[str], list[str]], *says: str, status: int = 2) -> None:
    """One line that contains what it must, and nothing written."""
    found, out, err = done
    assert (found, out) == (status, [])
    (line,) = err
    assert [part for part in says if part not in line] == [], line
    assert {path.name for path in Path().iterdir()} <= {"run"}


def images(n: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def logits(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return load_model("run")(x)


# --- the Hub -------------------------------------------------------------------------------------


def test_the_hub_reads_the_card(export: Export) -> None:
    """By its own library: the metadata, and a result for each attack with its settings."""
    finished(WRN, NATURAL, PGD)
    assert export("--license", "mit") == (0, ["exported: new"], [])
    card = ModelCard.load("new/README.md")
    found = card.data.to_dict()
    results = {each.metric_name: each for each in card.data.eval_results}
    assert found | {"model-index": None} == {
        "license": "mit",
        "library_name": "dist-adv",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "linf", "pgd-20"],
        "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"],
        "model-index": None,
    }
    assert {name: (each.metric_value, each.metric_type) for name, each in results.items()} == {
        "accuracy": (0.8125, "accuracy"),
        "robust accuracy (pgd-20)": (0.5, "accuracy"),
    }
    robust = results["robust accuracy (pgd-20)"]
    assert (robust.task_type, robust.dataset_type) == ("image-classification", "uoft-cs/cifar10")
    assert (robust.dataset_name, robust.dataset_split) == ("cifar10", "test")
    assert robust.metric_args == {
        **{"n": 1000, "norm": "linf", "eps": 8 / 255, "steps": 20, "step_size": 2 / 255},
        **{"restarts": 1, "init": "random", "loss_fn": "ce"},
    }
    assert card.text.startswith("# wide_resnet, natural training on cifar10\n")
    assert load_model("new")(images(2)).equal(load_model("run")(images(2)))


def test_a_card_of_nothing_measured(export: Export) -> None:
    finished()
    assert export()[0] == 0
    data = ModelCard.load("new/README.md").data.to_dict()
    assert {"license", "model-index", "model_name"}.isdisjoint(data)
    assert data["tags"] == ["adversarial-robustness", "linf"]


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the Hub, somebody who is logged in to it, and an empty cache."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Server()) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        yield server


def test_pushed_and_loaded(hub: Server, export: Export) -> None:
    """Through HTTP, and again from the cache when the server is gone."""
    finished(WRN, NATURAL)
    status, said, _ = export("--push", "me/robust", "--yes")
    assert (status, said) == (0, ["exported: new", f"uploaded: {hub.url}/me/robust"])
    files = {path.name: path.read_bytes() for path in Path("new").iterdir()}
    assert hub.repositories == {"me/robust": files}
    assert hub.token == "Bearer hf_secret"
    assert b'load_model("hf:me/robust")' in files["README.md"]
    assert load_model("hf:me/robust")(images(2)).equal(logits(images(2)))
    hub.shutdown()
    hub.server_close()
    assert load_model("hf:me/robust")(images(2)).equal(logits(images(2)))
    with pytest.raises(RunFailure, match=r"^hf:me/other: the Hub cannot be reached .*refused"):
        load_model("hf:me/other")


def test_nothing_to_load_there(hub: Server) -> None:
    hub.repositories["me/empty"] = {"README.md": b"# Nothing"}
    hub.repositories["me/pickled"] = {"model.safetensors": b"\x80\x04"}
    for name, says in {
        "me/robust": "no such repository on the Hub, or a private one",
        "me/empty": r"has no model\.safetensors",
        "me/pickled": "not a readable safetensors file",
        "me": "no such repository on the Hub",
        "a b": "no name of a repository",
    }.items():
        with pytest.raises(UserError, match=says):
            load_model(f"hf:{name}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_push_is_confirmed(hub: Server, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    finished()
    push = ("--push", "me/robust")
    refused(export(*push), "--push: standard input is no terminal", "me/robust", "--yes")
    monkeypatch.setattr(sys, "stdin", Terminal("me/robusd\n"))
    assert export(*push)[0] == 2
    assert not Path("new").exists()
    assert hub.repositories == {}
    monkeypatch.setattr(sys, "stdin", Terminal("me/robust\n"))
    assert export(*push)[0] == 0
    assert hub.repositories.keys() == {"me/robust"}


def test_nobody_is_logged_in(hub: Server, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    finished()
    monkeypatch.delenv("HF_TOKEN")
    refused(export("--push", "me/robust", "--yes"), "nobody is logged in", "`hf auth login`")
    assert hub.repositories == {}


def test_the_hub_refuses(hub: Server, export: Export) -> None:
    """The export stays, and what uploads it is said."""
    finished()
    hub.refuses = 403
    status, _, (line,) = export("--push", "me/robust", "--yes")
    assert status == 1
    assert "me/robust: could not be uploaded (" in line
    assert "403" in line
    assert "new is whole, and `hf upload me/robust new` sends it" in line
    load_model("new")


def test_the_hub_is_gone(hub: Server, export: Export) -> None:
    finished()
    hub.shutdown()
    hub.server_close()
    status, _, (line,) = export("--push", "me/robust", "--yes")
    assert status == 1
    assert "me/robust: could not be uploaded (" in line


# --- RobustBench ---------------------------------------------------------------------------------

ROBUSTBENCH = ("--format", "robustbench", "--name", "Me2026Fast")


@pytest.fixture
def robustbench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for RobustBench's networks is imported under their names."""
    for name, module in zoo.make().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    "options",
    [
        PreActResNet18Options(),
        PreActResNet18Options(shortcut="raw", final_norm=False),
        WRN,
        WideResNetOptions(depth=16, widen=2),
    ],
    ids=repr,
)
def test_their_class_gives_our_logits(
    options: ModelOptions, robustbench: None, export: Export
) -> None:
    """In double precision, through entry.py and weights that hold nothing but tensors."""
    finished(options, NATURAL, AUTOATTACK)
    status, (exported, verified), _ = export(*ROBUSTBENCH)
    assert (status, exported) == (0, "exported: new")
    assert verified.startswith("verified: the logits of RobustBench's class are the network's")
    assert {path.name for path in Path("new").iterdir()} == {
        *("Me2026Fast.pt", "Me2026Fast.json", "entry.py", "claim.md")
    }
    entry: dict[str, Any] = {}
    exec(Path("new/entry.py").read_text(), entry)
    theirs = entry["Me2026FastNet"]().eval()
    theirs.load_state_dict(torch.load("new/Me2026Fast.pt", weights_only=True), strict=True)
    ours, x = load_model("run"), images(3).double()
    with torch.inference_mode():
        torch.testing.assert_close(theirs.double()(x), ours.double()(x), rtol=1e-12, atol=1e-12)
    assert entry["ENTRY"] == ("Me2026Fast", {"model": entry["Me2026FastNet"], "gdrive_id": None})


def test_another_network_under_their_names(
    robustbench: None, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the verification is for: the same keys and shapes, and another function."""
    finished(WRN, NATURAL, AUTOATTACK)
    monkeypatch.setattr(
        public_networks.WideBlock,
        "forward",
        lambda self, x: self.conv2(self.conv1(self.bn1(x).relu())),
    )
    refused(
        export(*ROBUSTBENCH),
        *("Me2026Fast.pt: RobustBench's class gives other logits", "float32"),
        status=1,
    )


def test_the_claim(export: Export) -> None:
    finished(WRN, NATURAL, AUTOATTACK)
    status, (_, last), _ = export(*ROBUSTBENCH)
    assert status == 0
    assert last.startswith(
        "not verified: RobustBench's class has not been tried on Me2026Fast.pt ("
    )
    assert "install robustbench as docs/sharing.md says, and export again" in last
    assert json.loads(Path("new/Me2026Fast.json").read_text()) == {
        **{"link": "", "name": "", "authors": "", "venue": "", "dataset": "cifar10"},
        **{"additional_data": False, "number_forward_passes": 1, "unreliable": False},
        **{"architecture": "WideResNet-10-1", "eps": "8/255", "clean_acc": "81.25"},
        **{"reported": "43.75", "autoattack_acc": "43.75"},
    }
    claim = Path("new/claim.md").read_text()
    for line in (
        "- **Architecture**: WideResNet-10-1",
        "- **Threat Model**: Linf",
        "- **eps**: 8/255",
        "- **Clean accuracy**: 81.25 % (10,000 test images)",
        "- **Robust accuracy**: 43.75 % (10,000 test images)",
        "- **Evaluation method**: AutoAttack, standard (apgd-ce, apgd-t, fab-t, square), "
        "in dist_adv's code",
    ):
        assert f"{line}\n" in claim
    assert claim.startswith("# Paper Information\n")


def test_further_data_are_stated(export: Export) -> None:
    finished(WRN, NATURAL, AUTOATTACK)
    about = Path("run/config.yaml")
    tree = yaml.safe_load(about.read_text())
    tree["data"]["extra"] = {"path": "edm.npz", "fraction": 0.7}
    tree["train"]["start"] = "elsewhere"
    about.write_text(yaml.safe_dump(tree))
    assert export(*ROBUSTBENCH)[0] == 0
    assert json.loads(Path("new/Me2026Fast.json").read_text())["additional_data"] is True
    claim = Path("new/claim.md").read_text()
    assert "- **Additional data**: true\n" in claim
    assert "It started from elsewhere: additional data, where those weights" in claim


def test_what_is_no_claim_yet(export: Export) -> None:
    few = AUTOATTACK | {"n": 1000, "version": "custom"}
    finished(WRN, NATURAL, few)
    assert export(*ROBUSTBENCH)[0] == 0
    claim = Path("new/claim.md").read_text()
    assert claim.startswith("**Not a claim yet:**\n- AutoAttack had 1,000 test images")
    assert "RobustBench takes all 10,000" in claim
    assert "not AutoAttack's standard version" in claim
    assert "(1,000 test images)" in claim


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (PreActResNet18Options(width=16), "has width 64 and this network model.width 16"),
        (PreActResNet18Options(norm="group"), "norm batch and this network model.norm group"),
        (WideResNetOptions(depth=10, widen=1, width=8), "has width 16 and this network"),
        (WideResNetOptions(depth=8, widen=1), "depth 6n + 4 and this network model.depth 8"),
        (ResNet50Options(width=4), "RobustBench has no class for the network resnet50"),
    ],
    ids=repr,
)
def test_networks_that_they_have_not(options: ModelOptions, says: str, export: Export) -> None:
    finished(options, NATURAL, AUTOATTACK)
    refused(export(*ROBUSTBENCH), "run: ", says)


def test_runs_that_they_do_not_take(export: Export) -> None:
    finished(WRN, NATURAL, PGD)
    refused(export(*ROBUSTBENCH), "run: has no figure of 'autoattack'", "dist-adv eval run")
    add_examples(Path("run"), 3, 64)
    refused(export(*ROBUSTBENCH), "take images of 3x32x32 and this one 3x64x64")
    add_examples(Path("run"), 1, 8)
    refused(export(*ROBUSTBENCH), "take images of 3x32x32 and this one 1x8x8")


# --- ONNX and torch.export -----------------------------------------------------------------------

OWN = [
    (WRN, 3),
    *(
        pytest.param(options, channels, marks=pytest.mark.slow)
        for options, channels in (
            (PreActResNet18Options(width=4), 1),
            (PreActResNet18Options(width=16, shortcut="raw", final_norm=False), 3),
            (PreActResNet18Options(width=8, norm="group"), 3),
            (WideResNetOptions(depth=8, widen=2, width=8, norm="group"), 1),
            (ResNet50Options(width=4), 3),
            (ResNet50Options(width=4, stem="imagenet"), 1),
        )
    ),
]


def by_onnx_runtime(x: Tensor) -> Tensor:
    """Not a line of dist_adv or torch's export is in it."""
    session = onnxruntime.InferenceSession("new/model.onnx")
    (entry,), (exit,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.shape[1:], exit.name) == ("images", list(x.shape[1:]), "logits")
    (found,) = session.run(None, {"images": x.numpy()})
    return torch.from_numpy(found)


def by_torch(x: Tensor) -> Tensor:
    program = torch.export.load("new/model.pt2")
    assert program.graph_signature.user_inputs == ("images",)
    return program.module()(x)


@pytest.mark.parametrize(
    ("kind", "file", "run"),
    [
        pytest.param("onnx", "model.onnx", by_onnx_runtime, id="onnx", marks=pytest.mark.slow),
        pytest.param("torch-export", "model.pt2", by_torch, id="torch-export"),
    ],
)
@pytest.mark.parametrize(("options", "channels"), OWN, ids=str)
def test_graphs_give_the_logits(
    options: ModelOptions,
    channels: int,
    kind: str,
    file: str,
    run: Callable[[Tensor], Tensor],
    export: Export,
) -> None:
    """Of every network of ours, for other numbers of images than the export has tried."""
    finished(options, NATURAL, channels=channels, size=28)
    status, (exported, verified), _ = export("--format", kind)
    assert (status, exported) == (0, "exported: new")
    assert verified.startswith(f"verified: the logits of {file} are the network's to ")
    assert {path.name for path in Path("new").iterdir()} == {file, "config.json", "README.md"}
    card = Path("new/README.md").read_text()
    assert f"float32 (n, {channels}, 28, 28) in [0, 1]" in card
    assert "| natural | 81.25% |" in card
    for n in (3, 7):
        expected = logits(images(n, channels, 28))
        found = run(images(n, channels, 28))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"])
def test_a_graph_that_is_another_function(
    kind: str, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of it."""
    finished()
    program = graphs._program

    def of_another(run: Any) -> Any:
        model, exported = program(run)
        with torch.no_grad():
            model.normalize.mean = model.normalize.mean + 0.01
        return model, exported

    monkeypatch.setattr(graphs, "_program", of_another)
    refused(export("--format", kind), "gives other logits than the network, by", status=1)


def test_a_size_that_nothing_tells(export: Export) -> None:
    finished()
    Path("run/examples.safetensors").unlink()
    says = ("run/examples.safetensors: missing", "dist-adv eval run --attacks fgsm")
    refused(export("--format", "torch-export"), *says)


def test_packages_that_are_missing(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    finished()
    monkeypatch.setattr("dist_adv.packages.importlib.util.find_spec", lambda name: None)
    says = ("--format onnx: onnxscript is not installed", "pip install 'dist-adv[onnx]'")
    refused(export("--format", "onnx"), *says)


# --- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--format", "onnx", "--push", "me/x"), "--push: goes with --format hub, not onnx"),
        (("--format", "onnx", "--license", "mit"), "--license: goes with --format hub"),
        (("--name", "Me2026Fast"), "--name: goes with --format robustbench, not hub"),
        (("--format", "robustbench"), "--format robustbench: needs a --name"),
        (("--format", "robustbench", "--name", "my-net"), "--name: 'my-net' cannot name a class"),
        (("--push", "robust", "--yes"), "--push: 'robust' names no user; write USER/REPO"),
        (("--push", "me/a b", "--yes"), "--push: Repo id must use alphanumeric chars"),
    ],
)
def test_options_that_are_refused(arguments: tuple[str, ...], says: str, export: Export) -> None:
    finished()
    refused(export(*arguments), says)


@pytest.mark.parametrize("kind", ["robustbench", "onnx", "torch-export"])
def test_runs_and_folders_that_are_refused(kind: str, export: Export) -> None:
    name = ("--name", "Me2026Fast") if kind == "robustbench" else ()
    finished(WRN, NATURAL, AUTOATTACK)
    Path("new").mkdir()
    status, _, (line,) = export("--format", kind, *name)
    assert (status, "new: cannot be written (File exists)" in line) == (2, True)
    Path("new").rmdir()
    Path("run/model.safetensors").unlink()
    refused(export("--format", kind, *name), "no such weights file; has the run finished?")
