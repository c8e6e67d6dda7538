"""What one GPU does: ceilings, step times, the record, the paper's eight rows, attacks.

Runs on a bare machine from a checkout and a folder of CIFAR-10 (torchvision's files, or an image
folder). Each part stays under nine minutes, prints a short table last and writes JSON to --out;
what did not fit (parts c and d) goes on when the same part is run again with the same --out.

  python benchmarks/gpu_suite.py a --out OUT
  python benchmarks/gpu_suite.py b --out OUT
  python benchmarks/gpu_suite.py c --out OUT --data DATA
  python benchmarks/gpu_suite.py d --out OUT --data DATA [--rows free-8,fast-10-128]
  python benchmarks/gpu_suite.py e --out OUT --data DATA      (attacks the model of part c)

  a  bandwidth of a copy, rate of matrix products
  b  one optimiser step of each method: precision x batch size x train.compile, share of the peak
  c  the record: Fast, PreActResNet18, 15 epochs; natural and PGD-50-10 on 10,000 images
  d  the paper's rows: Free m = 2, 4, 8, 10; Fast with alpha 10 and 16 at batches of 128 and 256
  e  images a second of PGD-50-10 and AutoAttack

--toy runs any part in a minute or two on a CPU, on digits, to show that it works; its figures say
nothing of a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dist_adv.bench.cases import Bench  # noqa: E402
from dist_adv.bench.timing import PeakMemory, alternate, copy_rate, matmul_rate, network  # noqa: E402
from dist_adv.distributed import start  # noqa: E402
from dist_adv.training.meter import Meter  # noqa: E402

MINUTES = 8.0
METHODS: dict[str, dict[str, Any]] = {
    "natural": {"name": "natural"},
    "Free m=4": {"name": "free", "replays": 4},
    "Fast": {"name": "fast"},
    "PGD-7": {"name": "pgd"},
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


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ceilings(options: argparse.Namespace) -> list[dict[str, Any]]:
    dtypes = {k: d for k, d in DTYPES.items() if k != "fp16" or device().type == "cuda"}  # emulated
    rates = {
        f"{name} product, Tflop/s": matmul_rate(device(), d) / 1e12 for name, d in dtypes.items()
    }
    rates["copy, GB/s"] = copy_rate(device()) / 1e9
    return [{"what": name, "rate": round(rate, 2)} for name, rate in rates.items()]


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One process a precision: an Accelerator has one."""
    if options.precision is None:
        rows, began = [], time.monotonic()
        for precision in ("bf16", "fp32") if options.toy else ("bf16", "fp16", "fp32"):
            left = MINUTES - (time.monotonic() - began) / 60
            part = options.out / f"b-{precision}.json"
            command = [sys.executable, __file__, "b", "--out", str(options.out)]
            command += ["--precision", precision, "--minutes", str(left)]
            subprocess.run([*command, *["--toy"] * options.toy], check=True)
            rows += json.loads(part.read_text())["rows"]
        return rows
    end = time.monotonic() + 60 * options.minutes
    accelerator = start.start_accelerator(options.precision)
    peak = matmul_rate(accelerator.device, DTYPES[options.precision])
    # Compiling takes a minute a shape: only in bf16, and the largest gain first.
    compiles = ("none", "max", "default") if options.precision == "bf16" else ("none",)
    sizes = (16,) if options.toy else (128, 512, 256)
    rows = []
    for compile_, batch, (name, method) in product(compiles, sizes, METHODS.items()):
        if time.monotonic() > end:
            rows.append({"what": f"{name} {batch} {compile_}", "step_ms": "no time left"})
            continue
        torch.compiler.reset()
        bench = Bench(accelerator, 4 if options.toy else 64, batch)
        learner, meter = bench.learner(method, compile=compile_), Meter(bench.device)
        learnt = next(learner.loader.epoch(0))
        per_batch = learner.method.steps_per_batch
        flop = None
        if compile_ == "none":
            with FlopCounterMode(display=False) as counter:
                learner.learn(learnt, meter)
            flop = counter.get_total_flops() / per_batch
        memory = PeakMemory(bench.device)
        sides = {"step": lambda t=learner, b=learnt, m=meter: t.learn(b, m)}
        timings = alternate(sides, bench.device, 2 if options.toy else 30, warm_up=3)
        seconds = timings.median("step") / per_batch
        rows.append(
            {
                "what": f"{name}, {options.precision}, batch {batch}, compile {compile_}",
                "step_ms": round(1e3 * seconds, 3),
                "images_per_s": round(batch / seconds),
                "share_of_peak": round(flop / seconds / peak, 3) if flop else None,
                "peak_memory_mb": memory.megabytes(),
            }
        )
    return rows


def train(
    options: argparse.Namespace, name: str, method: str, settings: list[str]
) -> dict[str, Any]:
    """One run, gone on with where an earlier call stopped; its figures where it is done."""
    run_dir = options.out / "runs" / name
    if options.toy:
        config = ROOT / "configs" / "digits" / f"{method}.yaml"
        settings = [*settings, "model.width=4", "train.epochs=1", "eval.limit=50"]
    else:
        config = ROOT / "configs" / "cifar10" / f"{method}.yaml"
        folder = (options.data / "train").is_dir()
        settings = [*settings, f"data.root={options.data}", f"train.max_minutes={options.minutes}"]
        settings += ["data.name=imagefolder"] * folder
    settings += ["track.wandb.mode=disabled", "eval.every=0"]
    command = [sys.executable, "-m", "dist_adv", "train", str(config), *settings]
    began = time.monotonic()
    done = subprocess.run([*command, "--run-dir", str(run_dir)], cwd=ROOT)
    record: dict[str, Any] = {"what": name, "wall_s": round(time.monotonic() - began, 1)}
    metrics, results = run_dir / "metrics.jsonl", run_dir / "results.jsonl"
    if metrics.exists():
        last = json.loads(metrics.read_text().splitlines()[-1])
        record |= {"epochs": last["epoch"], "training_s": round(last["seconds"], 2)}
    if results.exists():
        lines = map(json.loads, results.read_text().splitlines())
        record |= {line["attack"]: line["accuracy"] for line in lines}
    return record | {"state": "done" if done.returncode == 0 else f"exit {done.returncode}"}


def record(options: argparse.Namespace) -> list[dict[str, Any]]:
    attacks = "natural,pgd-3-2" if options.toy else "natural,pgd-50-10"
    settings = ["train.epochs=15", f"eval.attacks=[{attacks}]"]
    if device().type == "cuda":
        settings.append(f"train.compile={options.compile}")
    return [train(options, "record", "fast", settings)]


def paper(options: argparse.Namespace) -> list[dict[str, Any]]:
    end, rows = time.monotonic() + 60 * MINUTES, []
    for name in options.rows.split(",") if options.rows else ROWS:
        options.minutes = (end - time.monotonic()) / 60
        if options.minutes < 0.5:
            rows.append({"what": name, "state": "no time left: run part d again"})
            continue
        method, settings = ROWS[name]
        settings = [*settings, f"train.compile={options.compile}"]
        rows.append(train(options, name, method, [*settings, "optim.cycle_momentum=true"]))
    return rows


def attacks(options: argparse.Namespace) -> list[dict[str, Any]]:
    run_dir, rows = options.out / "runs" / "record", []
    limits = {"pgd-50-10": 10_000, "autoattack": 1000}
    for attack, limit in {"pgd-3-2": 50}.items() if options.toy else limits.items():
        command = [sys.executable, "-m", "dist_adv", "eval", str(run_dir), "--attacks", attack]
        subprocess.run([*command, "--limit", str(limit)], cwd=ROOT, check=True)
        last = json.loads((run_dir / "results.jsonl").read_text().splitlines()[-1])
        keys = ("accuracy", "n", "seconds")
        figures = {key: last[key] for key in keys}
        rows.append(
            {"what": attack, **figures, "images_per_s": round(last["n"] / last["seconds"], 1)}
        )
    return rows


PARTS = {"a": ceilings, "b": steps, "c": record, "d": paper, "e": attacks}


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rows", default="")
    parser.add_argument("--compile", choices=["none", "default", "max"], default="none")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--precision", choices=DTYPES, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("gpu_suite: there is no GPU here; --toy shows that the suite works")
    options.out, options.data = options.out.resolve(), options.data.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = PARTS[options.part](options)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    about = {
        "part": options.part,
        "toy": options.toy,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit,
        "network": network(Bench(None, 4 if options.toy else 64).config(METHODS["natural"]).model),
    }
    name = f"{options.part}-{options.precision}" if options.precision else options.part
    (options.out / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
    if options.precision:
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*keys, title=", ".join(f"{key} {value}" for key, value in about.items()))
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in keys))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
