"""Training that starts from weights (`train.start`) is the plain loop that starts from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cases import CASES, TRAIN, config
from dist_adv import files, load_model, rng
from dist_adv.config import Config, parse_config
from dist_adv.data import Loader, load_dataset
from dist_adv.errors import UserError
from dist_adv.exports import export_run
from dist_adv.models import WideResNetOptions, build_model, save_model
from dist_adv.training.run import train_run
from published import Recipe

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]  # not those of the images
NETWORK = WideResNetOptions(depth=8, widen=1, width=8)
CLASSES = ["a", "b", "c"]


def write(folder: Path, options: WideResNetOptions = NETWORK, **changes: Any) -> None:
    """An export's weights: of another seed than any run's, with statistics of their own."""
    model = build_model(options, MEAN, STD, CLASSES, 17)
    draw = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
    save_model(folder / "model.safetensors", model.architecture | changes, model.state_dict())


@pytest.fixture(scope="session")
def start(once: Callable) -> Path:
    return once("start", write)


def settings(case: str, images: Path, start: Path | None, **train: Any) -> Config:
    tree = config(case, "batch", images, small=True)
    tree["train"] |= {"epochs": 1, "start": None if start is None else str(start)} | train
    return parse_config(tree, case)


def state(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(each, two[name]) for name, each in one.items())


# An attack, and weights that are averaged from those of the start on.
@pytest.mark.parametrize("case", ["pgd-random", "average"])
def test_an_epoch_is_the_plain_loop_s_bit_for_bit(case, start, images, tmp_path):
    train_run(settings(case, images, start), tmp_path / "run", "none")
    assert same(state(tmp_path / "run"), plain_loop(case, start, images))


def plain_loop(case: str, start: Path, images: Path) -> dict[str, Tensor]:
    """The weights after an epoch of the published loop on the network of the file."""
    chosen = settings(case, images, None)
    data = load_dataset(chosen.data, "train")
    loader = Loader(data, chosen.train.batch_size, TRAIN["seed"], torch.device("cpu"))
    method, loop, _, extras = CASES[case]
    total = loader.batches * method.get("replays", 1)
    model = load_model(start).to(memory_format=torch.channels_last)
    run = Recipe(model, chosen.threat.eps, chosen.optim.lr, total, True, extras, total)

    def batches():
        for run.batch in loader.epoch(0):
            yield run.batch.x, run.batch.y, run.batch.keys

    loop(run, batches(), lambda keys: rng.uniform(keys, (3, 8, 8)))
    return dict(run.result().state_dict())


def test_the_start_s_normalisation_is_kept_and_its_weights_are_recorded(start, images, tmp_path):
    train_run(settings("natural", images, start), tmp_path / "run", "none")
    trained = load_model(tmp_path / "run").architecture
    assert (trained["mean"], trained["std"]) == (MEAN, STD)
    sha256 = files.sha256(start / "model.safetensors")
    assert json.loads((tmp_path / "run" / "env.json").read_text())["start"] == sha256
    other = settings("natural", images, None)
    train_run(other, tmp_path / "fresh", "none")
    assert "start" not in json.loads((tmp_path / "fresh" / "env.json").read_text())
    assert load_model(tmp_path / "fresh").architecture["mean"] != MEAN


def test_folders_and_files_may_be_named(start, images, tmp_path):
    """A file, a run, an export of it: a run that starts from them ends alike."""
    train_run(settings("natural", images, start / "model.safetensors"), tmp_path / "one", "none")
    export_run(tmp_path / "one", tmp_path / "exported")
    for name in ("one", "exported"):
        from_it = settings("natural", images, tmp_path / name)
        train_run(from_it, tmp_path / f"from-{name}", "none")
    assert same(state(tmp_path / "from-one"), state(tmp_path / "from-exported"))
    assert not same(state(tmp_path / "one"), state(tmp_path / "from-one"))


def test_a_rate_of_next_to_nothing_leaves_the_weights(start, images, tmp_path):
    tree = settings("natural", images, start).model_dump()
    tree["optim"]["lr"] = 1e-12
    train_run(parse_config(tree, "here"), tmp_path / "run", "none")
    before, after = state(start), state(tmp_path / "run")
    for name in before:
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", ["free", "average"])
def test_it_goes_on_bit_for_bit_in_mid_epoch(case, start, images, tmp_path):
    every = settings(case, images, start, save_steps=1, keep=100)
    train_run(every, tmp_path / "whole", "none")
    second = sorted((tmp_path / "whole" / "checkpoints").iterdir())[1]
    train_run(every, tmp_path / "parts", str(second))
    assert same(state(tmp_path / "whole"), state(tmp_path / "parts"))


# --- whose run it is -----------------------------------------------------------------------------


@pytest.fixture
def begun(start: Path, images: Path, tmp_path: Path) -> Path:
    """A run of an epoch, and `start`, what it has started from."""
    shutil.copytree(start, tmp_path / "start")
    train_run(settings("natural", images, tmp_path / "start"), tmp_path / "run", "none")
    return tmp_path


def test_the_same_weights_may_lie_elsewhere(begun, images):
    shutil.copytree(begun / "start", begun / "moved")
    shutil.rmtree(begun / "start")
    longer = settings("natural", images, begun / "moved", epochs=2)
    train_run(longer, begun / "run", "auto")
    assert load_model(begun / "run").architecture["trained"]["epoch"] == 2


def test_other_weights_are_another_run(begun, images):
    """Also where nothing is left to train, and where there are none any more."""
    other = begun / "start" / "model.safetensors"
    before = state(begun / "run")
    write(begun / "start", origin="another")
    told = r"run: began with other weights \(SHA-256 \w{12}\) than train.start has now \("
    for epochs in (1, 2):
        with pytest.raises(UserError, match=told + "SHA-256"):
            train_run(
                settings("natural", images, begun / "start", epochs=epochs), begun / "run", "auto"
            )
    with pytest.raises(UserError, match=told + "fresh ones"):
        train_run(settings("natural", images, None, epochs=2), begun / "run", "auto")
    newest = sorted((begun / "run" / "checkpoints").iterdir())[-1]
    with pytest.raises(UserError, match="began with other weights"):
        train_run(settings("natural", images, other, epochs=2), begun / "new", str(newest))
    assert not (begun / "new").exists()
    assert same(before, state(begun / "run"))


def test_a_run_of_fresh_weights_goes_on_without_others(start, images, tmp_path):
    train_run(settings("natural", images, None), tmp_path / "run", "none")
    with pytest.raises(UserError, match=r"other weights \(fresh ones\) than train.start has now"):
        train_run(settings("natural", images, start, epochs=2), tmp_path / "run", "auto")


def test_a_finished_run_does_without_them(begun, images, said):
    shutil.rmtree(begun / "start")
    train_run(settings("natural", images, begun / "start"), begun / "run", "auto")
    assert "is trained already" in said.text
    with pytest.raises(UserError, match=r"train.start: .*: no such weights file"):
        train_run(settings("natural", images, begun / "start", epochs=2), begun / "run", "auto")


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, r"train.start: .*/start/model.safetensors: no such weights file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x02}q"),
            "train.start: .*: not a readable safetensors file",
        ),
        (
            lambda folder: write(folder, WideResNetOptions(depth=10, widen=1, width=4)),
            r"train.start: .* of another network \(model.depth: 10 there, 8 here; "
            r"model.width: 4 there, 8 here\); configure its own",
        ),
        (
            lambda folder: write(folder, classes=["a", "b"]),
            "classes: 2 there, 3 in imagefolder",
        ),
        (
            lambda folder: write(folder, mean=[0.5], std=[0.5]),
            "channels: 1 there, 3 in imagefolder",
        ),
        (
            lambda folder: save_model(
                folder / "model.safetensors",
                build_model(NETWORK, MEAN, STD, CLASSES, 0).architecture,
                {"net.stem.weight": torch.zeros(3)},
            ),
            "train.start: .* weights do not fit their architecture .*restore the file",
        ),
    ],
)
def test_starts_that_are_none(make, says, images, tmp_path):
    """One line before anything is written."""
    (tmp_path / "start").mkdir()
    make(tmp_path / "start")
    with pytest.raises(UserError, match=says):
        train_run(settings("natural", images, tmp_path / "start"), tmp_path / "run", "none")
    assert not (tmp_path / "run").exists()
