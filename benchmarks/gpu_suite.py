"""What one GPU does: ceilings, step times, the record, the paper's eight rows, attacks.

Runs on a bare machine from a checkout and a folder of CIFAR-10 (torchvision's files, or an image
folder). Each part ends within nine minutes and prints a short table last. Rows are in OUT/PART.json
as soon as they are measured, the most valuable first: a part that is run again, after its time was
over or after it was stopped, goes on with those that are missing. Runs of c and d go on from
their checkpoints.

  python benchmarks/gpu_suite.py a --out OUT
  python benchmarks/gpu_suite.py b --out OUT [--precision bf16]
  python benchmarks/gpu_suite.py c --out OUT --data DATA
  python benchmarks/gpu_suite.py d --out OUT --data DATA [--rows free-8,fast-10-128] [--jobs 2]
  python benchmarks/gpu_suite.py e --out OUT --data DATA      (attacks the model of part c)

  a  bandwidth of a copy, rate of matrix products; where the time of an eager step goes
  b  one optimiser step of each method: train.compile x batch size x precision, share of the peak;
     TF32, algorithms that are not deterministic; several processes at once
  c  the record: Fast, PreActResNet18, 15 epochs; natural and PGD-50-10 on 10,000 images; the row
     FGSM-RS of the FastAT benchmark by its protocol
  d  the paper's rows: Free m = 2, 4, 8, 10; Fast with alpha 10 and 16 at batches of 128 and 256;
     compiled, and as many at once, as was fastest in part b
  e  images a second of PGD-50-10 and AutoAttack

Energy is the GPU's (nvidia-smi's power.draw), of runs alone. --toy runs any part in a minute or
two on a CPU, on digits, to show that it works; its figures say nothing of a GPU.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dist_adv.bench.cases import Bench  # noqa: E402
from dist_adv.bench.timing import (  # noqa: E402
    PeakMemory,
    alternate,
    copy_rate,
    matmul_rate,
    network,
    synchronize,
)
from dist_adv.data import Batch  # noqa: E402
from dist_adv.distributed import start  # noqa: E402
from dist_adv.training.learner import Learner  # noqa: E402
from dist_adv.training.meter import Meter  # noqa: E402

Row = dict[str, Any]
MINUTES = 8.0
METHODS: dict[str, dict[str, Any]] = {
    "natural": {"name": "natural"},
    "Free m=4": {"name": "free", "replays": 4},
    "Fast": {"name": "fast"},
    "PGD-7": {"name": "pgd"},
    "N-FGSM": {"name": "n-fgsm"},
    "TRADES-10": {"name": "trades"},
    "Consistency": {"name": "consistency", "start": "random"},
    "GAT": {"name": "gat"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = {
    **{f"free-{m}": ("free", [f"method.replays={m}"]) for m in (2, 4, 8, 10)},
    **{
        f"fast-{alpha}-{batch}": (
            "fast",
            [f"method.alpha={alpha}/255", f"train.batch_size={batch}"],
        )
        for alpha, batch in product((10, 16), (128, 256))
    },
}
# FGSM-RS as the benchmark trains it, in this project's words; PreActResNet18 for ResNet-18.
FASTAT = [
    "train.epochs=100",
    "optim.lr=0.1",
    "train.label_smoothing=0.4",
    "data.validation=1000",
]


class Case(NamedTuple):
    """What a step time is of. numerics: `ieee`; `tf32`; `fastest` (not deterministic)."""

    method: str
    batch: int = 128
    compile: str = "none"
    precision: str = "bf16"
    numerics: str = "ieee"
    at_once: int = 1

    @property
    def what(self) -> str:
        """As `dist-adv plan --step-times` reads it, where nothing is out of the ordinary."""
        name = f"{self.method}, {self.precision}, batch {self.batch}, compile {self.compile}"
        name += f", {self.numerics}" if self.numerics != "ieee" else ""
        return name + (f", {self.at_once} at once" if self.at_once > 1 else "")


def cases(toy: bool) -> list[Case]:
    """The most valuable first. A compiled case takes half a minute, another a second or two."""
    if toy:
        return [
            *(Case(method, 16) for method in ("Fast", "Free m=4", "TRADES-10")),
            Case("Fast", 16, "default"),
            Case("Fast", 16, at_once=2),
            *(Case(method, 16, precision="fp32") for method in ("Fast", "Free m=4")),
            Case("Fast", 16, precision="fp32", numerics="tf32"),
        ]
    pair, four, sizes = ("Fast", "Free m=4"), ("Fast", "Free m=4", "natural", "PGD-7"), (512, 1024)
    others = [method for method in METHODS if method not in four]
    return [
        *(Case(method, 128, choice) for choice in ("none", "graphs") for method in four),
        *(Case(method, size) for size in sizes for method in pair),
        *(Case("Free m=4", 128, "none", at_once=n) for n in (2, 3)),
        *(Case("Free m=4", 128, "graphs", at_once=n) for n in (2, 3)),
        *(Case(method, precision="fp32") for method in pair),
        *(Case(method, precision="fp32", numerics="tf32") for method in pair),
        *(Case(method, numerics="fastest") for method in pair),
        *(Case(method, size, "graphs") for size in sizes for method in pair),
        *(Case(method, 128, "default") for method in pair),
        *(Case(method) for method in others),
        *(Case(method, 128, "graphs") for method in others),
        *(Case(method, precision="fp16") for method in pair),
        *(Case(method, size) for size in sizes for method in ("natural", "PGD-7")),
        *(Case(method, 128, "max") for method in pair),
    ]


class Results:
    """Rows of a part in OUT/PART.json, of one machine, written as soon as there are more."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path, self._lock = options.out / f"{options.part}.json", threading.Lock()
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        self.about = {
            "part": options.part,
            "toy": options.toy,
            "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "commit": commit,
            "network": network(Bench(None, 4 if options.toy else 64).config(METHODS["Fast"]).model),
        }
        self.read()

    def read(self) -> None:
        """Take the rows of an earlier call, or of another process."""
        found = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}
        self.rows: list[Row] = found["rows"]
        for key in ("toy", "hardware", "torch", "commit"):
            if self.rows and found[key] != self.about[key]:
                sys.exit(
                    f"gpu_suite: {self.path} has rows of {key} {found[key]}, and here it is "
                    f"{self.about[key]}; give another --out"
                )

    def has(self, what: str) -> bool:
        return any(row["what"] == what and row.get("state", "done") == "done" for row in self.rows)

    def add(self, row: Row) -> None:
        """Put a row in, in the place of an earlier one that was not done."""
        with self._lock:
            self.rows = [each for each in self.rows if each["what"] != row["what"]] + [row]
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1))
            part.replace(self.path)

    def show(self) -> None:
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        title = ", ".join(f"{key} {value}" for key, value in self.about.items())
        table = Table(*keys, title=title)
        for row in self.rows:
            table.add_row(*(str("" if row.get(key) is None else row[key]) for key in keys))
        Console(width=160).print(table)


class Power:
    """Energy of the GPU while `with` lasts, by samples of nvidia-smi; None where it gives none."""

    _QUERY = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms=500")

    def __enter__(self) -> "Power":
        self.began, self.samples = time.monotonic(), list[float]()
        self._process: subprocess.Popen[str] | None = None
        with suppress(OSError):
            self._process = subprocess.Popen(
                self._QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._sample, daemon=True).start()
        return self

    def _sample(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # [N/A]
                self.samples.append(float(line))

    def __exit__(self, *_: object) -> None:
        self.hours = (time.monotonic() - self.began) / 3600
        if self._process:
            self._process.kill()
            self._process.wait()

    @property
    def watt_hours(self) -> float | None:
        if not self.samples:
            return None
        return round(sum(self.samples) / len(self.samples) * self.hours, 3)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


# Part a


def ceilings(options: argparse.Namespace, results: Results) -> None:
    on_gpu = device().type == "cuda"
    rates: dict[str, Callable[[], float]] = {
        f"{name} product, Tflop/s": partial(_product, dtype)
        for name, dtype in DTYPES.items()
        if on_gpu or name != "fp16"  # emulated
    }
    if on_gpu:
        rates["tf32 product, Tflop/s"] = partial(_product, torch.float32, tf32=True)
    rates["copy, GB/s"] = lambda: copy_rate(device()) / 1e9
    for what, rate in rates.items():
        if not results.has(what):
            results.add({"what": what, "rate": round(rate(), 2)})
    accelerator = None
    for size, method in product((16,) if options.toy else (128, 512), ("Fast", "Free m=4")):
        case = Case(method, size)
        if not results.has(f"profile of {case.what}"):
            accelerator = accelerator or start.start_accelerator("bf16")
            results.add(profiled(Bench(accelerator, 4 if options.toy else 64, size), case))


def _product(dtype: torch.dtype, tf32: bool = False) -> float:
    set_tf32(tf32)
    try:
        return matmul_rate(device(), dtype) / 1e12
    finally:
        set_tf32(False)


# Of what the kernels of cuDNN and torch, or on a CPU the operators, are named.
_KINDS = {
    "batch_norm": re.compile("batch_?norm|bn_(fw|bw)", re.IGNORECASE),
    "convolutions": re.compile("conv|cudnn|xmma|gemm|cutlass|nvjet|wgrad|dgrad", re.IGNORECASE),
}


def profiled(bench: Bench, case: Case) -> Row:
    """Return how long a step takes, how long the device computes in it, and at what."""
    learner = bench.learner(METHODS[case.method])
    batch, meter = next(learner.loader.epoch(0)), Meter(bench.device)
    steps = 3 * learner.method.steps_per_batch
    run = partial(_learn, learner, batch, meter, 3)
    run()
    synchronize(bench.device)
    began = time.perf_counter()
    run()
    issued = time.perf_counter() - began
    synchronize(bench.device)
    seconds = time.perf_counter() - began
    on_gpu = bench.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=kinds, acc_events=True) as seen:
        run()
        synchronize(bench.device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    kernels = [each for each in seen.key_averages() if each.device_type == wanted]
    times = {
        each.key: each.self_device_time_total if on_gpu else each.self_cpu_time_total
        for each in kernels
    }
    total, shares, left = sum(times.values()) or 1, {}, dict(times)
    for kind, pattern in _KINDS.items():
        mine = [key for key in left if pattern.search(key)]
        shares[kind] = round(sum(left.pop(key) for key in mine) / total, 3)
    return {
        "what": f"profile of {case.what}",
        "step_ms": round(1e3 * seconds / steps, 3),
        "issued_ms": round(1e3 * issued / steps, 3),
        "device_ms": round(total / 1e3 / steps, 3),
        "kernels": round(sum(each.count for each in kernels) / steps),
        **shares,
    }


def _learn(learner: Learner, batch: Batch, meter: Meter, times: int) -> None:
    for _ in range(times):
        learner.learn(batch, meter)


# Part b


def steps(options: argparse.Namespace, results: Results) -> None:
    """One process for each precision and its switches in a row: an Accelerator has one."""
    end = time.monotonic() + 60 * options.minutes
    chosen = [
        case
        for case in cases(options.toy)
        if options.precision in (None, case.precision) and not results.has(case.what)
    ]
    groups = groupby(chosen, lambda case: (case.precision, case.numerics, case.at_once))
    for (*_, at_once), group in groups:
        some = [case._asdict() for case in group]
        if time.monotonic() > end:
            return
        if at_once > 1:
            for case in some:
                if time.monotonic() < end:
                    results.add(together(options, Case(**case)))
            continue
        left = (end - time.monotonic()) / 60
        _child(options, "--cases", json.dumps(some), "--minutes", str(left)).wait()
        results.read()


def _child(options: argparse.Namespace, *more: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "b", "--out", str(options.out), *more]
    return subprocess.Popen([*command, *["--toy"] * options.toy], text=True, **how)


def measure(options: argparse.Namespace, results: Results) -> None:
    """Time the cases that this process was started for."""
    end, some = time.monotonic() + 60 * options.minutes, [Case(**each) for each in options.cases]
    accelerator = begin(some[0])
    set_tf32(some[0].numerics == "tf32")
    peak = matmul_rate(accelerator.device, DTYPES[some[0].precision])
    for case in some:
        if time.monotonic() > end:
            return
        try:
            bench = Bench(accelerator, 4 if options.toy else 64, case.batch)
            results.add({"what": case.what, **timed(bench, case, peak, options.toy)})
        except Exception as error:  # one that fails is a row, and the others go on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            results.add({"what": case.what, "state": f"failed: {reason[:120]}"})


def begin(case: Case) -> Any:
    return start.start_accelerator(case.precision, deterministic=case.numerics != "fastest")


def timed(bench: Bench, case: Case, peak: float, toy: bool) -> Row:
    """Time blocks of steps, between which the device is waited for, after all is recorded."""
    torch.compiler.reset()
    learner = bench.learner(METHODS[case.method], compile=case.compile)
    batch, meter = next(learner.loader.epoch(0)), Meter(bench.device)
    per_batch = learner.method.steps_per_batch
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        learner.learn(batch, meter)
    flop = counter.get_total_flops() / per_batch
    began = time.perf_counter()
    _learn(learner, batch, meter, 4)  # compiles, warms up, records, replays
    synchronize(bench.device)
    first = time.perf_counter() - began
    memory, block = PeakMemory(bench.device), 1 if toy else 10
    sides = {"steps": partial(_learn, learner, batch, meter, block)}
    timings = alternate(sides, bench.device, rounds=2 if toy else 7, warm_up=1)
    seconds = timings.median("steps") / block / per_batch
    row = {
        "step_ms": round(1e3 * seconds, 3),
        "images_per_s": round(case.batch / seconds),
        "share_of_peak": round(flop / seconds / peak, 3),
        "peak_memory_mb": round(memory.megabytes() or 0),
    }
    if case.compile != "none":
        row["first_steps_s"] = round(first, 1)
        row["skipped"] = learner.skipped_graphs.news() if learner.skipped_graphs else ""
    return row


def together(options: argparse.Namespace, case: Case) -> Row:
    """Time processes that take the same steps on one GPU at once, from the same moment."""
    with tempfile.TemporaryDirectory() as folder:
        children = [
            _child(
                options, "--cases", json.dumps([case._asdict()]), "--meet", f"{folder}/{number}",
                stdout=subprocess.PIPE,
            )
            for number in range(case.at_once)
        ]  # fmt: skip
        while len(list(Path(folder).iterdir())) < case.at_once:
            if any(child.poll() for child in children):
                break
            time.sleep(0.1)
        (Path(folder) / "go").touch()
        printed = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        return {"what": case.what, "state": "failed"}
    rates = [json.loads(each.splitlines()[-1]) for each in printed]
    slowest = max(1e3 * case.batch / rate for rate in rates)
    return {"what": case.what, "step_ms": round(slowest, 3), "images_per_s": round(sum(rates))}


def meet(options: argparse.Namespace) -> None:
    """Be one of them: make ready, wait for the others, print images a second."""
    case, mine = Case(**options.cases[0]), Path(options.meet)
    bench = Bench(begin(case), 4 if options.toy else 64, case.batch)
    learner = bench.learner(METHODS[case.method], compile=case.compile)
    batch, meter = next(learner.loader.epoch(0)), Meter(bench.device)
    _learn(learner, batch, meter, 4)
    synchronize(bench.device)
    mine.touch()
    while not (mine.parent / "go").exists():
        time.sleep(0.01)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < (1 if options.toy else 6):
        _learn(learner, batch, meter, 5)
        synchronize(bench.device)
        done += 5 * learner.method.steps_per_batch
    print(json.dumps(done * case.batch / (time.perf_counter() - began)))


# Parts c and d


def train(
    options: argparse.Namespace, name: str, method: str, settings: Sequence[str], minutes: float
) -> Row:
    """One run, gone on with where an earlier call stopped; its figures where it is done."""
    run_dir = options.out / "runs" / name
    if options.toy:
        config = ROOT / "configs" / "digits" / f"{method}.yaml"
        settings = [*settings, "model.width=4", "train.epochs=1", "eval.limit=50"]
    else:
        config = ROOT / "configs" / "cifar10" / f"{method}.yaml"
        folder = (options.data / "train").is_dir()
        settings = [*settings, f"data.root={options.data}", f"train.max_minutes={minutes}"]
        settings += ["data.name=imagefolder"] * folder
    settings = [*settings, "track.wandb.mode=disabled", "eval.every=0"]
    command = [sys.executable, "-m", "dist_adv", "train", str(config), *settings]
    began = time.monotonic()
    with Power() as power:
        done = subprocess.run([*command, "--run-dir", str(run_dir)], cwd=ROOT)
    row: Row = {"what": name, "wall_s": round(time.monotonic() - began, 1)}
    row["watt_h"] = power.watt_hours
    for key in ("wall_s", "watt_h"):  # of earlier calls, too
        before = next((each.get(key) for each in options.before if each["what"] == name), None)
        row[key] = round(row[key] + before, 3) if row[key] and before else row[key]
    metrics, results = run_dir / "metrics.jsonl", run_dir / "results.jsonl"
    if metrics.exists():
        last = json.loads(metrics.read_text().splitlines()[-1])
        row |= {"epochs": last["epoch"], "training_s": round(last["seconds"], 2)}
    if results.exists():
        lines = map(json.loads, results.read_text().splitlines())
        row |= {line["attack"]: line["accuracy"] for line in lines}
    return row | {"state": "done" if done.returncode == 0 else f"exit {done.returncode}"}


def compiled_by(choice: str) -> list[str]:
    """Settings of a compiled run: the short last batch is not worth its half minute."""
    return [f"train.compile={choice}", *["data.drop_last=true"] * (choice != "none")]


def record(options: argparse.Namespace, results: Results) -> None:
    graphs = options.compile or ("none" if options.toy else "graphs")
    strong = "eval.attacks=[natural,pgd-3-2]" if options.toy else "eval.attacks=[natural,pgd-50-10]"
    weak = "eval.attacks=[natural,pgd-10]"
    fifteen = ["train.epochs=15"]
    run_all(
        options,
        results,
        {
            "record": ("fast", [*fifteen, strong, *compiled_by(graphs)]),
            "record-eager": ("fast", [*fifteen, weak, *compiled_by("none")]),
            "fastat": ("fast", [*FASTAT, "eval.attacks=[natural,pgd-50]", *compiled_by(graphs)]),
        },
        jobs=1,
    )


def paper(options: argparse.Namespace, results: Results) -> None:
    choice, jobs = fastest(options.out / "b.json")
    # Runs that have begun go on as they were.
    begun = next((row["compile"] for row in results.rows if "compile" in row), None)
    choice, jobs = options.compile or begun or choice, options.jobs or jobs
    chosen = options.rows.split(",") if options.rows else list(ROWS)
    more = [*compiled_by(choice), "optim.cycle_momentum=true"]
    runs = {name: (ROWS[name][0], [*ROWS[name][1], *more]) for name in chosen}
    run_all(options, results, runs, jobs)


def fastest(path: Path) -> tuple[str, int]:
    """Return train.compile, and how many at once, of the most images a second in part b."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rates = {row["what"]: row.get("images_per_s", 0) for row in rows}
    known = {
        (choice, number): rates.get(Case("Free m=4", 128, choice, at_once=number).what, 0)
        for choice, number in product(("none", "default", "graphs"), (1, 2, 3))
    }
    return max(known, key=lambda each: known[each])


def run_all(
    options: argparse.Namespace,
    results: Results,
    runs: Mapping[str, tuple[str, Sequence[str]]],
    jobs: int,
) -> None:
    """Train those that are not done, so many at once, as far as the time goes."""
    end, options.before = time.monotonic() + 60 * options.minutes, list(results.rows)

    def one(name: str) -> None:
        minutes = (end - time.monotonic()) / 60
        if results.has(name):
            return
        if minutes < 0.5:
            known = any(row["what"] == name for row in results.rows)
            if not known:
                results.add({"what": name, "state": f"no time left: run {options.part} again"})
            return
        row = train(options, name, *runs[name], minutes=minutes)
        row["compile"] = next(
            each.partition("=")[2] for each in runs[name][1] if each.startswith("train.compile=")
        )
        if jobs > 1:
            row |= {"watt_h": None, "at_once": jobs}  # the GPU's energy is of all of them
        results.add(row)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


# Part e


def attacks(options: argparse.Namespace, results: Results) -> None:
    run_dir = options.out / "runs" / "record"
    limits = {"pgd-3-2": 50} if options.toy else {"pgd-50-10": 1000, "autoattack": 1000}
    for attack, limit in limits.items():
        if results.has(attack):
            continue
        command = [sys.executable, "-m", "dist_adv", "eval", str(run_dir), "--attacks", attack]
        with Power() as power:
            done = subprocess.run([*command, "--limit", str(limit)], cwd=ROOT)
        if done.returncode:
            results.add({"what": attack, "state": f"exit {done.returncode}"})
            continue
        last = json.loads((run_dir / "results.jsonl").read_text().splitlines()[-1])
        row = {"what": attack, **{key: last[key] for key in ("accuracy", "n", "seconds")}}
        row |= {"images_per_s": round(last["n"] / last["seconds"], 1), "watt_h": power.watt_hours}
        results.add(row)


PARTS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    "a": ceilings,
    "b": steps,
    "c": record,
    "d": paper,
    "e": attacks,
}


def stopped(*_: object) -> None:
    """End with the table of what there is, as where the time is over."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("gpu_suite: stopped; run it again to go on")


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rows", default="", help="of part d")
    parser.add_argument("--jobs", type=int, help="runs of part d at once")
    parser.add_argument("--compile", choices=["none", "default", "graphs", "max"])
    parser.add_argument("--precision", choices=DTYPES, help="of part b")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to begin nothing new")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("gpu_suite: there is no GPU here; --toy shows that the suite works")
    options.out, options.data = options.out.resolve(), options.data.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.meet:
        meet(options)
        return
    results = Results(options)
    if options.cases:
        measure(options, results)
        return
    signal.signal(signal.SIGTERM, stopped)
    try:
        PARTS[options.part](options, results)
    finally:
        results.read()
        results.show()


if __name__ == "__main__":
    main()
