"""For the tests of somebody's own method: `check_method` trains with it and says what is wrong.

Two processes train a small network on a few images of noise, in double precision and with a norm
that mixes no samples, so that any number of ranks has to give the same weights; then the first
goes on alone. The test's own process trains nothing: it judges what they have written down.
"""

import json
import math
import operator
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dist_adv import plugins
from dist_adv.attacks.threat import Threat
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config, load_config, parse_config
from dist_adv.data import load_dataset
from dist_adv.data.made_up import make_images as make_images
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import LostRank, RunFailure, UserError
from dist_adv.methods import Everywhere, Method, Step, find_method
from dist_adv.methods.cost import cost_of
from dist_adv.text import one_line
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.run import train_run

_EPS = {"linf": 8 / 255, "l2": 0.5}
_BOUND = 1e-10  # what the order of summation makes of weights in double precision is below it
_NEAR = 0.1  # of the loss: bf16 has three digits
_SECONDS = 300  # for what takes ten
_BATCHES = 2  # of six, after which a run is stopped

# 41 images in batches of 15: two ranks can share neither these nor the last 11 evenly. Noise, and
# not digits: at black borders input gradients are within rounding of 0, and an ulp turns a sign.
_IMAGES = 41
_TREE: dict[str, Any] = {
    "model": {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 8, "norm": "group"},
    "optim": {"lr": 0.05, "schedule": "constant"},
    "train": {"epochs": 2, "batch_size": 15, "precision": "fp32", "threads": 1},
    "average": {"epochs": 1},  # for a method that asks for it (`net.averaged`)
    "eval": {"attacks": ["natural"], "every": 0},
    "track": {"wandb": {"mode": "disabled"}},
}
_SAVED = {"save_steps": 1, "keep": 1000}  # a checkpoint a batch


def check_method(
    method: type[Method[Any]], *, threat: Threat | None = None, **options: Any
) -> None:
    """Check that a method does what every method of dist_adv does.

    What it yields is what the engine takes. The weights get one gradient a step. A run gives the
    same bits twice, and where it is stopped in an epoch and goes on; two ranks give the weights of
    one. A loss in bf16 is that in single precision, nearly. Takes some ten seconds, on two
    processes of the CPU.

    Args:
        method: a class of a module, which those processes import.
        threat: the ball to train in; by default a usual one of the method's first norm.
        options: of `method.Options`, where they are not the defaults.

    Raises:
        AssertionError: in one sentence, what is wrong and what to do.
        UserError: the class cannot be imported, or has no such options.
    """
    reference = _reference(method)
    ball = threat or build_threat(method.norms[0], _EPS[method.norms[0]])  # type: ignore[arg-type]
    with TemporaryDirectory() as name:
        folder = Path(name)
        section = {"guard": "none", **options, "name": reference}
        config = _config(section, ball, folder)
        try:
            cost_of(config.method, ball)
        except UserError as error:
            raise AssertionError(str(error).removeprefix("method.name: ")) from error
        _train(config, folder)
        problem = next(_problems(_Found(folder)), None)
    if problem:
        raise AssertionError(f"{reference}: {problem}")


def _reference(method: type[Method[Any]]) -> str:
    reference = f"{method.__module__}:{method.__qualname__}"
    if method.__module__ == "__main__" or "<locals>" in reference:
        raise UserError(
            f"{reference}: other processes cannot import it; put the class at the top of a module"
        )
    try:
        same = find_method(reference) is method
    except ValueError as error:
        raise UserError(str(error)) from error
    if not same:
        raise UserError(f"{reference}: is another object there; put the class at that name")
    return reference


def _config(method: dict[str, Any], threat: Threat, folder: Path) -> Config:
    """Return the configuration, of which the images are made where it says."""
    noise = np.random.default_rng(0)
    for split, count in (("train", _IMAGES), ("test", 3)):
        for number in range(count):
            file = folder / "images" / split / "abc"[number % 3] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    data = {"name": "imagefolder", "root": str(folder / "images"), "augment": False}
    ball = {"norm": threat.norm, "eps": threat.eps}
    tree = {**_TREE, "train": _TREE["train"] | _SAVED, "data": data, "threat": ball}
    return parse_config(tree | {"method": method}, "check_method")


def _train(config: Config, folder: Path) -> None:
    """Let two ranks train, and write what they see of it as `0.json` and `1.json`.

    Raises AssertionError where they wait for each other; RunFailure for an end without a word.
    """
    (folder / "config.yaml").write_text(config.dump())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dist_adv.testing", str(folder), str(_SECONDS)],
        env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if any(sign in done.stderr for sign in ("SIGALRM", "collective mismatch")):
        raise AssertionError(
            f"{config.method.name}: two ranks wait for each other; let every rank call "
            f"net.sum_over_ranks as often, in the same order, with a tensor of the same shape"
        )
    if done.returncode:
        raise RunFailure(f"the ranks of check_method ended early: {done.stderr[-2000:]}")


# --- what is wrong --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a rank sees of the first epoch.

    losses: of every step, and of how many images they are the mean; gradients: that a weight gets
    a step; everywhere: what is to be the same on all ranks; changed: names of attributes that have
    changed and are not saved; drew: whether a number was drawn from torch's generator.
    """

    losses: list[float]
    images: list[int]
    gradients: float
    everywhere: dict[str, list[float]]
    changed: list[str]
    drew: bool


class _Found:
    """What two ranks, and then the first alone, have left in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]

    def seen(self, name: str, rank: int = 0) -> _Seen:
        return _Seen(**self.reports[rank][name])

    def failure(self, name: str) -> str:
        """Return why this could not be done, or an empty string."""
        found = [report[name] for report in self.reports if "failed" in report.get(name, {})]
        # One rank fails by itself, and the other because that one has left.
        return min(found, key=lambda each: each["lost"])["failed"] if found else ""

    def apart(self, name: str) -> float:
        """Return how far a run's weights are from those of one rank."""
        one, other = (load_file(self.folder / run / "model.safetensors") for run in ("one", name))
        return max((one[key] - other[key]).abs().max().item() for key in one)


def _problems(found: _Found) -> Iterator[str]:
    """Yield what is wrong, what can have one cause only before what can have several."""
    yield from _failures(found, {"one": "in training"})
    yield from _of_gradients(found)
    others = {"two": "with two ranks", "again": "in a second run of the same process"}
    yield from _failures(found, others | {"fp32": "in single precision", "bf16": "in bf16"})
    yield from _of_runs(found)
    yield from _of_ranks(found)
    yield from _of_precision(found)


def _failures(found: _Found, which: dict[str, str]) -> Iterator[str]:
    for name, where in which.items():
        if text := found.failure(name):
            yield f"fails {where}: {text}"


def _of_gradients(found: _Found) -> Iterator[str]:
    if (count := found.seen("one").gradients) != 1:
        yield (
            f"the weights get {count:g} gradients a step and not 1, and ranks sum each of them; "
            f"take an attack's gradient in `with net.frozen() as model`"
        )


def _of_runs(found: _Found) -> Iterator[str]:
    """One rank alone: the same bits each time, stopped or not."""
    if found.seen("one").drew:
        yield (
            "takes numbers from torch's generator, which are others on other ranks; draw random "
            "numbers from batch.keys by dist_adv.rng"
        )
    if found.apart("again"):
        yield (
            "the same run again gives other weights; draw random numbers from batch.keys by "
            "dist_adv.rng, not from torch's generator, and keep nothing outside of self"
        )
    failure = found.failure("resumed")
    if failure or found.apart("resumed"):
        names = ", ".join(f"self.{name}" for name in found.seen("one").changed)
        yield (
            f"a run that is stopped after {_BATCHES} batches and goes on "
            f"{f'fails ({failure})' if failure else 'gives other weights'}: something that it "
            f"keeps between batches is not saved{f' ({names})' if names else ''}; keep it in an "
            f"attribute of kind ByPosition, BySample or Everywhere"
        )


def _of_ranks(found: _Found) -> Iterator[str]:
    one, two = found.seen("one"), [found.seen("two", rank) for rank in range(2)]
    for name, value in two[0].everywhere.items():
        if value != two[1].everywhere[name]:
            yield (
                f"self.{name} is an Everywhere and differs between ranks; change it by "
                f"net.sum_over_ranks of each rank's share alone"
            )
    if (far := found.apart("two")) > _BOUND:
        yield _why_ranks_matter(one, two, far)
    failure = found.failure("from-two")
    if failure or (far := found.apart("from-two")) > _BOUND:
        yield (
            f"a run that two ranks begin and one ends "
            f"{f'fails ({failure})' if failure else f'gives other weights ({far:.1g} apart)'}; "
            f"change what it carries by the `write` of ByPosition and BySample alone"
        )


def _why_ranks_matter(one: _Seen, two: list[_Seen], far: float) -> str:
    """Say where two ranks part from one, as far as losses tell."""
    for step, alone in enumerate(one.losses):
        losses, images = [rank.losses[step] for rank in two], [rank.images[step] for rank in two]
        both = sum(map(operator.mul, losses, images)) / sum(images)
        if _equal(both, alone):
            continue
        if _equal(sum(losses), alone):
            return "its loss is a sum over the batch's samples; take the mean"
        if step == 0:
            return (
                f"its first loss is {alone:.6g} on one rank and {both:.6g} on two, and so depends "
                f"on how the batch is shared; take the mean of what depends on a sample alone, and "
                f"get what does not by net.sum_over_ranks"
            )
        return (
            f"the loss of step {step + 1} is {alone:.6g} on one rank and {both:.6g} on two, and "
            f"the first was the same: a gradient, or what it carries, depends on how the batch is "
            f"shared; sum over ranks by net.sum_over_ranks, and carry the rows that were read"
        )
    return (
        f"two ranks give other weights than one ({far:.1g} apart); let loss and state depend on "
        f"each sample alone, in the numbers of batch.x, or sum over ranks by net.sum_over_ranks"
    )


def _equal(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=_BOUND, abs_tol=_BOUND)


def _of_precision(found: _Found) -> Iterator[str]:
    single, half = (found.seen(precision).losses[0] for precision in ("fp32", "bf16"))
    if not math.isclose(half, single, rel_tol=_NEAR, abs_tol=_NEAR):
        yield (
            f"its first loss is {half:.4g} in bf16 and {single:.4g} in single precision; compute "
            f"nothing from differences of logits that bf16 rounds away"
        )


# --- the processes that train ---------------------------------------------------------------------


def _main(folder: Path, seconds: int) -> None:
    """Train with another rank, then alone; write down what is seen."""
    signal.alarm(seconds)  # ends this process, also where it waits for another
    rank = int(os.environ["RANK"])
    report = {"two": _attempt(_train_and_watch, folder, "two")}
    if rank == 0:
        _be_alone()
        report["one"] = _attempt(_train_and_watch, folder, "one")
        report["again"] = _attempt(_train_only, folder, "again")
        for start, name in (("one", "resumed"), ("two", "from-two")):
            if "failed" not in report[start]:
                stopped = sorted((folder / start / "checkpoints").iterdir())[_BATCHES - 1]
                report[name] = _attempt(_train_only, folder, name, stopped)
        for precision in ("fp32", "bf16"):
            report[precision] = _attempt(_watch_in_precision, folder, precision)
    (folder / f"{rank}.json").write_text(json.dumps(report))
    os._exit(0)  # see cli.main


def _attempt(work: Callable[..., _Seen | None], *arguments: Any) -> dict[str, Any]:
    """Return what is seen, or why nothing is."""
    try:
        seen = work(*arguments)
    except Exception as error:
        ours = isinstance(error, UserError | RunFailure)
        text = one_line(error) if ours else plugins.told(error)
        return {"failed": text, "lost": isinstance(error, LostRank)}
    return asdict(seen) if seen else {}


def _train_and_watch(folder: Path, name: str) -> _Seen:
    config = _in_double_precision(folder)
    seen = _watch(config)
    train_run(config, folder / name, "none")
    return seen


def _train_only(folder: Path, name: str, start: Path | str = "none") -> None:
    train_run(_in_double_precision(folder), folder / name, str(start))


def _in_double_precision(folder: Path) -> Config:
    torch.set_default_dtype(torch.float64)
    return load_config(folder / "config.yaml")


def _watch_in_precision(folder: Path, precision: str) -> _Seen:
    torch.set_default_dtype(torch.float32)
    AcceleratorState._reset_state()  # which has one precision a process
    return _watch(load_config(folder / "config.yaml", [f"train.precision={precision}"]))


def _be_alone() -> None:
    """Forget the other rank, and that a launcher has started this one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]


class _Losses(Meter):
    """Keeps the loss of each step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.each: list[float] = []
        self.images: list[int] = []

    def add(self, out: Step, y: Tensor) -> None:
        super().add(out, y)
        self.each.append(out.loss.item())
        self.images.append(len(y))


def _watch(config: Config) -> _Seen:
    """Learn an epoch, and see to what `train_run` does not tell."""
    accelerator = start_accelerator(config.train.precision, config.train.threads)
    learner = Learner(config, accelerator, load_dataset(config.data, "train"))
    learner.settle()
    gradients = _count_gradients(learner)
    meter, before = _Losses(accelerator.device), _attributes(learner)
    with plain_failures(accelerator, "train.batch_size", config.train.batch_size):
        for batch in learner.loader.epoch(0):
            learner.learn(batch, meter)
        learner.check_updates()
    seed = torch.initial_seed()  # which `learn` has set for the last batch
    return _Seen(
        losses=meter.each,
        images=meter.images,
        gradients=max(gradients) / learner.clock.step,
        everywhere={
            name: each.value.flatten().tolist()
            for name, each in learner.method.carried().items()
            if isinstance(each, Everywhere)
        },
        changed=[
            name
            for name, (value, version) in _attributes(learner).items()
            if name not in before or before[name][0] is not value or before[name][1] != version
        ],
        drew=not torch.get_rng_state().equal(torch.Generator().manual_seed(seed).get_state()),
    )


def _attributes(learner: Learner) -> dict[str, tuple[Any, int]]:
    """Return the method's attributes that are not saved, and how often a tensor has changed."""
    method = learner.method
    saved = method.carried()
    return {
        name: (value, getattr(value, "_version", 0))
        for name, value in vars(method).items()
        if name not in saved
    }


def _count_gradients(learner: Learner) -> list[int]:
    """Count how often each weight gets a gradient: DDP sums it over the ranks each time."""
    weights = list(learner.net.bare.parameters())
    counts = [0] * len(weights)

    def count(number: int, weight: Tensor) -> None:
        counts[number] += 1

    for number, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(partial(count, number))
    return counts


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
