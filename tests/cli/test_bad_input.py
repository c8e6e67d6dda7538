"""What a user can get wrong: one line that names it and says what to do, status 2, nothing written.

Every row of the tables is a command, what its line must contain, and the files that lie there
before. REAL rows are processes of their own. IN_PROCESS rows fail while the configuration is
read, so the same entry point is called here, without seconds of importing torch for each; at
least one row of every kind of theirs is among the REAL ones.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import forked
from dist_adv import cli

DIGITS = Path(__file__).parents[2] / "configs" / "digits"
# Should a row ever be accepted, then what it starts is over soon.
TINY = (
    "train.max_steps=1 train.batch_size=512 train.seed=0 threat.eps=0.2 model.width=4 "
    "method.guard=none eval.attacks=[natural] eval.every=0"
)
TRAIN = "train DIGITS/fast.yaml "
GRID = f"base: {DIGITS}/fast.yaml\ngrid: "
PLAN = "plan DIGITS/fast.yaml "
PLAN_AT = f"{PLAN}--step-ms 64:9 --bandwidth 10 --gpus "
TRAIN_TINY = f"{TRAIN}{TINY} "
FOLDER = f"{TRAIN_TINY}data.name=imagefolder data.root=images"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CHECKPOINT = Path("checkpoints/step-000000001")

# What Python runs first where it is `site/sitecustomize.py`.
NO_TENSORBOARD = "import sys; sys.modules['tensorboard'] = None"
LATE = "time.sleep(1.5 if os.environ['RANK'] == '0' else 0)"
ELSEWHERE = "if os.environ['RANK'] == '1': os.environ['DIST_ADV_DATA'] = 'elsewhere'"
IN_ANOTHER_FOLDER = "if os.environ['RANK'] == '1': os.chdir('elsewhere')"
AS_RANK = "import os, time\n{}\nfrom dist_adv.cli import main\nmain()\n"

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Row:
    """A command that must be refused.

    command: as typed after `dist-adv`, DIGITS standing for the folder of configurations. says:
    parts of the one line. files: what lies in the working folder; `site/` is on Python's path.
    prepare: makes the rest of it. run: whether a copy of the trained run lies there as `run`.
    log: what lines before the complaint contain, where there may be any.
    """

    name: str
    command: str
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Prepare = lambda folder: None
    run: bool = False
    log: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def arguments(self) -> list[str]:
        return [word.replace("DIGITS", str(DIGITS)) for word in shlex.split(self.command)]


def table(rows: list[Row]) -> list[Any]:
    return [pytest.param(row, id=row.name, marks=row.marks) for row in rows]


# What lies in the working folder.


def damage(path: Path) -> None:
    """Another byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def images(folder: Path, test: str = "abc") -> None:
    """An imagefolder with a letter for a class and two images in each."""
    for split, classes in (("train", "abc"), ("test", test)):
        for number, name in enumerate(classes):
            for shade in (40, 200):
                path = folder / "images" / split / name / f"{shade}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (shade, 60 * number, 90)).save(path)


def unreadable_image(folder: Path) -> None:
    images(folder)
    path = folder / "images/train/b/40.png"
    path.write_bytes(path.read_bytes()[:40])


def sizes_differ(folder: Path) -> None:
    images(folder)
    Image.new("RGB", (9, 8)).save(folder / "images/train/b/wide.png")


def without_final_weights(folder: Path) -> None:
    (folder / "run/model.safetensors").unlink()


def checkpoints_damaged(folder: Path) -> None:
    without_final_weights(folder)
    shutil.copytree(folder / "run" / CHECKPOINT, folder / "run/checkpoints/step-000000002")
    for checkpoint in (folder / "run/checkpoints").iterdir():
        damage(checkpoint / "model.safetensors")


def other_weights(folder: Path) -> None:
    shutil.copytree(folder / "run", folder / "elsewhere" / "run")
    damage(folder / "elsewhere/run/model.safetensors")


def results_damaged(folder: Path) -> None:
    path = folder / "run/results.jsonl"
    path.write_text("{not JSON\n" + path.read_text())


# A row of every kind, and all that goes further than the configuration.

REAL = [
    # The configuration.
    Row(
        "sweep-key-of-a-config",
        "sweep my.yaml",
        ("my.yaml: run 'alpa-0.1': ", "method.alpa: unknown key; did you mean 'alpha'"),
        {"my.yaml": GRID + "{method.alpa: [0.1]}"},
    ),
    Row("key", TRAIN + "method.alpa=0.1", ("method.alpa: unknown key", "'alpha'")),
    Row(
        "method",
        TRAIN + "method.name=fsat",
        ("method.name: 'fsat' is not known", "did you mean 'fast'"),
    ),
    Row("eps-in-255ths", TRAIN + "threat.eps=8", ("threat.eps: 8 ", "8/255")),
    Row("override", TRAIN + "train.epochs", ("'train.epochs'", "train.epochs=3")),
    Row("plan", PLAN + "--bandwidth 0", ("--bandwidth: '0'", "GB/s")),
    Row(
        "config-no-yaml", "train my.yaml", ("my.yaml: line 2 ",), {"my.yaml": "method: {name: a\n"}
    ),
    Row(
        "eval-attack",
        "eval run --attacks natural,pdg-10",
        ("--attacks", "'pdg-10' is no attack", "did you mean 'pgd-10'"),
        run=True,
    ),
    Row("eval-no-run", "eval empty", ("empty", "no run folder"), {"empty/notes.txt": "mine"}),
    # The machine.
    Row(
        "fp16-without-gpu",
        TRAIN_TINY + "train.precision=fp16",
        ("train.precision: fp16 needs a GPU", "bf16"),
        marks=(pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),),
    ),
    Row(
        "tensorboard-absent",
        TRAIN_TINY + "track.tensorboard=true --run-dir new",
        ("track.tensorboard", "pip install 'dist-adv[tensorboard]'"),
        {"site/sitecustomize.py": NO_TENSORBOARD},
    ),
    Row(
        "threads-no-number",
        TRAIN_TINY + "train.threads=null",
        ("OMP_NUM_THREADS", "'two'"),
        environment={"OMP_NUM_THREADS": "two"},
        log="OMP_NUM_THREADS",  # the OpenMP library's own warning
    ),
    Row(
        "slurm-without-sbatch",
        "sweep DIGITS/../sweeps/digits.yaml --slurm --out new",
        ("--slurm: no sbatch on this machine", "node of the cluster"),
        environment={"PATH": "nowhere"},
    ),
    Row(
        "wandb-mode-unknown",
        TRAIN_TINY + "--run-dir new",
        ("WANDB_MODE", "'ofline'", "'offline'"),
        environment={"WANDB_MODE": "ofline"},
    ),
    Row(
        "batch-of-one-image",
        TRAIN_TINY + "train.max_steps=2 train.batch_size=1437 --run-dir new",
        ("train.batch_size", "1 image", "data.drop_last=true"),
    ),
    # The data.
    Row("data-missing", FOLDER, ("data.root: images/train is no folder in /", "<class>")),
    Row(
        "data-empty",
        FOLDER,
        ("data.root: images/train: ",),
        {"images/train/readme.txt": "no image", "images/test/readme.txt": "no image"},
    ),
    Row(
        "image-unreadable",
        FOLDER,
        ("data.root: images/train/b/40.png: not a readable image", "repair or remove"),
        prepare=unreadable_image,
    ),
    Row(
        "image-sizes-differ",
        FOLDER,
        ("data.size", "2 different sizes", "data.size=32"),
        prepare=sizes_differ,
    ),
    Row(
        "classes-differ",
        FOLDER,
        ("data.root: the train split has 3 classes", "test split 2", "(c)", "must be the same"),
        prepare=lambda folder: images(folder, test="ab"),
    ),
    Row(
        "cifar10-cut-short",
        TRAIN_TINY + "data.name=cifar10 data.root=archive",
        ("data.root: cifar10 in archive", "cifar-10-python.tar.gz", "damaged", "DIST_ADV_DATA"),
        {"archive/cifar-10-python.tar.gz": b"\x1f\x8b\x08\x00 the download stopped here"},
    ),
    Row(
        "cifar10-absent",
        TRAIN_TINY + "data.name=cifar10 data.root=nowhere",
        ("data.root: cifar10 in nowhere in /", "failed", "DIST_ADV_DATA"),
    ),
    # The run folder.
    Row(
        "run-of-another-configuration",
        TRAIN_TINY + "train.seed=7 threat.eps=0.1 --run-dir run",
        ("run: ", "threat.eps: 0.2 -> 0.1", "train.seed: 0 -> 7", "--run-dir"),
        run=True,
    ),
    Row(
        "run-dir-of-something-else",
        TRAIN_TINY + "--run-dir mine",
        ("mine: is not empty and no run folder", "--run-dir"),
        {"mine/notes.txt": "mine"},
    ),
    Row(
        "run-dir-below-a-file",
        TRAIN_TINY + "--run-dir taken/run",
        ("taken/run: ", "Not a directory", "--run-dir"),
        {"taken": "a file"},
    ),
    Row(
        "resume-none-of-a-run",
        TRAIN_TINY + "--run-dir run --resume none",
        ("run: exists already", "--run-dir", "--resume auto"),
        run=True,
    ),
    Row(
        "resume-missing",
        TRAIN_TINY + "--run-dir new --resume nothing/step-000000001",
        ("nothing/step-000000001: no complete checkpoint", "--resume auto"),
    ),
    Row(
        "resume-damaged",
        f"{TRAIN_TINY}--run-dir new --resume run/{CHECKPOINT}",
        (f"run/{CHECKPOINT}: optimizer.safetensors is damaged", "--resume auto"),
        prepare=lambda folder: damage(folder / "run" / CHECKPOINT / "optimizer.safetensors"),
        run=True,
    ),
    Row(
        "resume-another-model",
        f"{TRAIN_TINY}model.width=8 --run-dir new --resume run/{CHECKPOINT}",
        (f"run/{CHECKPOINT}: ", "model.width: 4 -> 8"),
        run=True,
    ),
    Row(
        "resume-all-damaged",
        TRAIN_TINY + "--run-dir run --resume auto",
        ("run/checkpoints: none of its 2 checkpoints is good", "--run-dir"),
        prepare=checkpoints_damaged,
        run=True,
        log="passed over: run/checkpoints/step-",
    ),
    Row(
        "start-missing",
        TRAIN_TINY + "train.start=nothing --run-dir new",
        ("train.start: nothing: no such weights file",),
    ),
    Row(
        "start-of-another-network",
        TRAIN_TINY + "train.start=run model.width=8 --run-dir new",
        ("train.start: run/model.safetensors", "model.width: 4 there, 8 here", "configure"),
        run=True,
    ),
    # What reads somebody's checkpoint.
    Row(
        "import-web-page",
        "import theirs.pt --as preact_resnet18 --normalise none --out new",
        ("theirs.pt: is a web page and no checkpoint", "Google Drive", "gdown"),
        {"theirs.pt": "<!DOCTYPE html><html></html>"},
    ),
    # What reads a run.
    Row(
        "eval-other-classes",
        "eval run data.name=imagefolder data.root=images",
        ("data: imagefolder has 3 classes and the model 10", "trained on"),
        prepare=images,
        run=True,
    ),
    Row(
        "eval-unfinished",
        "eval run",
        ("run/model.safetensors: no such weights file", "has the run finished"),
        prepare=without_final_weights,
        run=True,
    ),
    Row("report-missing", "report nothing --out new", ("nothing: there is no such run", "path")),
    Row(
        "report-no-run",
        "report mine --out new",
        ("mine: is no run folder", "name one that training wrote"),
        {"mine/notes.txt": "mine"},
    ),
    Row(
        "report-of-no-runs",
        "report mine notes.txt --out new",
        ("none of these is a run folder", "name one that training wrote"),
        {"mine/notes.txt": "mine", "notes.txt": "mine"},
    ),
    Row(
        "report-against",
        "report run --against papr --out new",
        ("--against: ", "'papr'", "did you mean 'paper'"),
        run=True,
    ),
    Row("export-exists", "export run --out run", ("run: ", "exists", "choose a new"), run=True),
    Row(
        "export-damaged",
        "export run --out new",
        ("run/model.safetensors: ", "not a readable safetensors file"),
        prepare=lambda folder: os.truncate(folder / "run/model.safetensors", 1000),
        run=True,
    ),
    Row(
        "export-results-damaged",
        "export run --out new",
        ("run/results.jsonl: line 1 ",),
        prepare=results_damaged,
        run=True,
    ),
    Row(
        "sync-nobody-is-logged-in",
        "sync run",
        ("nobody is logged in", "`wandb login`", "WANDB_API_KEY", "--offline DIR"),
        environment={"WANDB_API_KEY": "", "NETRC": "none"},
        run=True,
    ),
    Row(
        "sync-identity-damaged",
        "sync run --offline new",
        ("run/wandb/run.json: not valid JSON", "remove it"),
        {"run/wandb/run.json": "{"},
        run=True,
    ),
]

# More of the kinds above, all of which end while the configuration is read.

RUN = {"run/config.yaml": "method: {name: fast}\n"}
IN_PROCESS = [
    # Unknown keys and names.
    Row("key-in-train", TRAIN + "train.epoch=3", ("train.epoch: unknown key", "'epochs'")),
    Row("size", TRAIN + "data.size=4", ("data.size: the images of digits are not resized",)),
    Row("section", TRAIN + "trian.epochs=3", ("trian: unknown key", "'train'")),
    Row("key-three-deep", TRAIN + "track.wandb.projekt=a", ("track.wandb.projekt", "'project'")),
    Row(
        "key-of-a-kind", TRAIN + "method.replays=3", ("method.replays: unknown key", "alpha, init")
    ),
    Row("two-problems", TRAIN + "method.alpa=1 train.epoch=3", ("method.alpa", "train.epoch")),
    Row("method-far-off", TRAIN + "method.name=x", ("method.name", " natural, ", " trades")),
    Row(
        "method-number",
        TRAIN + "method.name=3",
        ("method.name: 3 is no name", " natural, ", " trades"),
    ),
    Row("model", TRAIN + "model.name=wideresnet", ("model.name: 'wideresnet'", "'wide_resnet'")),
    Row("norm", TRAIN + "threat.norm=linff", ("threat.norm: 'linff'", "'linf'")),
    Row("precision", TRAIN + "train.precision=fp8", ("train.precision: 'fp8'", "'fp32'")),
    Row("schedule", TRAIN + "optim.schedule=cosin", ("optim.schedule: 'cosin'", "'cosine'")),
    Row("wandb-project", TRAIN + "track.wandb.project=a/b", ("track.wandb.project",)),
    Row("word-of-yaml", TRAIN + "track.wandb.mode=off", ("track.wandb.mode: False", "disabled")),
    Row("section-as-value", TRAIN + "method=fast", ("method: is a section", "'fast'")),
    # Numbers out of range, and what is no number.
    Row("eps-negative", TRAIN + "threat.eps=-8/255", ("threat.eps", "negative", "like 8/255")),
    Row("eps-words", TRAIN + "threat.eps=a/b", ("threat.eps: 'a/b' is not a number", "8/255")),
    Row("eps-over-zero", TRAIN + "threat.eps=1/0", ("threat.eps: '1/0' is not a number", "8/255")),
    Row("eps-nan", TRAIN + "threat.eps=.nan", ("threat.eps: must be finite",)),
    Row("eps-none", TRAIN + "threat.eps=", ("threat.eps", "number", "None")),
    Row("alpha-zero", TRAIN + "method.alpha=0", ("method.alpha: must be above 0", "2/255")),
    Row("alpha-in-255ths", TRAIN + "method.alpha=10", ("method.alpha", "did you mean 10/255")),
    Row("step-size-in-255ths", TRAIN + "eval.step_size=2", ("eval.step_size", "2/255")),
    Row("steps-zero", "train DIGITS/pgd.yaml method.steps=0", ("method.steps", "equal to 1")),
    Row(
        "replays-zero", "train DIGITS/free.yaml method.replays=0", ("method.replays", "equal to 1")
    ),
    Row("batch-zero", TRAIN + "train.batch_size=0", ("train.batch_size", "equal to 1")),
    Row("epochs-half", TRAIN + "train.epochs=3.5", ("train.epochs", "integer", "3.5")),
    Row("epochs-exponent", TRAIN + "train.epochs=1e3", ("train.epochs", "integer", "1000.0")),
    Row("seed-boolean", TRAIN + "train.seed=true", ("train.seed", "integer", "True")),
    Row("momentum-one", TRAIN + "optim.momentum=1", ("optim.momentum", "less than 1")),
    Row(
        "cycle-momentum",
        TRAIN + "optim.cycle_momentum=true optim.momentum=0",
        ("optim.cycle_momentum", "at least 0.1"),
    ),
    Row(
        "depth",
        TRAIN + "model.name=wide_resnet model.depth=33",
        ("model.depth: 33", "28, 34", "32"),
    ),
    # Names of attacks.
    Row(
        "attack-of-no-steps", TRAIN + "eval.attacks=[pgd-0]", ("eval.attacks: 'pgd-0'", "'pgd-10'")
    ),
    Row(
        "attack-misspelt", TRAIN + "eval.attacks=[natral]", ("eval.attacks: 'natral'", "'natural'")
    ),
    Row("attack-no-list", TRAIN + "eval.attacks=natural", ("eval.attacks", "list", "'natural'")),
    Row("curve-natural", TRAIN + "eval.curve_attack=natural", ("eval.curve_attack", "'pgd-10'")),
    Row("curve-misspelt", TRAIN + "eval.curve_attack=pgd10", ("eval.curve_attack", "'pgd-10'")),
    Row(
        "eval-no-steps", "eval run --attacks pgd-0", ("--attacks", "'pgd-0' needs at least 1"), RUN
    ),
    Row("eval-no-restart", "eval run --attacks pgd-9-0", ("--attacks", "needs at least 1"), RUN),
    Row("eval-pgd-x", "eval run --attacks pgd-x", ("'pgd-x' is no attack", "pgd-STEPS"), RUN),
    Row(
        "eval-nothing",
        "eval run --attacks natural,",
        ("'' is no attack", "natural, noise, fgsm"),
        RUN,
    ),
    Row("eval-override", "eval run eval.loss=dlrr", ("eval.loss: 'dlrr'", "'dlr'"), RUN),
    Row("eval-missing", "eval nothing", ("nothing", "no run folder")),
    # Overrides.
    Row("override-no-key", TRAIN + "=3", ("'=3'", "train.epochs=3")),
    Row("override-gap", TRAIN + "train..epochs=3", ("'train..epochs=3'", "train.epochs=3")),
    Row("override-bracket", TRAIN + "train.epochs=[", ("train.epochs: line 1 not valid YAML",)),
    Row("override-both", TRAIN + "train=5 train.seed=3", ("train.seed", "another override")),
    Row(
        "override-no-date",
        TRAIN + "track.wandb.name=2024-13-45",
        ("track.wandb.name", "2024-13-45"),
    ),
    Row("override-no-integer", TRAIN + "train.seed=0b_", ("train.seed", "0b_")),
    # Plans.
    Row("plan-gpus-zero", PLAN_AT + "0", ("--gpus: '0'", "8,64,512")),
    Row("plan-gpus-negative", PLAN_AT + "8,-2", ("--gpus: '8,-2'", "8,64,512")),
    Row("plan-gpus-words", PLAN_AT + "many", ("--gpus: 'many'", "8,64,512")),
    Row("plan-batch", PLAN_AT + "128", ("train.batch_size: 64", "128 ranks; use at least 128")),
    Row("plan-statistics", PLAN_AT + "20", ("train.batch_size: leaves a rank 1 image", "group")),
    Row("plan-short-batch", PLAN_AT + "40", ("the last batch has 30 images for 40 ranks",)),
    Row("plan-weak", PLAN_AT + "64 --weak", ("--weak: 64 x 64 is a batch of 4096 of 1438",)),
    Row("plan-no-bandwidth", PLAN, ("--bandwidth: missing", "nvlink4", "torchrun")),
    Row("plan-bandwidth-zero", PLAN + "--bandwidth 0", ("--bandwidth: '0'", "GB/s", "pcie3")),
    Row("plan-bandwidth-name", PLAN + "--bandwidth nvlnk4", ("--bandwidth: 'nvlnk4'", "nvlink4")),
    Row("plan-latency", PLAN + "--bandwidth 10:-1", ("--bandwidth: '10:-1'", "12.5:14")),
    Row(
        "plan-half-a-node",
        PLAN_AT + "2,8,12 --gpus-per-node 8 --node-bandwidth ib-ndr train.batch_size=256",
        ("--gpus: 12 does not fill nodes of 8", "multiple"),
    ),
    Row("plan-nodes-without-network", PLAN_AT + "8 --gpus-per-node 8", ("--node-bandwidth: give",)),
    Row("plan-step-ms", PLAN + "--bandwidth 10 --step-ms 64", ("--step-ms: '64'", "128:35.5")),
    Row("plan-step-ms-zero", PLAN + "--bandwidth 10 --step-ms 64:0", ("--step-ms: '64:0'",)),
    Row("plan-step-ms-negative", PLAN + "--bandwidth 10 --step-ms=-64:5", ("--step-ms: '-64:5'",)),
    Row(
        "plan-both",
        PLAN + "--bandwidth 10 --step-ms 64:9 --step-times a.json",
        ("--step-ms and --step-times", "one"),
    ),
    Row(
        "plan-record-missing",
        PLAN + "--bandwidth 10 --step-times a.json",
        ("--step-times: a.json: cannot be read", "No such file"),
    ),
    Row(
        "plan-record-folder",
        PLAN + "--bandwidth 10 --step-times a",
        ("--step-times: a: cannot be read", "directory"),
        {"a/b": ""},
    ),
    Row(
        "plan-record-binary",
        PLAN + "--bandwidth 10 --step-times a.json",
        ("--step-times: a.json: holds no step times", "bench.json", "plan --json"),
        {"a.json": b"\xff\xfe"},
    ),
    Row(
        "plan-record-other-json",
        PLAN + "--bandwidth 10 --step-times a.json",
        ("--step-times: a.json: holds no step times",),
        {"a.json": '{"rows": [3]}'},
    ),
    *(
        Row(
            f"plan-record-{name}",
            PLAN + "--bandwidth 10 --step-times a.json",
            ("--step-times: a.json: holds no step times",),
            {
                "a.json": '{"network": "n", "rows": [{"what": "Fast, fp32, batch 1, compile none", '
                f'"step_ms": {value}}}]}}'
            },
        )
        for name, value in {"word": '"soon"', "zero": "0", "nan": "NaN"}.items()
    ),
    Row(
        "plan-record-without-the-case",
        PLAN + "--bandwidth 10 --step-times a.json",
        ("--step-times: a.json: has no Fast in train.precision=", "it has natural fp32 none"),
        {
            "a.json": '{"network": "preact_resnet18, 16, batch, 8x8", "rows": '
            '[{"what": "natural, fp32, batch 64, compile none", "step_ms": 3}]}'
        },
    ),
    Row(
        "plan-imagefolder",
        PLAN_AT + "2 data.name=imagefolder data.size=224",
        ("--images, --classes and data.size", "--images 1281167"),
    ),
    Row("plan-json-where", PLAN_AT + "2 --json a/b", ("--json: a is no folder", "name another")),
    Row("plan-json", PLAN_AT + "2 --json a", ("--json: a exists", "not overwritten"), {"a": ""}),
    Row("plan-images", PLAN_AT + "2 --images 5", ("--images, --classes", "digits is known")),
    Row("plan-validation", PLAN_AT + "2 data.validation=1438", ("data.validation: 1438",)),
    # Files.
    Row("config-missing", "train my.yaml", ("my.yaml: no such configuration file", "configs/")),
    Row("config-misspelt", "train DIGITS/fst.yaml", ("digits/fst.yaml", "configs/")),
    Row("config-folder", "train my", ("my: cannot be read", "directory"), {"my/a.yaml": "a: 1"}),
    Row("config-empty", "train my.yaml", ("my.yaml: is empty", "name: fast"), {"my.yaml": ""}),
    Row("config-comment", "train my.yaml", ("my.yaml: is empty",), {"my.yaml": "# later\n"}),
    Row(
        "config-list", "train my.yaml", ("my.yaml: is no mapping", "name: fast"), {"my.yaml": "- a"}
    ),
    Row(
        "config-text",
        "train my.yaml",
        ("my.yaml: is no mapping", "name: fast"),
        {"my.yaml": "fast"},
    ),
    Row(
        "config-binary", "train my.yaml", ("my.yaml", "UTF-8"), {"my.yaml": b"\x7fELF\xff\xfe\x00"}
    ),
    Row("config-zeros", "train my.yaml", ("my.yaml: not valid YAML",), {"my.yaml": b"a: \x00"}),
    Row("config-deep", "train my.yaml", ("my.yaml: not valid YAML",), {"my.yaml": "[" * 3000}),
    Row(
        "config-tag",
        "train my.yaml",
        ("my.yaml: line 1",),
        {"my.yaml": "a: !!python/name:os.system"},
    ),
    Row(
        "config-no-method",
        "train my.yaml",
        ("my.yaml: method", "name: fast"),
        {"my.yaml": "data: {}"},
    ),
    Row(
        "config-key-twice",
        "train my.yaml",
        ("my.yaml: line 2", "'epochs' is given twice"),
        {"my.yaml": "method: {name: fast}\ntrain: {epochs: 1, epochs: 2}\n"},
    ),
    Row(
        "config-attack",
        "train my.yaml",
        ("my.yaml: eval.attacks: 'pgd-x' is no attack",),
        {"my.yaml": "method: {name: fast}\neval: {attacks: [natural, pgd-x]}\n"},
    ),
    Row(
        "extends-missing",
        "train my.yaml",
        ("my.yaml", "base.yaml: no such configuration file"),
        {"my.yaml": "extends: base.yaml\n"},
    ),
    Row(
        "extends-circle",
        "train a.yaml",
        ("a.yaml: extends itself", "remove the circle"),
        {"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"},
    ),
    Row(
        "extends-itself", "train a.yaml", ("a.yaml: extends itself",), {"a.yaml": "extends: a.yaml"}
    ),
    Row(
        "extends-list", "train a.yaml", ("a.yaml: extends", "one file"), {"a.yaml": "extends: [b]"}
    ),
]

IN_PROCESS += [
    # Sweeps: in each of them nothing runs.
    Row("sweep-missing", "sweep my.yaml", ("my.yaml: no such configuration file", "configs/")),
    Row("sweep-empty", "sweep my.yaml", ("my.yaml: is empty", "grid: "), {"my.yaml": ""}),
    Row("sweep-of-nothing", "sweep my.yaml", ("no run", "'grid:'"), {"my.yaml": "set: {}"}),
    Row(
        "sweep-key",
        "sweep my.yaml",
        ("my.yaml: gird: unknown key; did you mean 'grid'",),
        {"my.yaml": "gird: {train.seed: [1]}"},
    ),
    Row(
        "sweep-key-of-a-run",
        "sweep my.yaml",
        ("runs.0.nmae: unknown key; did you mean 'name'", "runs.0.name: missing"),
        {"my.yaml": "runs: [{nmae: a}]"},
    ),
    Row(
        "sweep-is-a-run",
        "sweep DIGITS/fast.yaml",
        ("fast.yaml: extends: unknown key", "base, set, grid, runs"),
    ),
    Row(
        "sweep-grid-no-list",
        "sweep my.yaml",
        ("my.yaml: grid.train.seed: ", "list", "it is 3"),
        {"my.yaml": GRID + "{train.seed: 3}"},
    ),
    Row(
        "sweep-grid-of-nothing",
        "sweep my.yaml",
        ("my.yaml: grid.train.seed: ", "at least 1"),
        {"my.yaml": GRID + "{train.seed: []}"},
    ),
    Row(
        "sweep-value-of-the-last",
        "sweep my.yaml",
        ("my.yaml: run 'eps-8': ", "threat.eps: 8 ", "8/255"),
        {"my.yaml": GRID + "{threat.eps: [8/255, 8]}"},
    ),
    Row(
        "sweep-override",
        "sweep my.yaml train.epoch=3",
        ("my.yaml: run 'seed-1': ", "train.epoch: unknown key; did you mean 'epochs'"),
        {"my.yaml": GRID + "{train.seed: [1]}"},
    ),
    Row(
        "sweep-base",
        "sweep my.yaml",
        ("my.yaml: run 'a': ", "fst.yaml: no such configuration file"),
        {"my.yaml": "runs: [{name: a, base: fst.yaml}]"},
    ),
    Row(
        "sweep-no-base",
        "sweep my.yaml",
        ("my.yaml: run 'seed-1': ", "method: missing"),
        {"my.yaml": "grid: {train.seed: [1]}"},
    ),
    Row(
        "sweep-same-name",
        "sweep my.yaml",
        ("my.yaml: two runs have the name 'seed-1'", "its own"),
        {"my.yaml": GRID + "{train.seed: [1, 1]}"},
    ),
    Row(
        "sweep-name-of-a-path",
        "sweep my.yaml",
        ("my.yaml: the run name '../a' is no folder name", "letters"),
        {"my.yaml": "runs: [{name: ../a}]"},
    ),
    Row(
        "sweep-name-of-its-own",
        "sweep my.yaml",
        ("my.yaml: the run name 'report'", "another"),
        {"my.yaml": "runs: [{name: report}]"},
    ),
    *(
        Row(
            f"sweep-name-{name}",
            "sweep my.yaml",
            (f"my.yaml: the run name {name!r} is a sweep's own", "another"),
            {"my.yaml": f"runs: [{{name: {name}}}]"},
        )
        for name in ("STOP", "slurm_job", "sweep.yaml")
    ),
    Row(
        "sweep-only",
        "sweep my.yaml --only sed-1",
        ("--only", "no run 'sed-1'; did you mean 'seed-1'"),
        {"my.yaml": GRID + "{train.seed: [0, 1]}"},
    ),
    Row(
        "sweep-only-number",
        "sweep my.yaml --only 2",
        ("--only", "no run '2'; 0 to 1, or a name"),
        {"my.yaml": GRID + "{train.seed: [0, 1]}"},
    ),
    Row(
        "sweep-into-a-run",
        "sweep my.yaml --only 0 --out run",
        ("run: is not empty and no sweep's folder", "--out"),
        {"my.yaml": GRID + "{train.seed: [0, 1]}", **RUN},
    ),
    Row(
        "sweep-into-another",
        "sweep my.yaml --out new",
        ("new: holds another sweep (run 1 is 'seed-2' there and 'seed-1' here)", "--out"),
        {
            "my.yaml": GRID + "{train.seed: [0, 1]}",
            "new/sweep.yaml": GRID + "{train.seed: [0, 2]}",
            "new/.claim": "",
        },
    ),
    Row("status-of-nothing", "status nothing", ("nothing: there is no such run folder", "path")),
    Row(
        "status-damaged",
        "status new",
        ("new/sweep.yaml: cannot be read", "restore it"),
        {"new/sweep.yaml": "runs: [{nam: a}]"},
    ),
]

# click's own: its usage, a way to more help, what was wrong.

USAGE = [
    Row("sweep-limit", "sweep DIGITS/../sweeps/digits.yaml --limit 2", ("--slurm", "--jobs")),
    Row("command", "trian DIGITS/fast.yaml", ("No such command 'trian'", "'train'")),
    Row("option", TRAIN + "--run-dri new", ("No such option '--run-dri'", "'--run-dir'")),
    Row("option-for-a-key", TRAIN + "--epochs 3", ("No such option '--epochs'",)),
    Row("argument-missing", "train", ("Missing argument 'CONFIG'",)),
    Row("option-missing", "export run", ("Missing option '--out'",)),
    Row("limit-zero", "eval run --limit 0", ("'--limit'", "x>=1")),
    Row("plan-price-negative", PLAN + "--price -1", ("'--price'", "x>0")),
    Row("plan-node-of-none", PLAN + "--gpus-per-node 0", ("'--gpus-per-node'", "x>=1")),
]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every name below `folder` with the bytes of a file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# What takes a while at the start is said before it.
ANNOUNCED = re.compile(r"^\d\d:\d\d:\d\d (loading \w+|evaluating: .*) \.\.\.$")


def refused(row: Row, status: int, out: str, err: str) -> None:
    """Status 2 and one line of complaint, which contains what it must."""
    lines = [line for line in err.splitlines() if line.strip() and not ANNOUNCED.search(line)]
    assert "Traceback" not in out + err, err
    assert out == ""
    complaints = [line for line in lines if line.startswith("dist-adv: ")]
    assert len(complaints) == 1, err
    assert [part for part in row.says if part not in complaints[0]] == [], complaints[0]
    assert lines[-1] == complaints[0]
    assert all(row.log and row.log in line for line in lines[:-1]), err
    assert status == 2


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's own, but for what would change what a command does."""
    unwanted = (*LAUNCHER, "DIST_ADV_DATA", "WANDB_MODE", "no_proxy", "NO_PROXY")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    path = os.pathsep.join(filter(None, ["site", kept.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}
    return {**kept, **own, **more}


def call(folder: Path, arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, as a process of its own."""
    return forked.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment(more),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on digits."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["train", str(DIGITS / "fast.yaml"), *TINY.split(), "--run-dir", "run"]
    done = call(folder, ["dist_adv", *command])
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Bound but never listening: a connection is refused at once, whatever the network."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The working folder of a row."""
    row: Row = request.getfixturevalue("row")
    if row.run:
        shutil.copytree(request.getfixturevalue("trained"), tmp_path / "run")
    for name, content in row.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    row.prepare(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("row", table(REAL))
def test_refused(row: Row, folder: Path, closed_port: int) -> None:
    before = snapshot(folder)
    proxy = f"http://127.0.0.1:{closed_port}"
    done = call(
        folder,
        ["dist_adv", *row.arguments()],
        https_proxy=proxy,
        http_proxy=proxy,
        **row.environment,
    )
    refused(row, done.returncode, done.stdout, done.stderr)
    after = snapshot(folder)
    if row.log:  # what was said before is in the run's log, too
        for files in (before, after):
            files.pop("run/log.txt", None)
    assert after == before


@pytest.mark.parametrize("row", table(IN_PROCESS))
def test_refused_by_the_configuration(
    row: Row, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, without an Accelerator: a row that gets as far as that has failed."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "dist_adv.plan.command.start_accelerator", lambda *_: pytest.fail("was accepted")
    )
    before = snapshot(folder)
    status = cli._run(row.arguments())
    said = capsys.readouterr()
    refused(row, status, said.out, said.err)
    assert snapshot(folder) == before


@pytest.mark.parametrize("row", table(USAGE))
def test_refused_by_click(row: Row, folder: Path) -> None:
    before = snapshot(folder)
    done = call(folder, ["dist_adv", *row.arguments()])
    assert done.returncode == 2
    assert done.stdout == ""
    usage, way_out, *_, complaint = done.stderr.splitlines()
    assert usage.startswith("Usage: dist-adv ")
    assert "--help" in way_out
    assert complaint.startswith("Error: ")
    assert [part for part in row.says if part not in complaint] == [], complaint
    assert snapshot(folder) == before


# A launcher of two ranks, of which rank 0 speaks; `rank.py` runs instead of dist_adv where it is.

RANKS = [
    Row(
        "batch-smaller-than-ranks",
        TRAIN_TINY + "train.batch_size=1 --run-dir new",
        ("train.batch_size: 1 is the global batch and smaller than the 2 ranks", "at least 2"),
    ),
    Row(
        "rank-0-late",
        TRAIN + "threat.eps=8 --run-dir new",
        ("threat.eps: 8 ", "8/255"),
        {"rank.py": AS_RANK.format(LATE)},
    ),
    Row(
        "rank-1-alone",
        TRAIN_TINY + "data.name=imagefolder train.batch_size=6 --run-dir new",
        ("data.root: elsewhere/train ", "<class>"),
        {"rank.py": AS_RANK.format(ELSEWHERE)},
        prepare=images,
    ),
    Row(
        "rank-1-starts-from-others",
        TRAIN_TINY + "train.start=run --run-dir new",
        ("not started alike", "weights of train.start: ", "on rank 0"),
        {"rank.py": AS_RANK.format(IN_ANOTHER_FOLDER)},
        prepare=other_weights,
        run=True,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("row", table(RANKS))
def test_one_rank_complains_for_all(row: Row, folder: Path) -> None:
    """One line, among what the launcher says of its own; the exit status is the launcher's, 1."""
    before = snapshot(folder)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["rank.py"] if "rank.py" in row.files else ["-m", "dist_adv"]
    done = call(folder, [*launcher, *program, *row.arguments()], DIST_ADV_DATA="images")
    assert done.returncode == 1
    complaints = [line for line in done.stderr.splitlines() if line.startswith("dist-adv: ")]
    assert len(complaints) == 1, done.stderr
    assert [part for part in row.says if part not in complaints[0]] == [], complaints[0]
    assert f"{Path(cli.__file__).parent}{os.sep}" not in done.stderr, "a traceback of ours"
    assert snapshot(folder) == before
