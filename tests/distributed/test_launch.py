"""Real launchers, two real processes with gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import forked
from cases import CASES, config
from dist_adv import load_model
from dist_adv.attacks.threat import build
from dist_adv.config import load_config
from dist_adv.data import load_dataset
from dist_adv.distributed import start
from dist_adv.training.collapse import Measured, on_sample
from launch import SMALL

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
]
QUICK = [
    *(f"model.{key}={value}" for key, value in SMALL.items()),
    *("train.epochs=2", "eval.attacks=[natural,pgd-3]", "eval.curve_limit=50"),
]


def launch(
    launcher: list[str], *arguments: str, cwd: Path, run: Callable = forked.run
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "0"}
    command = [*launcher, "-m", "dist_adv", *arguments]
    return run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("launcher", "method", "run"),
    [
        (TORCHRUN, "fast", forked.run),  # tests/launch/test_run.py has torchrun itself start ranks
        (ACCELERATE, "free", subprocess.run),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_train_on_two_ranks(launcher, method, run, tmp_path):
    config = str(CONFIGS / "digits" / f"{method}.yaml")
    fewer = ["method.replays=2"] * (method == "free")
    settings = [*QUICK, *fewer, "--run-dir", "run"]
    done = launch(launcher, "train", config, *settings, cwd=tmp_path, run=run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["world_size"] == 2
    assert done.stderr.count("epoch 2/2") == 1  # one process speaks
    results = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in results] == [359, 359]

    def accuracies() -> list[int]:
        lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
        return [json.loads(line)["correct"] for line in lines]

    # One process finds in the saved file what two found in theirs: n is exact, each image is
    # attacked once, from the same start.
    alone = launch([sys.executable], "eval", "run", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert accuracies()[:2] == accuracies()[2:]
    if method == "fast":
        found, last = measured_alone(tmp_path / "run"), after_the_last_epoch(tmp_path / "run")
        assert found.record() == {
            "guard_accuracy": last["guard_accuracy"],
            "guard_fgsm_accuracy": last["guard_fgsm_accuracy"],
            "guard_alignment": pytest.approx(last["guard_alignment"], abs=1e-3),
        }


def after_the_last_epoch(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def measured_alone(run_dir: Path) -> Measured:
    """What one process finds in the same weights."""
    settings = load_config(run_dir / "config.yaml")
    threat = build(settings.threat.norm, settings.threat.eps)
    data = load_dataset(settings.data, "train")
    accelerator = start.start_accelerator(threads=1)
    found = on_sample(load_model(run_dir), data, threat, accelerator, 500, lambda: None)
    assert found.n == 512
    return found


KILL_AFTER_FIRST_CHECKPOINT = """
import os, signal, sys, torch.distributed
from dist_adv.runs import checkpoint
save = checkpoint.save
def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_and_die
from dist_adv.cli import main
main()
"""


@pytest.mark.parametrize("method", ["fast-previous", "free"])
def test_killed_on_two_ranks_and_resumed_bit_for_bit(method, tmp_path, images):
    """SIGKILL of rank 0 after the first epoch; BatchNorm and delta are each rank's own."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(config(method, "batch", images, small=True))
    )
    (tmp_path / "die.py").write_text(KILL_AFTER_FIRST_CHECKPOINT)

    def train(run_dir: str, script: list[str]) -> subprocess.CompletedProcess[str]:
        command = [*TORCHRUN, *script, "train", "config.yaml", "--run-dir", run_dir]
        return forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    whole = train("whole", ["-m", "dist_adv"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = train("parts", ["die.py"])
    assert killed.returncode != 0
    assert len(list((tmp_path / "parts" / "checkpoints").iterdir())) == 1
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    resumed = train("parts", ["-m", "dist_adv"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on from" in resumed.stderr
    expected = load_model(tmp_path / "whole").state_dict()
    found = load_model(tmp_path / "parts").state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


COUNT = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from cases import CASES, config
from dist_adv.distributed.start import start_accelerator
from dist_adv.config import parse_config
from dist_adv.plan.measure import Images, blank_network, gradient_buckets
from dist_adv.training.meter import Meter
from dist_adv.training.trainer import Trainer

NOISE = Images(120, 3, (8, 8), 3)
TWO = "trades vit gradalign gat nuat mart liet cuap uap prior random noise".split()
FORWARDS = dict.fromkeys(TWO, 2) | {"awp-trades": 4, "accumulate": 12}
# Of a step, else one. AWP probes first; three parts of a batch have their own.

for case in CASES:
    settings = parse_config(config(case, "batch", Path(sys.argv[1]), small=True), case)
    learner = Trainer(settings, start_accelerator("fp32", 1)).learner
    reduced = []
    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)
    learner.net.prepared.register_comm_hook(None, hook)
    wanting = []  # forwards that would give weight gradients: none of an attack's
    learner.net.bare.register_forward_pre_hook(
        lambda module, inputs: wanting.append(next(module.parameters()).requires_grad)
    )
    parameters = sum(p.numel() for p in learner.net.bare.parameters())
    meter = Meter(learner.accelerator.device)
    for batch in learner.loader.epoch(0):
        learner.learn(batch, meter)
    steps = learner.clock.step
    assert sum(reduced) == steps * parameters, (case, sum(reduced), steps, parameters)
    assert sum(wanting) == steps * FORWARDS.get(case, 1), (case, sum(wanting), steps)
    planned = gradient_buckets(blank_network(settings, NOISE))
    assert 4 * sum(reduced) == steps * sum(planned), (case, sum(reduced), planned)
    if dist.get_rank() == 0:
        print(case, "ok", flush=True)
tree = config("natural", "batch", Path(sys.argv[1]))
tree["model"]["width"] = 16  # gradients of more than a bucket
settings = parse_config(tree, "buckets")
learner = Trainer(settings, start_accelerator("fp32", 1)).learner
reduced = []
def hook(state, bucket):
    reduced.append(4 * bucket.buffer().numel())
    return allreduce_hook(state, bucket)
learner.net.prepared.register_comm_hook(None, hook)
learner.settle()
reduced.clear()
learner.learn(next(learner.loader.epoch(0)), Meter(learner.accelerator.device))
planned = gradient_buckets(blank_network(settings, NOISE))
assert reduced == planned and len(planned) == 2, (reduced, planned)
if dist.get_rank() == 0:
    print("buckets ok", flush=True)
os._exit(0)
"""


def test_gradients_are_communicated_once_a_step_and_nothing_by_attacks(tmp_path, images):
    """Counted with DDP's communication hook and a forward hook: gradients, not time.

    `dist-adv plan` foretells the bytes of every method, and the buckets.
    """
    (tmp_path / "count.py").write_text(COUNT)
    support = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")]))
    done = forked.run(
        [*TORCHRUN, "count.py", str(images)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok") == len(CASES) + 1
