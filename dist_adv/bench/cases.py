"""The cases of `dist-adv bench`: what is timed, against what, and which bar it should pass."""

import importlib.util
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_adv import packages
from dist_adv.attacks import frozen
from dist_adv.attacks.threat import build as build_threat
from dist_adv.bench import published
from dist_adv.bench.timing import PeakMemory, alternate, copy_rate, launched, matmul_rate, noise
from dist_adv.config import Config, load_config, parse_config
from dist_adv.data import Batch, Loader, load_dataset
from dist_adv.distributed.session import Session
from dist_adv.distributed.start import precision_of
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.evaluation.images import subset
from dist_adv.models import Classifier, build_model, load_model
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.run import read_runs
from dist_adv.terminal import bar
from dist_adv.tracking.tracker import Tracker
from dist_adv.training.display import TrainingDisplay
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.trainer import Surroundings, Trainer

EPS, ALPHA, PGD_STEPS, PGD_ALPHA, REPLAYS = 8 / 255, 10 / 255, 7, 2 / 255, 2


@dataclass(frozen=True)
class Row:
    """One line of the table. met: None where there is no bar for what was measured."""

    case: str
    what: str
    measured: str
    bar: str = ""
    met: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """What is measured, and on what. quick: toy sizes that only show that everything runs."""

    accelerator: Accelerator
    width: int = 64
    batch_size: int = 128
    quick: bool = False
    run_dir: Path | None = None
    data: str | None = None
    out: Path = Path("bench")
    tick: Callable[[], object] = lambda: None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def precision(self) -> str:
        return precision_of(self.accelerator)

    @property
    def standard(self) -> bool:
        """The bars are for this: CPU, bf16, width 64, batches of 128."""
        cpu = self.device.type == "cpu" and self.precision == "bf16"
        return cpu and (self.width, self.batch_size, self.quick) == (64, 128, False)

    @property
    def small(self) -> int:
        """A width at which what the framework adds to the network would show."""
        return min(self.width, 16)

    def rounds(self, wanted: int) -> int:
        return 2 if self.quick else wanted

    def config(self, method: dict[str, Any], width: int | None = None, **train: Any) -> Config:
        tree = {
            "threat": {"eps": EPS},
            "method": method,
            "model": {"name": "preact_resnet18", "width": width or self.width},
            "train": {"batch_size": self.batch_size, "save_minutes": None, **train},
            "track": {"wandb": {"mode": "disabled"}},
        }
        return parse_config(tree, "bench")

    def trainer(self, method: dict[str, Any], width: int | None = None, **train: Any) -> Trainer:
        images = noise(60 * self.batch_size), noise(100)
        return Trainer(self.config(method, width, **train), self.accelerator, images)

    def learner(self, method: dict[str, Any], width: int | None = None, **train: Any) -> Learner:
        images = noise(60 * self.batch_size)
        return Learner(self.config(method, width, **train), self.accelerator, images)

    def network(self, width: int | None = None) -> Classifier:
        """Return a network as `trainer` has it, on the device."""
        config = self.config({"name": "natural"}, width)
        data = noise(100)
        return build_model(config.model, *data.statistics(), data.classes, 0).to(self.device)


def peaks(bench: Bench) -> Iterator[Row]:
    """Measure what this device can do now: the ceilings of everything below."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in dtypes.items():
        rate = matmul_rate(bench.device, dtype)
        yield Row(
            "peaks", f"matrix product, {name}", f"{rate / 1e12:.2f} Tflop/s", details={"rate": rate}
        )
    rate = copy_rate(bench.device)
    yield Row("peaks", "copy, read and written", f"{rate / 1e9:.0f} GB/s", details={"rate": rate})


def steps(bench: Bench) -> Iterator[Row]:
    """One optimiser step of each method against the published loop's."""
    pgd = {"name": "pgd", "steps": PGD_STEPS, "alpha": PGD_ALPHA}
    fast = {"name": "fast", "alpha": ALPHA}
    free = {"name": "free", "replays": REPLAYS}
    # what, method, the published one, optimiser steps a call, bar, rounds
    Loop = Callable[[published.Published, Tensor, Tensor], None]
    cases: list[tuple[str, dict[str, Any], Loop, int, float, int]] = [
        ("natural step", {"name": "natural"}, published.Published.natural, 1, 2.2, 7),
        ("Free replay", free, lambda p, x, y: p.free(x, y, REPLAYS), REPLAYS, 2.2, 5),
        ("Fast step", fast, lambda p, x, y: p.fast(x, y, ALPHA), 1, 2.6, 7),
        ("PGD-7 step", pgd, lambda p, x, y: p.pgd(x, y, PGD_STEPS, PGD_ALPHA), 1, 3.0, 3),
    ]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(bench.precision, torch.float32)
    peak = matmul_rate(bench.device, dtype)
    for what, method, loop, per_call, bar_, rounds in cases:
        learner, meter = bench.learner(method), Meter(bench.device)
        batch = next(learner.loader.epoch(0))
        theirs = published.Published(bench.network(), EPS, 0.1)
        with FlopCounterMode(display=False) as flops:
            learner.learn(batch, meter)
        timings = alternate(
            {
                "published": partial(loop, theirs, batch.x.contiguous(), batch.y),
                "ours": partial(learner.learn, batch, meter),
            },
            bench.device,
            bench.rounds(rounds),
            tick=bench.tick,
        )
        memory = PeakMemory(bench.device)
        learner.learn(batch, meter)
        ratio, low, high = timings.ratio("published", "ours")
        seconds = timings.median("ours") / per_call
        rate = flops.get_total_flops() / per_call / seconds
        megabytes = memory.megabytes()
        yield Row(
            "steps",
            f"{what} against the published loop",
            f"{ratio:.2f}x ({low:.2f} to {high:.2f}): {1e3 * seconds:.0f} ms, "
            f"{bench.batch_size / seconds:.0f} images/s, {rate / peak:.0%} of peak",
            f"at least {bar_:g}x",
            ratio >= bar_ if bench.standard else None,
            {
                "ratio": [ratio, low, high],
                "published_ms": 1e3 * timings.median("published") / per_call,
                "what": f"{what}, {bench.precision}, batch {bench.batch_size}, compile none",
                "step_ms": 1e3 * seconds,
                "images_per_s": bench.batch_size / seconds,
                "flop_per_s": rate,
                "peak_flop_per_s": peak,
                "peak_memory_mb": megabytes,
            },
        )


def compiled(bench: Bench) -> Iterator[Row]:
    """Choices of train.compile against none. Compiling comes first and counts for itself."""
    choices = ("default", "graphs") if bench.device.type == "cuda" else ("default",)
    for choice in choices:
        yield _compiled(bench, choice)


def _compiled(bench: Bench, choice: str) -> Row:
    sides, first = {}, 0.0
    for side in ("none", choice):
        learner, meter = (
            bench.learner({"name": "fast"}, bench.small, compile=side),
            Meter(bench.device),
        )
        batch = next(learner.loader.epoch(0))
        sides[side] = partial(learner.learn, batch, meter)
        began = time.perf_counter()
        try:
            for _ in range(3):  # graphs are recorded in the second call
                sides[side]()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return Row("compiled", f"train.compile={choice}", f"not measured: {reason}")
        first = time.perf_counter() - began
    timings = alternate(sides, bench.device, bench.rounds(15), tick=bench.tick)
    ratio, low, high = timings.ratio("none", choice)
    return Row(
        "compiled",
        f"Fast step, width {bench.small}, train.compile={choice} against none",
        f"{ratio:.2f}x ({low:.2f} to {high:.2f}), after {first:.0f} s of compiling",
        details={"ratio": [ratio, low, high], "compile_s": first},
    )


def evaluation(bench: Bench) -> Iterator[Row]:
    """PGD-20 in fp32 of a robust model against torchattacks, on the same images."""
    if importlib.util.find_spec("torchattacks") is None:
        yield Row("evaluation", "PGD-20 against torchattacks", "not measured: install torchattacks")
        return
    import torchattacks

    config, model = _robust_model(bench)
    # The layout in which it is fastest, for both.
    model = model.to(bench.device).to(memory_format=torch.channels_last)
    data = load_dataset(config.data, "test")
    n = min(len(data), 100 if bench.quick else 1000)
    threat = build_threat(config.threat.norm, config.threat.eps)
    settings = {"attacks": ["pgd-20"], "limit": n, "step_size": config.threat.eps / 4}
    options = config.eval.model_copy(update=settings)
    samples = subset(len(data), n)
    images, labels = data.images[samples].float().div_(255), data.labels[samples]
    found: dict[str, list[float]] = {"theirs": [], "ours": []}

    def theirs() -> None:
        attack = torchattacks.PGD(model, config.threat.eps, config.threat.eps / 4, 20)
        right = 0
        for start in range(0, n, options.batch_size):
            x = images[start : start + options.batch_size].to(bench.device)
            y = labels[start : start + options.batch_size].to(bench.device)
            right += int((model(attack(x, y)).argmax(1) == y).sum())
        found["theirs"].append(right / n)

    def ours() -> None:
        (result,), _ = evaluate(model, data, threat, options, bench.accelerator)
        found["ours"].append(result.accuracy)

    sides = {"theirs": theirs, "ours": ours}
    timings = alternate(sides, bench.device, bench.rounds(3), tick=bench.tick)
    ratio, low, high = timings.ratio("theirs", "ours")
    yield Row(
        "evaluation",
        f"PGD-20, {n} images of {config.data.name}, against torchattacks",
        f"{ratio:.2f}x ({low:.2f} to {high:.2f}): {n / timings.median('ours'):.0f} images/s; "
        f"accuracy {found['ours'][0]:.1%}, torchattacks {found['theirs'][0]:.1%}",
        "at least 2x",
        ratio >= 2 if bench.run_dir and not bench.quick else None,
        {
            "ratio": [ratio, low, high],
            "images_per_s": n / timings.median("ours"),
            "accuracy": found["ours"][0],
            "torchattacks_accuracy": found["theirs"][0],
        },
    )


def _robust_model(bench: Bench) -> tuple[Config, Classifier]:
    """Return the model of --run, or one trained on digits here.

    The bar is for a network such as one of CIFAR-10: a third of its answers are wrong from the
    start and another third fall. On digits nearly all are right at first.
    """
    if bench.run_dir:
        overrides = [f"data.root={bench.data}"] if bench.data else []
        return load_config(bench.run_dir / "config.yaml", overrides), load_model(bench.run_dir)
    tree = {
        "threat": {"eps": 0.2},
        "method": {"name": "fast", "alpha": 0.25},
        "model": {"name": "preact_resnet18", "width": 16},
        "data": {"name": "digits"},
        "optim": {"lr": 0.1},
        "train": {"epochs": 1 if bench.quick else 12, "batch_size": 64},
        "track": {"wandb": {"mode": "disabled"}},
    }
    config = parse_config(tree, "bench")
    learner = Learner(config, bench.accelerator, load_dataset(config.data, "train"))
    meter = Meter(bench.device)
    for epoch in range(config.train.epochs):
        for batch in learner.loader.epoch(epoch):
            learner.learn(batch, meter)
        bench.tick()
    learner.update_copy()
    return config, learner.copy.eval()


def data(bench: Bench) -> Iterator[Row]:
    """Whole epochs of augmented batches against torchvision's DataLoader with two workers."""
    images = noise(640 if bench.quick else 12800)
    loader, pixels = Loader(images, bench.batch_size, 0, bench.device), images.images
    assert isinstance(pixels, Tensor)

    def theirs() -> None:  # its workers start in it, and are gone when the other side has its turn
        for x, _ in published.batches(pixels, images.labels, bench.batch_size):
            x.to(bench.device)

    def ours() -> None:
        for batch in loader.epoch(0):
            assert batch.x.device.type == bench.device.type

    sides = {"theirs": theirs, "ours": ours}
    timings = alternate(sides, bench.device, bench.rounds(7), tick=bench.tick)
    ratio, low, high = timings.ratio("theirs", "ours")
    rates = {side: len(images) / timings.median(side) for side in sides}
    yield Row(
        "data",
        "augmented batches against torchvision's DataLoader, two workers",
        f"{ratio:.0f}x ({low:.0f} to {high:.0f}): {rates['ours']:,.0f} images/s, "
        f"torchvision {rates['theirs']:,.0f}",
        "at least 20x",
        None if bench.quick else ratio >= 20,
        {"ratio": [ratio, low, high], "images_per_s": rates},
    )


class _Bare:
    """Fast training by hand with the same tricks: what the engine is measured against."""

    def __init__(self, bench: Bench) -> None:
        self.model = bench.network(bench.small).train().to(memory_format=torch.channels_last)
        weights = self.model.parameters()
        self.sgd = torch.optim.SGD(weights, 0.1, 0.9, weight_decay=5e-4, fused=True)
        self.loss = torch.zeros((), device=bench.device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(bench.precision)
        kind = bench.device.type
        self.cast = lambda: torch.autocast(kind, dtype) if dtype else nullcontext()

    def step(self, batch: Batch) -> None:
        x, y = batch.x, batch.y
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        delta = torch.clamp(x + delta, 0, 1).sub_(x).requires_grad_()
        with frozen(self.model):
            with self.cast():
                logits = self.model(x + delta)
            loss = F.cross_entropy(logits.float(), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + ALPHA * gradient.sign()).clamp_(-EPS, EPS)
        with self.cast():
            logits = self.model(torch.clamp(x + delta, 0, 1))
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self.loss += loss.detach()


def engine(bench: Bench) -> Iterator[Row]:
    """Time a batch as `fit` takes it (rates, checks, agreement, metrics) against a loop by hand."""
    trainer, meter = bench.trainer({"name": "fast"}, bench.small, epochs=10**6), Meter(bench.device)
    learner, bare = trainer.learner, _Bare(bench)
    endless = (batch for epoch in range(10**6) for batch in learner.loader.epoch(epoch))
    with _run_of(trainer) as around:

        def ours() -> None:
            learner.learn(next(endless), meter)
            learner.clock.batch = 1 + learner.clock.step % 50  # no epoch ends here
            trainer.between_batches(around, meter)

        sides = {"engine": ours, "bare": lambda: bare.step(next(endless))}
        timings = alternate(sides, bench.device, bench.rounds(120), 5, bench.tick)
    ratio, low, high = timings.ratio("engine", "bare")
    yield Row(
        "engine",
        f"Fast, width {bench.small}: a batch of the engine against a loop by hand",
        f"{ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}) of "
        f"{1e3 * timings.median('bare'):.0f} ms",
        "within 3 %",
        None if bench.quick else ratio <= 1.03,
        {"ratio": [ratio, low, high], "bare_ms": 1e3 * timings.median("bare")},
    )


@contextmanager
def _run_of(trainer: Trainer) -> Iterator[Surroundings]:
    """Yield what `Trainer.fit` is given: a run folder, a session, records, a silent display."""
    with tempfile.TemporaryDirectory() as folder, bar(False) as progress:
        session = Session(trainer.accelerator, Path(folder), trainer.config.train)
        run = RunFolder(Path(folder))
        tracker = Tracker(run, trainer.config)
        try:
            display = TrainingDisplay(progress, trainer.learner.total_steps, 0)
            yield Surroundings(run, session, tracker, display)
        finally:
            session.close()


def overhead(bench: Bench) -> Iterator[Row]:
    """Time what an epoch of 391 Fast steps spends on metrics, a checkpoint and the curve."""
    trainer, meter = bench.trainer({"name": "fast"}), Meter(bench.device)
    learner = trainer.learner
    batch = next(learner.loader.epoch(0))
    with _run_of(trainer) as around:

        def line() -> None:
            learner.clock.batch = trainer.config.train.log_every
            trainer.between_batches(around, meter)

        def step() -> None:
            learner.learn(batch, meter)

        def save() -> None:
            trainer.save(around)

        def curve() -> None:
            learner.clock.epoch = 1
            trainer.point(around.session)

        step()
        sides = {"step": step, "line": line, "save": save}
        timings = alternate(sides, bench.device, bench.rounds(5), tick=bench.tick)
        once = alternate({"curve": curve}, bench.device, 1 + bench.quick, 0, bench.tick)
        trainer.writer.wait()
    pass_ = 391 * timings.median("step")
    shares = {
        "8 lines of metrics": 8 * timings.median("line") / pass_,
        "a checkpoint": timings.median("save") / pass_,
        "the curve (natural, FGSM, PGD-10) on 100 images": once.median("curve") / pass_,
    }
    yield Row(
        "overhead",
        f"of an epoch of Fast, width {bench.width}",
        "; ".join(f"{what} {share:.2%}" for what, share in shares.items()),
        details={"shares": shares, "step_ms": 1e3 * timings.median("step")},
    )


def ranks(bench: Bench) -> Iterator[Row]:
    """Gradients over the wire on two ranks, and two ranks against one with two threads."""
    rounds = bench.rounds(20)
    one, two = (_ranks(bench, n, 3 - n, rounds) for n in (1, 2))
    once = all(count == 1 for count in two["reduced_times"].values())
    numbers = next(iter(two["bytes"].values()))
    yield Row(
        "ranks",
        f"gradient all-reduces an optimiser step, {', '.join(two['bytes'])}",
        f"{'exactly 1' if once else two['reduced_times']} ({numbers / 1e6:.1f} MB in "
        f"{max(two['buckets'].values()):g} part(s)); in attacks none",
        "exactly 1",
        once,
        two,
    )
    ratio = one["step_s"] / two["step_s"]
    yield Row(
        "ranks",
        f"Fast, width {bench.small}, global batch {bench.batch_size}: 2 ranks x 1 thread against "
        f"1 rank x 2 threads",
        f"{ratio:.2f}x ({1e3 * two['step_s']:.0f} ms against {1e3 * one['step_s']:.0f} ms)",
        details={"ratio": ratio, "one_rank_s": one["step_s"], "two_ranks_s": two["step_s"]},
    )


def _ranks(bench: Bench, ranks: int, threads: int, rounds: int) -> dict[str, Any]:
    arguments = [str(bench.small), str(bench.batch_size), str(rounds)]
    program = ["-m", "dist_adv.bench.ranks", *arguments]
    found = launched(ranks, program, OMP_NUM_THREADS=str(threads))
    bench.tick()
    return found


def startup(bench: Bench) -> Iterator[Row]:
    """Whole processes: the help, and a training of one step."""

    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        command = [sys.executable, "-m", "dist_adv", *arguments]
        subprocess.run(command, check=True, capture_output=True)
        bench.tick()
        return time.perf_counter() - began

    tries = range(1 if bench.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "c.yaml"
        config.write_text(
            "method: {name: natural}\ndata: {name: digits}\n"
            "model: {name: preact_resnet18, width: 4}\n"
            "eval: {attacks: [], every: 0}\ntrack: {wandb: {mode: disabled}}\n"
            "train: {epochs: 1, max_steps: 1, precision: fp32}\n"
        )
        help_ = statistics.median(seconds("--help") for _ in tries)
        train = statistics.median(
            seconds("train", str(config), "--run-dir", f"{folder}/{number}") for number in tries
        )
    yield Row("startup", "dist-adv --help", f"{help_:.2f} s", "under 0.5 s", help_ < 0.5)
    yield Row("startup", "a whole training of one step", f"{train:.1f} s")


def art(bench: Bench) -> Iterator[Row]:
    """Fast against ART's trainer of the same name."""
    what = "Fast, against ART's AdversarialTrainerFBFPyTorch"
    if importlib.util.find_spec("art") is None:
        yield Row("art", what, "not measured: pip install 'dist-adv[bench]'")
        return
    from art.defences.trainer import AdversarialTrainerFBFPyTorch
    from art.estimators.classification import PyTorchClassifier

    batches = 2
    images = noise(batches * bench.batch_size)
    x = torch.as_tensor(images.images).float().div(255).numpy()
    y = F.one_hot(images.labels, 10).numpy()
    model = bench.network().to(memory_format=torch.contiguous_format)
    classifier = PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if bench.device.type == "cuda" else "cpu",
    )
    theirs = AdversarialTrainerFBFPyTorch(classifier, eps=EPS)
    learner, meter = bench.learner({"name": "fast"}), Meter(bench.device)

    def ours() -> None:
        for number, batch in enumerate(learner.loader.epoch(0)):
            if number == batches:
                return
            learner.learn(batch, meter)

    def art_() -> None:
        with redirect_stderr(io.StringIO()):  # its progress bar
            theirs.fit(x, y, batch_size=bench.batch_size, nb_epochs=1)

    sides = {"art": art_, "ours": ours}
    timings = alternate(sides, bench.device, bench.rounds(3), tick=bench.tick)
    ratio, low, high = timings.ratio("art", "ours")
    yield Row(
        "art",
        what,
        f"{ratio:.2f}x ({low:.2f} to {high:.2f}): "
        f"{1e3 * timings.median('art') / batches:.0f} ms a batch against "
        f"{1e3 * timings.median('ours') / batches:.0f} ms",
        details={"ratio": [ratio, low, high]},
    )


def robust(bench: Bench) -> Iterator[Row]:
    """Train a robust CIFAR-10 network from nothing: `configs/cifar10-small/fast.yaml`."""
    what = "configs/cifar10-small/fast.yaml, compiled: training time, PGD-10 on the test set"
    run_dir = bench.out / "robust"
    config = packages.shipped("configs") / "cifar10-small/fast.yaml"
    data = ["data.name=imagefolder"] if bench.data and (Path(bench.data) / "train").is_dir() else []
    data += [f"data.root={bench.data}"] if bench.data else []
    settings = ["eval.attacks=[natural,pgd-10]", "eval.every=0", "track.wandb.mode=disabled"]
    settings += ["train.compile=default"]
    command = [sys.executable, "-m", "dist_adv", "train", str(config), *data, *settings]
    done = subprocess.run([*command, "--run-dir", str(run_dir)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1].removeprefix("dist-adv: ")
        yield Row("robust", what, f"not measured: {reason}")
        return
    (run,) = read_runs([run_dir])
    accuracy = {attack: figure.accuracy for attack, figure in run.evaluations.items()}
    seconds, n = run.seconds or 0.0, run.evaluations["natural"].n
    yield Row(
        "robust",
        what,
        f"{seconds / 60:.1f} min; natural {accuracy['natural']:.1%}, PGD-10 "
        f"{accuracy['pgd-10']:.1%} (n = {n})",
        "40 % in at most 8 min",
        accuracy["pgd-10"] >= 0.4 and seconds <= 480,
        {"seconds": seconds, "accuracy": accuracy, "n": n},
    )


CASES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "peaks": peaks,
    "steps": steps,
    "evaluation": evaluation,
    "data": data,
    "engine": engine,
    "overhead": overhead,
    "ranks": ranks,
    "startup": startup,
    "compiled": compiled,
    "art": art,
    "robust": robust,
}
