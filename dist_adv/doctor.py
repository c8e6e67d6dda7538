"""What this machine has, what a run would use here, and what to do about what is missing.

Every look is on its own: where one fails that is a line of the table, and the others go on. Nothing
heavy is imported before it is looked at. Nothing is written.
"""

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from dist_adv import packages, plugins
from dist_adv.config import Config, load_config
from dist_adv.errors import UserError
from dist_adv.runs.lock import held

GB = 1e9


@dataclass(frozen=True)
class Finding:
    """A line of the table. `problem`: training would not work; `warning`: not as well as it could.

    advice: the remedy, or a word on what is found.
    """

    what: str
    found: str
    level: Literal["ok", "warning", "problem"] = "ok"
    advice: str = ""


Findings = Iterator[Finding]


def run_doctor(path: Path | None, overrides: Sequence[str], run_dir: Path, as_json: bool) -> bool:
    """Print the table, or JSON. False where something would keep `train` from working."""
    findings = examine(path, overrides, run_dir)
    if as_json:
        print(json.dumps([asdict(each) for each in findings], indent=1))
    else:
        _show(findings)
    return all(each.level != "problem" for each in findings)


def examine(path: Path | None, overrides: Sequence[str], run_dir: Path) -> list[Finding]:
    """Look at everything; at what a run of the configuration at `path` would use, where given."""
    config, mistake = None, ""
    if path:
        try:
            config = load_config(path, overrides)
        except UserError as error:
            mistake = str(error)
    looks: dict[str, Callable[[], Findings]] = {
        "Python": _python,
        "torch": _torch,
        "GPUs": _gpus,
        "CPU": _cpu,
        "C++ compiler": lambda: _compiler(config),
        "packages": _packages,
        "plug-ins": _plugins,
        "Slurm": _slurm,
        "W&B": lambda: _wandb(config),
        "data": lambda: _data(config),
        "train.start": lambda: _start(config),
        "run folder": lambda: _run_folder(config, run_dir),
        "limits": _limits,
        "a run here": lambda: _use(config),
    }
    findings = [Finding("configuration", mistake, "problem", "correct it")] if mistake else []
    for what, look in looks.items():
        try:
            findings += look()
        except Exception as error:  # whatever a broken installation comes up with
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            findings.append(Finding(what, f"could not be looked at: {reason}", "warning"))
    return findings


def _show(findings: Sequence[Finding]) -> None:
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table("", "what", title=f"dist-adv doctor, {platform.node()}")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for each in findings:
        level = f"[{styles[each.level]}]{each.level}[/]"
        table.add_row(level, *(_plain(text) for text in (each.what, each.found, each.advice)))
    Console().print(table)


def _plain(text: str) -> str:
    """Brackets are no markup."""
    return text.replace("[", r"\[")


def _output(*command: str) -> str | None:
    """Return what a program prints; None where it is absent, fails or takes ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _python() -> Findings:
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")


def _torch() -> Findings:
    try:
        import torch
        import torchvision  # noqa: F401  (of another build it fails at import)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "install torch and torchvision again, of one and the same build"
        yield Finding("torch", f"cannot be imported: {reason}", "problem", remedy)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    if torch.version.cuda and torch.distributed.is_nccl_available():
        build += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield Finding("torch", f"{torch.__version__} ({build})")


def _gpus() -> Findings:
    import torch

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = driver.splitlines() if driver else []  # a line for each GPU
    if not torch.cuda.is_available():
        found, remedy = "none: training takes the CPU", ""
        if versions:
            found = f"{len(versions)} (driver {versions[0]}), of which torch sees none"
            remedy = "see CUDA_VISIBLE_DEVICES; a newer driver, or a torch for an older CUDA"
        yield Finding("GPUs", found, "warning" if versions else "ok", remedy)
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield Finding(
            f"GPU {number}",
            f"{gpu.name}, {gpu.total_memory / GB:.0f} GB, compute capability {gpu.major}."
            f"{gpu.minor}" + (f", driver {versions[0]}" if versions else ""),
        )


def _cpu() -> Findings:
    from dist_adv.distributed.start import cores, native_bf16

    mine, everyone = cores(), os.cpu_count() or 1
    found = f"{mine} cores" if mine == everyone else f"{mine} of {everyone} cores (affinity)"
    yield Finding("CPU", f"{found}, bf16 instructions: {'yes' if native_bf16() else 'no'}")


def _compiler(config: Config | None) -> Findings:
    name = os.environ.get("CXX", "g++")
    where = shutil.which(name)
    if where:
        yield Finding("C++ compiler", where)
        return
    choices = {"train": config.train.compile, "eval": config.eval.compile} if config else {}
    spared = [f"{section}.compile=none" for section, how in choices.items() if how != "none"]
    if spared:
        remedy = f"install g++, name another one in CXX, or set {' '.join(spared)}"
        yield Finding("C++ compiler", f"no {name}", "problem", remedy)
    else:
        advice = "only train.compile and eval.compile need one"
        yield Finding("C++ compiler", f"no {name}", advice=advice)


def _packages() -> Findings:
    yield Finding("accelerate", packages.version("accelerate") or "absent")
    found = packages.version("deepspeed")
    advice = "only ZeRO needs it: pip install 'dist-adv[deepspeed]'"
    yield Finding("deepspeed", found or "not installed", advice="" if found else advice)


def _plugins() -> Findings:
    """Import what installed packages give by entry points: one that fails is for its owner."""
    for kind in ("methods", "models", "data", "attacks", "schedules", "trackers"):
        points = plugins.installed(f"dist_adv.{kind}")
        failures = {}
        for name in points:
            try:
                plugins.find(name, f"dist_adv.{kind}", {})
            except ValueError as error:
                failures[name] = str(error)
        good = [name for name in points if name not in failures]
        if good:
            yield Finding("plug-ins", f"{kind}: {', '.join(good)}")
        for problem in failures.values():
            yield Finding("plug-ins", f"{kind}: {problem}", "warning", "mend its package")


def _slurm() -> Findings:
    if not shutil.which("sbatch"):
        yield Finding("Slurm", "no sbatch on this machine")
        return
    partitions = _output("sinfo", "--noheader", "--format=%P %D nodes, %G, up to %l")
    if partitions is None:
        remedy = "ask whether the controller runs; see sinfo"
        yield Finding("Slurm", "sbatch is there, and sinfo gives no answer", "warning", remedy)
    else:
        yield Finding("Slurm", "; ".join(partitions.splitlines()) or "no partitions")


def _wandb(config: Config | None) -> Findings:
    from dist_adv.tracking import wandb_env, wandb_run
    from dist_adv.tracking.tracker import check_tracking

    try:
        if config:
            check_tracking(config)
        mode = wandb_env.mode(config.track.wandb.mode if config else "auto")
    except UserError as error:
        yield Finding("W&B", str(error), "problem")
        return
    version = packages.version("wandb")
    if version is None:
        advice = "" if mode == "disabled" else "pip install wandb for dashboards"
        yield Finding("W&B", "not installed", advice=advice)
        return
    if mode == "disabled":
        yield Finding("W&B", f"{version}, disabled")
        return
    known = wandb_run.logged_in()
    who = "logged in" if known else "nobody is logged in"
    if mode == "auto":
        mode = "online" if known else "offline"
    level: Literal["ok", "warning"] = "warning" if mode == "online" and not known else "ok"
    advice = "" if known else "`wandb login` or WANDB_API_KEY; dist-adv sync uploads later"
    yield Finding("W&B", f"{version}, {who}: records {mode}", level, advice)


# What torchvision unpacks or downloads, by which a set is known to be there.
_FILES = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "imagefolder": ("train", "test"),
    "packed": ("train/index.json", "test/index.json"),
}


def _data(config: Config | None) -> Findings:
    from dist_adv.data import DataOptions, data_root
    from dist_adv.data.datasets import NAMES

    if config and config.data.name in ("packed", "hf"):
        yield _pack(config) if config.data.name == "packed" else _hf(config)
        return
    try:
        root = data_root(config.data if config else DataOptions())
    except UserError as error:
        yield Finding("data", str(error), "problem" if config else "warning")
        return
    if config is None:
        there = [name for name in _FILES if _is_there(name, root)]
        if "packed" in there:
            there.remove("imagefolder")
        advice = "data.root or DIST_ADV_DATA names another folder; digits are always there"
        yield Finding(
            "data", f"{', '.join(there) or 'nothing'} in {root.absolute()}", advice=advice
        )
    elif config.data.name == "digits":
        yield Finding("data", "digits, embedded")
    elif config.data.name not in NAMES:
        yield Finding("data", f"{config.data.name}, which is somebody's own: not looked at")
    elif _is_there(config.data.name, root):
        yield Finding("data", f"{config.data.name} in {root.absolute()}")
    elif config.data.name == "imagefolder":
        remedy = "data.root or DIST_ADV_DATA: a folder with train/<class>/ and test/<class>/"
        yield Finding("data", f"no train/ and test/ in {root.absolute()}", "problem", remedy)
    else:
        found = f"{config.data.name} is not in {root.absolute()}: it would be downloaded"
        remedy = "without a network: data.root or DIST_ADV_DATA, or put the archive there"
        yield Finding("data", found, "warning", remedy)


def _pack(config: Config) -> Finding:
    """Read a pack from end to end, which a disk takes a while for."""
    from dist_adv.data.datasets import pack_root
    from dist_adv.data.image import Framing
    from dist_adv.data.packed import check_pack, open_pack, read_index
    from dist_adv.terminal import bar

    try:
        root = pack_root(config.data)
        with bar(True) as progress:
            for split in ("train", "test"):
                total = sum(file.bytes for file in read_index(root / split).files)
                task = progress.add_task(f"reading {split}", status="", total=total)
                check_pack(root / split, partial(progress.advance, task))
                if not isinstance(root, Path):  # which training reads by position
                    open_pack(root / split, Framing(), workers=1)
    except UserError as error:
        return Finding("data", str(error), "problem")
    place = root.absolute() if isinstance(root, Path) else root
    return Finding("data", f"packed in {place}, every byte as it was packed")


def _hf(config: Config) -> Finding:
    """Tell where a set of Hugging Face's comes from, of which nothing is loaded for it."""
    path = vars(config.data)["path"]
    try:
        packages.need("datasets", "data.name: hf", "'dist-adv[hf]'")
    except UserError as error:
        return Finding("data", str(error), "problem")
    if os.path.exists(os.path.expanduser(path)):
        return Finding("data", f"hf in {path}: not looked into")
    advice = "without a network it must be in HF_HOME: load it once where there is one"
    return Finding("data", f"{path} of the Hugging Face Hub", advice=advice)


def _is_there(name: str, root: Path) -> bool:
    return all(os.path.exists(root / file) for file in _FILES[name])


def _start(config: Config | None) -> Findings:
    from dist_adv.models import read_weights, weights_file

    if config and config.train.start:
        try:
            architecture, _ = read_weights(weights_file(config.train.start))
        except UserError as error:
            yield Finding("train.start", str(error), "problem", "name weights that are there")
            return
        yield Finding("train.start", f"{config.train.start}: {architecture['model']['name']}")


def _run_folder(config: Config | None, folder: Path) -> Findings:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            "run folder",
            f"{folder}: {place} is {'not writable' if place.is_dir() else 'no folder'}",
            "problem",
            "choose another --run-dir",
        )
        return
    yield _state_of(config, folder)
    free = shutil.disk_usage(place).free
    few = free < 2 * GB
    remedy = "a run of width 64 takes about 0.3 GB; train.keep says how many checkpoints stay"
    yield Finding(
        "free disk", f"{free / GB:.1f} GB", "warning" if few else "ok", remedy if few else ""
    )


def _state_of(config: Config | None, folder: Path) -> Finding:
    from dist_adv.runs import claim
    from dist_adv.runs.folder import RunFolder

    if held(folder):
        remedy = "wait for it, or choose another --run-dir"
        return Finding("run folder", f"{folder}: is in use by another process", "problem", remedy)
    if config is None:
        return Finding("run folder", f"{folder}: writable")
    try:
        if not claim.holds(RunFolder(folder), config):
            return Finding("run folder", f"{folder}: would be made")
    except UserError as error:
        return Finding("run folder", str(error), "problem", "choose another --run-dir")
    state = RunFolder(folder).state or "of unknown state"
    return Finding("run folder", f"{folder}: holds this run ({state}), which would go on")


def _limits() -> Findings:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < 1 * GB
        remedy = "docker run --shm-size=8g: NCCL needs it"
        found, level = f"{size / GB:.1f} GB", "warning" if small else "ok"
        yield Finding("/dev/shm", found, level, remedy if small else "")  # type: ignore[arg-type]
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < 1024
    remedy = "ulimit -n 4096: every rank needs some"
    yield Finding("open files", f"up to {files}", "warning" if few else "ok", remedy if few else "")


def _use(config: Config | None) -> Findings:
    """Return what `train CONFIG` would take; without one what it takes by itself."""
    import torch

    from dist_adv.distributed.graphs import check_graphs
    from dist_adv.distributed.start import resolve_precision, threads_per_rank
    from dist_adv.plan.measure import SETS

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = config.train.precision if config else "auto"
    try:
        precision = resolve_precision(wanted, cpu=not gpus)
        check_graphs(config.train.compile if config else "none", cpu=not gpus)
        threads = (config and config.train.threads) or threads_per_rank()
    except UserError as error:
        yield Finding("a run here", str(error), "problem")
        return
    found = f"{torch.cuda.get_device_name()}" if gpus else f"CPU, {threads} thread(s)"
    advice = f"launch/run.sh starts {gpus} ranks, one for each GPU" if gpus > 1 else ""
    yield Finding("a run here", f"1 rank on {found}, {precision}", advice=advice)
    if config and config.data.name in SETS:  # an image folder is not listed for this
        yield _steps(config)


def _steps(config: Config) -> Finding:
    from dist_adv.attacks.threat import build as build_threat
    from dist_adv.data.loader import split
    from dist_adv.methods.cost import cost_of
    from dist_adv.plan.measure import SETS, blank_network, parts_of
    from dist_adv.training.checks import check_divides, check_statistics

    train, images, steps = config.train, SETS[config.data.name], []
    replays = cost_of(config.method, build_threat(config.threat.norm, config.threat.eps)).steps
    try:
        count = images.n - config.data.validation
        network, mixes = blank_network(config, images), config.data.augmentation().mixes
        whole = config.model_copy(update={"train": train.model_copy(update={"max_steps": None})})
        for part in parts_of(whole):
            size, drop_last = part.train.batch_size, part.data.drop_last
            check_divides(size, part.train.accumulate, ranks=1)
            batches, smallest = split(count, size, drop_last, 1, mixes)
            check_statistics(smallest // part.train.accumulate, network)
            steps.append((part.train.epochs, batches))
    except UserError as error:
        return Finding("steps", str(error), "problem")
    found = ", then ".join(f"{epochs} epochs of {batches} batches" for epochs, batches in steps)
    found = f"{sum(math.prod(each) for each in steps) * replays}: {found}"
    found += f", {replays} times each" if replays > 1 else ""
    found += f"; train.max_steps ends it at {train.max_steps}" if train.max_steps else ""
    return Finding("steps", found)
