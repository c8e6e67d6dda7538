"""A run goes on with the images that it was trained on, or says in one line what has changed.

The run is made longer for it to go on, on a copy of its images that was changed meanwhile.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cases import config
from dist_adv.config import Config, parse_config
from dist_adv.errors import UserError
from dist_adv.judging import measurement
from dist_adv.judging.finished_run import evaluate_run
from dist_adv.judging.measurement import Asked
from dist_adv.runs import checkpoint
from dist_adv.training.run import train_run
from launch import checkpoints


def settings(root: Path, epochs: int, **data: object) -> Config:
    """120 images in batches of 33, three full ones and one of 21 in an epoch."""
    tree = config("fast-random", "batch", root, small=True)
    tree["train"] |= {"epochs": epochs, "keep": 100}
    tree["model"] |= {"width": 2, "norm": "group"}
    tree["data"] |= data
    return parse_config(tree, "here")


@pytest.fixture(scope="module")
def one_epoch(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to go on with."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train_run(settings(images, 1), run_dir, "none")
    return run_dir


@pytest.fixture
def run_dir(one_epoch: Path, tmp_path: Path) -> Path:
    return shutil.copytree(one_epoch, tmp_path / "run")


@pytest.fixture
def root(images: Path, tmp_path: Path) -> Path:
    """The same images elsewhere."""
    return shutil.copytree(images, tmp_path / "images")


def another(root: Path, split: str = "train", name: str = "0.png") -> None:
    Image.new("RGB", (8, 8), "white").save(root / split / "a" / name)


def fewer(root: Path) -> None:
    for path in sorted((root / "train" / "a").iterdir())[:30]:
        path.unlink()


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (another, "train: the same number of images, but other contents"),
    (lambda root: another(root, "test"), "test: the same number of images, but other contents"),
    (lambda root: another(root, name="new.png"), "train: 121 images instead of 120"),
]


@pytest.mark.parametrize("data", [{}, {"resident_gb": 0, "workers": 1}])
def test_the_same_images_may_lie_elsewhere_and_be_read_otherwise(data, root, run_dir):
    train_run(settings(root, 2, **data), run_dir, "auto")
    assert checkpoints(run_dir)[-1] == "step-000000008"


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_other_images_are_refused(change, says, root, run_dir):
    change(root)
    before = {
        path: path.read_bytes()
        for path in run_dir.rglob("*")
        if path.name != "log.txt" and path.is_file()
    }
    with pytest.raises(UserError) as raised:
        train_run(settings(root, 2), run_dir, "auto")
    newest = run_dir / "checkpoints" / "step-000000004"
    assert str(raised.value) == (
        f"{newest}: was trained on other images ({says}); restore them, start a new run with "
        f"--run-dir, or go on with these all the same: --resume {newest}"
    )
    assert all(path.read_bytes() == content for path, content in before.items())


def test_who_names_the_checkpoint_goes_on_aloud(root, run_dir, said):
    another(root)
    newest = run_dir / "checkpoints" / "step-000000004"
    train_run(settings(root, 2), run_dir, str(newest))
    assert "going on with other images than before (train: the same number" in said.text
    train_run(settings(root, 3), run_dir, "auto")  # they are the run's own from then on
    assert checkpoints(run_dir)[-1] == "step-000000012"


@pytest.mark.parametrize("resume", ["auto", "checkpoints/step-000000004"])
def test_another_number_of_batches_is_another_schedule(resume, root, run_dir):
    """Counted in steps the run would be in another epoch."""
    fewer(root)
    with pytest.raises(UserError, match=r"another number of images \(train: 90 images.*3 batches"):
        train_run(settings(root, 2), run_dir, str(run_dir / resume) if "/" in resume else resume)


def forget_images(folder: Path) -> None:
    """The checkpoint as versions before fingerprints have written it."""
    saved = checkpoint.load(folder)
    state = {key: value for key, value in saved.state.items() if key not in ("images", "format")}
    checkpoint.save(folder.parent, 4, checkpoint.Checkpoint(saved.groups, state), 100)
    assert "images" not in json.loads((folder / "state.json").read_text())


def test_a_checkpoint_without_a_fingerprint_goes_on(root, run_dir):
    forget_images(run_dir / "checkpoints" / "step-000000004")
    another(root)
    train_run(settings(root, 2), run_dir, "auto")
    assert checkpoints(run_dir)[-1] == "step-000000008"


def test_without_a_fingerprint_batches_are_counted_all_the_same(root, run_dir):
    forget_images(run_dir / "checkpoints" / "step-000000004")
    fewer(root)
    with pytest.raises(UserError, match=r"another number of images: an epoch has 3 batches now"):
        train_run(settings(root, 2), run_dir, "auto")


def test_an_interrupted_evaluation_goes_on_with_its_own_images_only(
    root, run_dir, monkeypatch, said
):
    """Interrupted before its figures are written; the same images may lie elsewhere."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def evaluate(where: Path, **patched: object) -> str:
        said.clear()
        with monkeypatch.context() as patch:
            for name, value in patched.items():
                patch.setattr(measurement, name, value)
            evaluate_run(run_dir, Asked(["natural"], overrides=[f"data.root={where}"]))
        return said.text

    with pytest.raises(KeyboardInterrupt):
        evaluate(root, write_results=interrupted)
    (left,) = run_dir.glob("unfinished-*.json")
    moved = shutil.copytree(root, root.with_name("moved"))
    another(root, "test")
    assert "going on after" not in evaluate(root)
    assert left.exists()
    assert "natural: going on after 6 images" in evaluate(moved)
    assert not left.exists()
