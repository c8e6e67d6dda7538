"""Run the recipes of configs/imagenet and configs/generated at toy size, killed and gone on with.

    python tests/faults/recipes.py --kills 2 --seed 0 --record FILE.md

Each on two ranks, on photographs that are made up: 64 a class, 64 pixels, packed; those with
generated images on 32 pixels and an .npz file. First to its end without a disturbance, then with
the whole job killed (SIGKILL) soon after steps that are drawn, and the same command again. The
SHA-256 of the final weights must be the same.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from dist_adv.packing import How, run_pack
from dist_adv.testing import make_images
from launch import Job, weights_hash

CONFIGS = Path(__file__).parents[2] / "configs"
# A few layers of each network.
SMALL = {
    "fast-resnet50": [
        *("model.width=4", "train.epochs=3", "train.batch_size={0: 32, 2: 16}"),
        *("data.size={0: 32, 1: 48, 2: 64}", "optim.points={0: 0, 1: 1, 3: 0.1}"),
    ],
    "free-resnet50": ["model.width=4"],
    "pgd3-resnet50": ["model.width=4"],
    "pgd2-convnext-tiny": [
        "model.pretrained=false",
        "model.args={depths: [1, 1, 1, 1], dims: [8, 16, 16, 32]}",
    ],
    "light-xcit-small": ["model.args={depth: 2, embed_dim: 32, num_heads: 2}"],
    "trades-wrn-28-10": ["model.depth=10", "model.widen=1"],
    "n-fgsm": ["model.width=4"],
}
SAVED = 3  # steps
SHORT = [
    *("train.epochs=2", "train.batch_size=32", "train.precision=fp32", "train.threads=1"),
    *(
        f"train.save_steps={SAVED}",
        "train.keep=1000",
        "train.log_every=3",
        "optim.warmup=0",
        "method.guard=none",
    ),
    *("eval.attacks=[natural,pgd-2]", "eval.every=0", "eval.batch_size=32"),
    "track.wandb.mode=disabled",
]


def prepare(folder: Path) -> dict[str, list[str]]:
    """Make images for both kinds of recipes; return what their configurations are told of them."""
    make_images(folder / "images")
    run_pack(folder / "images", folder / "packed", How())
    make_images(folder / "small", sizes=(32, 32))
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "1m.npz", image=pixels, label=draw.integers(0, 4, 300))
    packed = [f"data.root={folder / 'packed'}", "data.size=64", "data.shorter=72"]
    small = ["data.name=imagefolder", f"data.root={folder / 'small'}"]
    return {
        "imagenet": [*packed, "data.workers=2"],
        "generated": [*small, f"data.extra.path={folder / '1m.npz'}"],
    }


def reached(run: Path, step: int) -> bool:
    """Whether a run has begun, and has the last checkpoint before a step, or a later one."""
    if step < SAVED:
        return (run / "env.json").exists()
    saved = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*[0-9]")]
    return any(each > step - SAVED for each in saved)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=2, help="of each recipe")
    parser.add_argument("--seed", type=int, default=random.randrange(2**16))
    parser.add_argument("--only", help="this recipe, by the name of its file")
    parser.add_argument("--record", type=Path, help="write the table here, too")
    asked = parser.parse_args()
    dice, rows = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = prepare(folder)
        for path in sorted(path for kind in told for path in (CONFIGS / kind).glob("*.yaml")):
            if path.stem == "base" or asked.only not in (None, path.stem):
                continue
            arguments = (*SHORT, *told[path.parent.name], *SMALL[path.stem])
            whole, killed = folder / f"{path.stem}-whole", folder / f"{path.stem}-killed"
            began = time.monotonic()
            Job(path, whole, 2, arguments).finish()
            seconds, done = time.monotonic() - began, 0
            last = json.loads((whole / "env.json").read_text())["total_steps"]
            # Each kill later than the one before: some of them between two checkpoints.
            for step in sorted(dice.sample(range(last), asked.kills)):
                job = Job(path, killed, 2, arguments)
                job.wait_until(partial(reached, killed, step))
                time.sleep(dice.uniform(0, 0.2))
                if not job.running():
                    break
                job.kill()
                done += 1
            Job(path, killed, 2, arguments).finish()
            equal = weights_hash(whole) == weights_hash(killed)
            rows.append(f"| {path.parent.name}/{path.stem} | {seconds:.0f} | {done} | {equal} |")
            print(rows[-1], flush=True)
    head = ["| recipe | seconds | kills | equal weights |", "|---|---|---|---|"]
    if asked.record:
        asked.record.write_text("\n".join([*head, *rows, "", f"Seed {asked.seed}.", ""]))
    failed = sum("False" in row for row in rows)
    print(f"{len(rows)} recipes, {failed} with other weights; seed {asked.seed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
