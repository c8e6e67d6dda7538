"""Commands: parse, call, print. Nothing heavy is imported before a command needs it."""

import errno
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from dist_adv import __version__, allocator, streams
from dist_adv.distributed import launched, stopping
from dist_adv.errors import DISK_TROUBLE, GOES_ON, Preempted, RankFailure, RunFailure, UserError


class _Expanded(click.Path):
    """A path in which a leading ~ is a home directory: the shell leaves it alone in --out=~/x.

    What no command can take is refused here, and not by each: names that are too long, links in a
    circle, what lies in a folder that may not be entered.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = os.path.expanduser(value)
        try:
            os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
                raise UserError(f"{path}: {error.strerror}; name another path") from None
        return super().convert(path, param, ctx)


_PATH = _Expanded(path_type=Path)
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
_RUN_DIR = click.option("--run-dir", type=_PATH, help="[default: runs/FOLDER-NAME of the config]")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Under a launcher every command is the same: torchrun --nproc-per-node 8 -m dist_adv "
    "train CONFIG, or accelerate launch -m dist_adv train CONFIG.",
)
@click.version_option(__version__, prog_name="dist-adv")
def cli() -> None:
    """Adversarial training on one GPU or many: PGD, Free, Fast, and honest evaluation.

    \b
    dist-adv demo                              four methods compared, on a laptop, in minutes
    dist-adv train configs/cifar10/fast.yaml   train a robust CIFAR-10 classifier
    dist-adv eval runs/cifar10-fast --attacks pgd-50-10
    dist-adv report runs/* --out report        tables, curves, adversarial images
    dist-adv sweep configs/sweeps/paper.yaml   every row of the paper
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been removed; cd to one that exists") from None


@cli.command()
@click.option("--out", type=_PATH, default=Path("demo"), show_default=True)
def demo(out: Path) -> None:
    """Train natural, PGD, Free and Fast on 8x8 digits, attack them, write a report.

    Needs no download and no GPU. What is finished in --out already is not done again.

    \b
    dist-adv demo --out /tmp/demo
    """
    _begin_work()
    from dist_adv.demo import run_demo

    run_demo(out)


@cli.command()
@click.argument("config", type=_PATH)
@_OVERRIDES
@_RUN_DIR
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|none|PATH",
    help="auto: go on from the newest good checkpoint where the run dir exists; none: insist on "
    "a new run dir; PATH: start from this checkpoint folder.",
)
def train(config: Path, overrides: tuple[str, ...], run_dir: Path | None, resume: str) -> None:
    """Train what CONFIG describes, then evaluate it.

    \b
    dist-adv train configs/digits/fast.yaml
    dist-adv train configs/cifar10/free.yaml method.replays=4 --run-dir runs/free-4
    dist-adv train configs/cifar10/fast.yaml method.alpha=16/255 method.guard=stop
    torchrun --nproc-per-node 2 -m dist_adv train configs/digits/free.yaml
    """
    _begin_work()
    from dist_adv.config import load_config
    from dist_adv.training.run import train_run

    train_run(
        load_config(config, overrides), run_dir or _run_dir(config), os.path.expanduser(resume)
    )


def _run_dir(config: Path) -> Path:
    return Path("runs") / f"{config.resolve().parent.name}-{config.stem}"


@cli.command(name="eval")
@click.argument("arguments", nargs=-1, metavar="[RUN_DIR] [KEY.PATH=VALUE]...")
@click.option(
    "--model",
    metavar="REFERENCE",
    help="Any network in place of a run: module:function that makes it, a folder or file of one, "
    "hf:USER/REPO, timm:NAME.",
)
@click.option("--model-args", multiple=True, metavar="KEY=VALUE", help="Of that function.")
@click.option("--out", type=_PATH, help="With --model: where to.  [default: judged/NAME]")
@click.option(
    "--attacks",
    help="Comma-separated: natural, noise, fgsm, pgd-STEPS, pgd-STEPS-RESTARTS, "
    "autoattack, and its four alone: apgd-ce, apgd-t, fab-t, square.  [default: the run's own]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only so many random test images.")
@click.option(
    "--thorough",
    is_flag=True,
    help="Attacks that must fit together where the network's robustness is its own, and a verdict "
    "on it: of 200 images, unless --limit says more.",
)
@click.option(
    "--second",
    metavar="REFERENCE",
    help="With --thorough: another network, of which adversarial images are tried.",
)
def evaluate(
    arguments: tuple[str, ...],
    model: str | None,
    model_args: tuple[str, ...],
    out: Path | None,
    attacks: str | None,
    limit: int | None,
    thorough: bool,
    second: str | None,
) -> None:
    """Attack a trained model and add what comes out to RUN_DIR/results.jsonl.

    With --model that is anybody's network: images in [0, 1] to logits. What looks wrong about it
    is said beside its figures.

    \b
    dist-adv eval runs/cifar10-fast
    dist-adv eval runs/cifar10-fast --attacks natural,pgd-50-10 --limit 1000
    dist-adv eval runs/cifar10-fast eval.loss=margin data.root=/data
    dist-adv eval --model mine.networks:robust --model-args width=32 --attacks pgd-20,autoattack
    dist-adv eval --model robustbench.utils:load_model --model-args model_name=Wong2020Fast \\
      data.name=cifar10 threat.eps=8/255 --limit 1000
    dist-adv eval runs/cifar10-fast --thorough --second runs/cifar10-natural
    """
    if model is None and (model_args or out):
        raise click.UsageError("--model-args and --out go with --model.")
    if model is None and not arguments:
        raise click.UsageError("Missing argument 'RUN_DIR', or --model.")
    if thorough and attacks:
        raise click.UsageError("--thorough has attacks of its own; leave --attacks out.")
    if second and not thorough:
        raise click.UsageError("--second goes with --thorough.")
    streams.optional()
    _announce()
    from dist_adv.judging.judge import folder_of, judge, judge_folder, reference
    from dist_adv.judging.measurement import Asked
    from dist_adv.runs.folder import RunFolder

    names = [each.strip() for each in attacks.split(",")] if attacks else []
    other = reference(second, ()) if second else None
    if model is None:
        asked = Asked(names, limit, arguments[1:], thorough, other)
        judge_folder(_PATH.convert(arguments[0], None, None), asked)
    else:
        network = reference(model, model_args)
        asked = Asked(names, limit, arguments, thorough, other)
        judge(RunFolder(out or folder_of(network)), network, asked)


@cli.command()
@click.argument("path", metavar="FOLDER|claim.json", type=_PATH)
@_OVERRIDES
@click.option("--check", is_flag=True, help="Measure a sample of a claim again.")
@click.option("--limit", type=click.IntRange(min=1), help="Images of the sample.  [default: 200]")
def claim(path: Path, overrides: tuple[str, ...], check: bool, limit: int | None) -> None:
    """State what was measured of a network, so that others can believe it, or refute it.

    Writes claim.md and claim.json into FOLDER, of a run or of `eval --model`: figures with every
    setting and interval, what looks wrong, hashes of weights and images, versions, and the command
    that measures it again. --check takes a claim.json, in the folder that it was written into or a
    copy of it; exit status 1 where it does not hold.

    \b
    dist-adv claim runs/cifar10-fast
    dist-adv claim --check runs/cifar10-fast/claim.json data.root=/data --limit 1000
    """
    if limit and not check:
        raise click.UsageError("--limit goes with --check.")
    _announce()
    from dist_adv.judging.claims import check_claim, make_claim

    if not check:
        click.echo(f"claim: {click.format_filename(make_claim(path, overrides))}")
        return
    for line in check_claim(path, overrides, limit):
        if launched.rank() == 0:
            click.echo(line)
    if launched.rank() == 0:
        click.echo("the claim holds")


@cli.command()
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...", type=_PATH)
@click.option("--out", type=_PATH, default=Path("report"), show_default=True)
@click.option(
    "--against",
    multiple=True,
    metavar="NAME",
    help="Published figures beside ours: paper (Free vs Fast), wong2020, shafahi2019. Repeatable.",
)
def report(run_dirs: tuple[Path, ...], out: Path, against: tuple[str, ...]) -> None:
    """Tables, curves and adversarial images of one run or many, as a page and as Markdown.

    A sweep's folder stands for its runs; what is no run is passed over.

    \b
    dist-adv report runs/digits-natural runs/digits-fast --out report
    dist-adv report runs/* --out report      accuracy against m and time, collapses: docs/reports.md
    dist-adv report runs/paper/* --against paper --against wong2020    beside what was published
    """
    _announce()
    from dist_adv.report import write_report

    page = write_report(_runs(run_dirs), out, against)
    click.echo(f"report: {click.format_filename(page)}")


def _runs(named: tuple[Path, ...]) -> list[Path]:
    """Return the run folders among those that are named; the others are said to be passed over."""
    from dist_adv.runs.reading import find_runs, passed_over

    runs, others = find_runs(named)
    if others:
        click.echo(passed_over(others), err=True)
    return runs


@cli.command()
@click.argument("file", metavar="SWEEP", type=_PATH)
@_OVERRIDES
@click.option("--out", type=_PATH, help="[default: runs/NAME of the sweep file]")
@click.option("--only", metavar="RUN", help="One run in this process, by name or number from 0.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Side by side.")
@click.option("--dry-run", is_flag=True, help="Check and list every run, time some steps, stop.")
@click.option("--wandb", is_flag=True, help="Print the sweep as one for W&B agents, and stop.")
@click.option("--slurm", is_flag=True, help="Submit it as a job array, and a report behind it.")
@click.option("--limit", type=click.IntRange(1), help="With --slurm: so many runs at once.")
def sweep(
    file: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    only: str | None,
    jobs: int,
    dry_run: bool,
    wandb: bool,
    slurm: bool,
    limit: int | None,
) -> None:
    """Train every run that SWEEP describes, go on where an earlier start stopped, report.

    A run that fails does not stop the others; the exit status is then 1. Under a launcher, or as
    a task of a job array, --only takes one run.

    \b
    dist-adv sweep configs/sweeps/digits.yaml --jobs 2
    dist-adv sweep configs/sweeps/paper.yaml --dry-run
    dist-adv sweep configs/sweeps/free_m.yaml model.width=16 --out runs/free-m-small
    torchrun --nproc-per-node 8 -m dist_adv sweep configs/sweeps/paper.yaml --only fast-16
    dist-adv sweep configs/sweeps/paper.yaml --slurm --limit 8 --dry-run   # see docs/cluster.md
    dist-adv sweep configs/sweeps/seeds.yaml --wandb > wandb.yaml; wandb sweep wandb.yaml
    """
    if limit and not slurm:
        raise click.UsageError("--limit goes with --slurm; here it is --jobs.")
    if slurm and jobs > 1:
        raise click.UsageError("--jobs is of this machine; with --slurm it is --limit.")
    if only is not None and (slurm or wandb):
        raise click.UsageError("--only takes one run here; leave --slurm and --wandb out.")
    if dry_run or wandb or slurm:
        _announce()
    else:
        _begin_work()
    from dist_adv.sweeps.sweep import as_wandb, load_sweep
    from dist_adv.tracking import wandb_env

    checked = load_sweep(file, overrides)
    if only is None and not wandb:
        wandb_env.refuse_one_id_for_many(len(checked.runs))
    folder = out or Path("runs") / checked.name
    if slurm:
        from dist_adv.sweeps.slurm import plan, submit

        say = plan if dry_run else submit
        click.echo("\n".join(say(checked, folder, limit)))
    elif dry_run:
        from dist_adv.sweeps.estimate import show

        show(checked, only)
    elif wandb:
        click.echo(as_wandb(checked, file, overrides, folder), nl=False)
    elif only is not None:
        from dist_adv.sweeps.local import run_one

        run_one(checked, only, folder)
    else:
        from dist_adv.sweeps.local import run_sweep

        run_sweep(checked, folder, jobs)


@cli.command()
@click.argument("folders", nargs=-1, required=True, metavar="RUNS...", type=_PATH)
@click.option("--watch", is_flag=True, help="Look again every two seconds, until Ctrl-C.")
def status(folders: tuple[Path, ...], watch: bool) -> None:
    """What has become of runs: queued, running, preempted, killed, failed or done, and how far.

    RUNS are folders of runs, or of sweeps with all of their runs. Slurm's queue is asked where
    there is one; the runs themselves are left alone.

    \b
    dist-adv status runs/*
    dist-adv status runs/paper --watch
    """
    from dist_adv.runs.status import show

    show(folders, watch)


@cli.command()
@click.argument("run_dir", type=_PATH)
@click.option("--out", type=_PATH, required=True, help="A folder that is not there yet.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hub", "robustbench", "onnx", "torch-export"]),
    default="hub",
    show_default=True,
)
@click.option("--name", help="With robustbench: author, year and first word, as Wong2020Fast.")
@click.option("--license", metavar="ID", help="With hub: what the card says, as mit.")
@click.option(
    "--push",
    metavar="USER/REPO",
    help="With hub: upload it to the Hugging Face Hub, once its name has been typed again.",
)
@click.option("--yes", is_flag=True, help="With --push: ask nothing.")
def export(run_dir: Path, out: Path, kind: str, yes: bool, **asked: str | None) -> None:
    """The model of a run as a folder to hand on.

    \b
    hub           model.safetensors, config.json and a model card, for dist_adv and the Hub
    robustbench   NAME.pt, NAME.json, entry.py and claim.md: a submission, in their classes' names
    onnx          model.onnx, for ONNX Runtime and what else reads ONNX
    torch-export  model.pt2, for torch without dist_adv

    What was written is read back, and its logits are compared with the network's: docs/sharing.md.

    \b
    dist-adv export runs/cifar10-fast --out exported
    python -c "import dist_adv; model = dist_adv.load_model('exported')"
    dist-adv export runs/cifar10-fast --out exported --license mit --push me/fast-cifar10
    python -c "import dist_adv; model = dist_adv.load_model('hf:me/fast-cifar10')"
    dist-adv export runs/cifar10-fast --out claim --format robustbench --name Me2026Fast
    dist-adv export runs/cifar10-fast --out onnx --format onnx
    """
    for option, wanted in {"name": "robustbench", "license": "hub", "push": "hub"}.items():
        if asked[option] and kind != wanted:
            raise UserError(f"--{option}: goes with --format {wanted}, not {kind}; leave it out")
    if kind == "robustbench" and not asked["name"]:
        raise UserError("--format robustbench: needs a --name, such as --name Wong2020Fast")
    _announce()
    from dist_adv.exports import Asked, export_run, hub

    repository = asked["push"]
    if repository:
        hub.check(repository)
        _confirm(repository, yes)
    verified = export_run(
        run_dir, out, kind, Asked(asked["name"] or "", asked["license"], repository)
    )
    click.echo(f"exported: {click.format_filename(out)}")
    if repository:
        click.echo(f"uploaded: {hub.push(out, repository)}")
    if verified:
        click.echo(verified)


def _confirm(repository: str, yes: bool) -> None:
    """Ask for the name of a repository again, before anything is written or uploaded to it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            f"--push: standard input is no terminal, so nobody can confirm the upload to "
            f"{repository}; add --yes"
        )
    typed = click.prompt(
        f"{repository} is made on the Hub, for all to see, where it is not there yet, and files "
        f"of the same names are replaced.\nType its name again to upload"
    )
    if typed.strip() != repository:
        raise UserError(f"--push: {typed!r} is not {repository}; nothing was written or uploaded")


@cli.command(name="import")
@click.argument("file", type=_PATH)
@_OVERRIDES
@click.option(
    "--as",
    "network",
    required=True,
    metavar="NETWORK",
    help="preact_resnet18 or wide_resnet, whose layers the file has by their public names.",
)
@click.option(
    "--normalise",
    metavar="NAME|MEAN:STD",
    help="What the network does to images: cifar10, cifar100, svhn, none, or numbers a channel "
    "as in 0.5,0.5,0.5:0.25,0.25,0.25.  [default: what is in the file]",
)
@click.option(
    "--expect-clean",
    type=click.FloatRange(1, 100),
    metavar="PERCENT",
    help="The published clean accuracy; refuse where it is outside the measured 95 % interval.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only so many random test images.")
@click.option("--out", type=_PATH, required=True)
def import_checkpoint(file: Path, **asked: Any) -> None:
    """Turn FILE, a checkpoint of somebody else's code, into a folder as `export` writes it.

    For networks of fast_adversarial, robust_overfitting, TRADES, AWP and RobustBench: weights of
    torch.save or safetensors, wrapped or not. Nothing in the file is executed. Width, depth and
    classes are read off it. Which shortcut and normalisation its authors had is not in it: say
    so, and check it with --expect-clean on the test images of `data`. See docs/importing.md.

    \b
    dist-adv import cifar_model.pth --as preact_resnet18 model.shortcut=raw --normalise cifar10 \\
      --expect-clean 83.3 --out wong2020
    dist-adv import trades.pt --as wide_resnet --normalise none --expect-clean 84.9 --out trades
    dist-adv train configs/cifar10/fast.yaml train.start=trades model.name=wide_resnet
    """
    _announce()
    from dist_adv.importing import Asked, run_import

    run_import(Asked(file, **asked))
    if launched.rank() == 0:
        click.echo(f"imported: {click.format_filename(asked['out'])}")


@cli.command()
@click.argument("source", type=_PATH)
@click.argument("out", type=_PATH)
@click.option(
    "--size",
    type=click.IntRange(1),
    help="Resize larger pictures to this shorter side, as JPEG.  [default: files as they are]",
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True)
@click.option(
    "--shard-mb",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Source files of so many megabytes go into a tar file.",
)
@click.option("--raw", is_flag=True, help="One array of pixels instead, for small images.")
def pack(source: Path, out: Path, **asked: Any) -> None:
    """Make a few large files of SOURCE, a folder with train/<class>/ and test/<class>/.

    OUT is then `data: {name: packed, root: OUT}`, and gives the same batches as the folder, bit
    for bit, where files stay as they are. It is tar files, which tar, WebDataset and DALI read,
    too, and an index. Killed, the same command goes on. See docs/imagenet.md.

    \b
    dist-adv pack imagenet packed                 # files as they are
    dist-adv pack imagenet packed-352 --size 352  # fewer bytes, and faster to decode
    dist-adv pack cifar10 packed --raw            # pixels
    """
    _announce()
    from dist_adv.packing import How, run_pack

    counts = run_pack(source, out, How(**asked))
    found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    click.echo(f"packed: {click.format_filename(out)} ({found} images)")


@cli.command()
@click.option("--only", default="", metavar="CASES", help="Cases to run, with commas between.")
@click.option("--out", type=_PATH, default=Path("bench"), show_default=True)
@click.option("--width", type=click.IntRange(1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=128, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto")
@click.option("--run", "run_dir", type=_PATH, help="A robust run to attack.")
@click.option(
    "--data",
    type=_Expanded(),
    metavar="ROOT",
    help="Where the images of --run and of `robust` are.",
)
@click.option("--quick", is_flag=True, help="Toy sizes: shows that everything runs, and no more.")
def bench(
    only: str,
    out: Path,
    width: int,
    batch_size: int,
    precision: str,
    run_dir: Path | None,
    data: str | None,
    quick: bool,
) -> None:
    """Time this machine: training steps, evaluation and data against what people use.

    Cases: peaks, steps, evaluation, data, engine, overhead, ranks, startup, compiled, art; and
    robust, which trains a CIFAR-10 network for eight minutes. About ten minutes without it. Leave
    the machine alone meanwhile. Writes bench.md and bench.json; exit status 1 where a bar is
    missed.

    \b
    dist-adv bench
    dist-adv bench --only steps,engine
    dist-adv bench --only robust --data data
    """
    streams.optional()
    _announce()
    from dist_adv.bench import run_bench

    cases = only.split(",") if only else []
    if not run_bench(cases, out, width, batch_size, precision, quick, run_dir, data):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...", type=_PATH)
@click.option(
    "--offline",
    type=_PATH,
    metavar="DIR",
    help="Push nothing: write W&B's offline files of what would be pushed to DIR.",
)
def sync(run_dirs: tuple[Path, ...], offline: Path | None) -> None:
    """Push runs to Weights & Biases that were recorded offline or only in part.

    Each becomes one run with the id that it has had from its first start on, however often it was
    killed and resumed since. Written from the run folder: `wandb/` may be missing. Again is safe.

    \b
    dist-adv sync runs/*
    WANDB_ENTITY=my-team dist-adv sync runs/cifar10-fast
    dist-adv sync runs/cifar10-fast --offline /tmp/look
    """
    from dist_adv.tracking.sync import sync_runs

    for name, where in sync_runs(_runs(run_dirs), offline):
        click.echo(f"{name}: {where}")


@cli.command()
@click.option("--project", default="dist-adv", show_default=True, envvar="WANDB_PROJECT")
@click.option("--entity", envvar="WANDB_ENTITY", help="User or team.  [default: your own]")
@click.option("--out", type=_PATH, default=Path("dashboard.json"), show_default=True)
def dashboard(project: str, entity: str | None, out: Path) -> None:
    """A W&B workspace and report: accuracy by epoch and by time, trade-off, Free against Fast.

    Their specification is written to --out; where you are logged in both are saved to W&B, each
    time as new ones.

    \b
    dist-adv dashboard --out dashboard.json
    dist-adv dashboard --project dist-adv --entity my-team
    """
    from dist_adv.tracking.dashboard import make_dashboard

    saved = make_dashboard(out, project, entity)
    click.echo(f"dashboard: {out}")
    click.echo(
        "\n".join(saved)
        or "not saved to W&B: nobody is logged in (`wandb login`), or WANDB_MODE says not to"
    )


@cli.command()
@click.argument("config", required=False, type=_PATH)
@_OVERRIDES
@_RUN_DIR
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(
    config: Path | None, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool
) -> None:
    """What this machine has, what `train CONFIG` would use here, and what to do about the rest.

    Writes nothing. Exit status 1 where something would keep training from working.

    \b
    dist-adv doctor
    dist-adv doctor configs/cifar10/fast.yaml train.precision=bf16 --run-dir runs/fast
    """
    if not as_json:
        _announce()
    from dist_adv.doctor import run_doctor

    folder = run_dir or (_run_dir(config) if config else Path("runs"))
    if not run_doctor(config, overrides, folder, as_json):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("config", type=_PATH)
@_OVERRIDES
@click.option("--gpus", default="1,2,4,8", show_default=True, help="How many, with commas between.")
@click.option(
    "--bandwidth",
    metavar="GB/S[:US]|NAME",
    help="Of a GPU in one direction, and microseconds of a message; or nvlink4, nvlink3, pcie5, "
    "pcie4, pcie3, ib-ndr, ib-hdr, ethernet-100, ethernet-10.  [default: measured, under torchrun]",
)
@click.option("--gpus-per-node", type=click.IntRange(1), help="With --node-bandwidth.")
@click.option("--node-bandwidth", metavar="GB/S[:US]|NAME", help="Of a node, shared by its GPUs.")
@click.option("--step-ms", metavar="BATCH:MS,...", help="Step times of a GPU, known already.")
@click.option(
    "--step-times",
    type=_PATH,
    help="The same, from bench.json, gpu_suite.py or plan --json.  [default: measured here]",
)
@click.option("--weak", is_flag=True, help="train.batch_size is a GPU's; the rate grows with it.")
@click.option("--price", type=click.FloatRange(0, min_open=True), help="Of a GPU hour.")
@click.option("--images", type=click.IntRange(1), help="Training images of a folder or pack.")
@click.option("--classes", type=click.IntRange(2), help="Its classes.")
@click.option("--json", type=_PATH, help="A file to keep all of it in.")
def plan(config: Path, overrides: tuple[str, ...], **asked: Any) -> None:
    """What CONFIG would take on more GPUs: time, communication, efficiency, cost.

    From the step time of one GPU, which is measured here unless it is given, and the ring
    all-reduce formula. A prediction: it prints what it assumes, and docs/scaling.md says how far
    to believe it.

    \b
    dist-adv plan configs/cifar10/fast.yaml --gpus 1,2,4,8 --bandwidth pcie3
    dist-adv plan configs/cifar10/pgd.yaml train.batch_size=1024 --gpus 8,64,512 \\
      --bandwidth nvlink4 --gpus-per-node 8 --node-bandwidth 400:14 --price 2.5
    dist-adv plan configs/cifar10/fast.yaml --bandwidth pcie3 --json gpu.json
    dist-adv plan configs/cifar10/fast.yaml --bandwidth ib-ndr --step-times gpu.json
    torchrun --nproc-per-node 2 -m dist_adv plan configs/digits/fast.yaml --gpus 2,4
    """
    _announce()
    from dist_adv.config import load_config
    from dist_adv.plan.command import Asked, run_plan

    run_plan(load_config(config, overrides), Asked(**asked))


def _begin_work() -> None:
    """Begin a command that trains: it can be asked to stop, and its files count."""
    stopping.catch_signals()  # before the seconds that importing torch takes
    streams.optional()
    _announce()


def _announce() -> None:
    """Say at once what the first seconds of silence are; one rank does, on standard error."""
    if launched.rank() == 0 and "torch" not in sys.modules:
        click.echo(f"{time.strftime('%H:%M:%S')} loading PyTorch ...", err=True)


def main() -> NoReturn:
    """Run a command; errors become one line and an exit status."""
    streams.install()
    _find_home()
    _find_caches()
    allocator.allow_large_pages()
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook's is a module of its kernel
    status = _run(sys.argv[1:])
    streams.optional()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is flushed. What runs while an interpreter shuts down can only spoil the end:
    # gloo's threads abort it (about one two-rank run in three), and W&B complains of a helper
    # process that was killed.
    os._exit(status)


def _find_home() -> None:
    """Set HOME where cron or a container has not: W&B's helper would log to standard error."""
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
        home = os.path.expanduser("~")  # of the user data base
        os.environ["HOME"] = tempfile.gettempdir() if home == "~" else home


def _find_caches() -> None:
    """Give W&B and matplotlib a place for caches where the home directory cannot be written.

    At every start they would complain of it on standard error. What they read from there stays.
    """
    allowed = partial(os.access, mode=os.W_OK | os.X_OK, effective_ids=True)
    if any(allowed(os.path.expanduser(folder)) for folder in ("~", "~/.cache")):
        return
    with suppress(OSError):
        place = Path(tempfile.gettempdir(), f"dist-adv-{os.getuid()}")
        place.mkdir(mode=0o700, exist_ok=True)
        if place.lstat().st_uid == os.getuid():  # or somebody else has made it
            os.environ.setdefault("WANDB_CACHE_DIR", str(place))
            os.environ.setdefault("MPLCONFIGDIR", str(place))


def _run(arguments: list[str]) -> int:
    try:
        # What a command raises as click's Exit comes back as a number.
        status = cli.main(arguments, prog_name="dist-adv", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _let_rank_0_speak()
        error.show()
        return 2
    except UserError as error:
        _complain(error)
        return 2
    except RankFailure as error:
        _say(error)
        return 1
    except RunFailure as error:
        _complain(error)
        return 1
    except Preempted as stop:
        if launched.rank() == 0:
            _say(f"stopped ({stop}); {GOES_ON}")
        return stop.status
    except OSError as error:
        if error.errno in DISK_TROUBLE:
            _say(f"{error.filename or 'a file'}: could not be written ({error.strerror})")
            return 1
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}; name another path")
        return 2
    except (KeyboardInterrupt, click.Abort):
        _complain(f"interrupted; {GOES_ON}")
        return 130
    return status or 0


def _let_rank_0_speak() -> None:
    """Wait 20 s on every rank but 0, whose message stands for all of theirs.

    torchrun kills the other ranks as soon as one has exited: rank 0 too, before it has printed, if
    another was faster. A rank that is alone with its trouble prints it after the wait.
    """
    if launched.rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the launcher ends this one
        if stopping.asked():  # it may have done so already
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)


def _complain(message: Any) -> None:
    _let_rank_0_speak()
    _say(message)


def _say(message: Any) -> None:
    click.echo(f"dist-adv: {' '.join(str(message).split())}", err=True)
