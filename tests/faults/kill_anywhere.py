"""Kill training at random moments, resume it, and compare with the run that was never killed.

    python tests/faults/kill_anywhere.py --draws 60 --seed 0 --record FILE.md

Every draw takes a method, 1 or 2 ranks, and one to three kills: one rank or all with the launcher,
at a random moment from the first import to the last evaluation, or right inside the writing of a
checkpoint or of the final weights. The same command is then run until it ends. The SHA-256 of the
final weights must be that of the uninterrupted run. Everything is drawn from the seed but for what
the machine's own timing adds.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cases import CASES, make_images
from launch import SMALL, Job, weights_hash, write_config

# 120 images in batches of 33: a checkpoint every third step of 4 x replays an epoch, in mid-epoch.
TRAIN = {"epochs": 8, "save_steps": 3, "save_minutes": None, "log_every": 3}
PLACES = ("any moment", "in training", "inside a save", "inside the final save")


@dataclass
class Draw:
    """One run and what it suffered."""

    case: str
    ranks: int
    kills: list[str] = field(default_factory=list)
    starts: int = 1
    down: list[float] = field(default_factory=list)
    equal: bool = False


class Harness:
    """Uninterrupted runs, each made once, and runs that are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        make_images(self.images)
        self.hashes: dict[tuple[str, int], str] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.count = 0

    def config(self, case: str) -> Path:
        path = self.folder / f"{case}.yaml"
        if not path.exists():
            sections = {"train": TRAIN, "method": {"guard": "warn"}}
            if "model" not in CASES[case].sections:
                sections["model"] = SMALL
            write_config(path, case, self.images, **sections)
        return path

    def job(self, case: str, ranks: int, run_dir: Path) -> Job:
        return Job(self.config(case), run_dir, ranks)

    def uninterrupted(self, case: str, ranks: int) -> str:
        if (case, ranks) not in self.hashes:
            run_dir = self.folder / f"whole-{case}-{ranks}"
            began = time.monotonic()
            self.job(case, ranks, run_dir).finish()
            self.seconds[case, ranks] = time.monotonic() - began
            self.hashes[case, ranks] = weights_hash(run_dir)
        return self.hashes[case, ranks]

    def draw(self, dice: random.Random) -> Draw:
        draw = Draw(dice.choice(list(CASES)), dice.choice((1, 2)))
        expected = self.uninterrupted(draw.case, draw.ranks)
        self.count += 1
        run_dir = self.folder / f"killed-{self.count}"
        for _ in range(dice.choice((1, 1, 2, 3))):
            job = self.job(draw.case, draw.ranks, run_dir)
            place, moment = dice.choice(PLACES), dice.random()
            victim = dice.randrange(-1, draw.ranks)
            if not self._reach(job, run_dir, place, moment, self.seconds[draw.case, draw.ranks]):
                break  # it had ended before
            draw.kills.append(f"{place}, {'all' if victim < 0 else f'rank {victim}'}")
            draw.down.append(_kill(job, victim))
            draw.starts += 1
        job = self.job(draw.case, draw.ranks, run_dir)
        job.finish()
        draw.equal = weights_hash(run_dir) == expected
        return draw

    @staticmethod
    def _reach(job: Job, run_dir: Path, place: str, moment: float, seconds: float) -> bool:
        """Wait for the place; False where the job has ended before."""
        checkpoints = run_dir / "checkpoints"
        match place:
            case "any moment":
                end = time.monotonic() + moment * seconds
                return not job.wait_until(lambda: time.monotonic() > end) or job.running()
            case "in training":
                before = len(_steps(checkpoints))
                job.wait_until(lambda: len(_steps(checkpoints)) > before)
                time.sleep(moment * 1.0)
            case "inside a save":
                nth = 1 + int(moment * 10)
                for _ in range(nth):
                    job.wait_until(lambda: any(checkpoints.glob(".partial-*")))
                    if nth > 1:
                        job.wait_until(lambda: not any(checkpoints.glob(".partial-*")))
                job.wait_until(lambda: any(checkpoints.glob(".partial-*")))
                time.sleep(moment * 0.005)
            case "inside the final save":
                names = (".partial-model.safetensors", "model.safetensors")
                job.wait_until(lambda: any((run_dir / name).exists() for name in names))
        return job.running()


def _steps(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob("step-*"))


def _kill(job: Job, victim: int) -> float:
    """SIGKILL to one rank, or to everything (-1); the seconds until all of it is gone."""
    began = time.monotonic()
    pids = job.ranks()
    if victim < 0 or victim not in pids:
        job.kill()
    else:
        os.kill(pids[victim], signal.SIGKILL)
        job.wait(60)
    return time.monotonic() - began


def run(
    draws: int, seed: int, folder: Path, note: Callable[[list[Draw]], None] | None = None
) -> list[Draw]:
    """All draws, said aloud one by one."""
    print(f"seed {seed}, {draws} draws", flush=True)
    dice, harness, done = random.Random(seed), Harness(folder), []
    for number in range(1, draws + 1):
        draw = harness.draw(dice)
        done.append(draw)
        if note:
            note(done)
        print(
            f"{number:3d} {'equal' if draw.equal else 'DIFFERENT'}  {draw.case}, {draw.ranks} "
            f"rank(s): {'; '.join(draw.kills) or 'ended before it was killed'}",
            flush=True,
        )
    return done


def record(done: list[Draw], draws: int, seed: int, minutes: float) -> str:
    """The Markdown record of a harness run."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    killed = [draw for draw in done if draw.kills]
    one = [s for d in done for s, kill in zip(d.down, d.kills, strict=True) if "all" not in kill]
    rows = [
        f"| {number} | {draw.case} | {draw.ranks} | {'; '.join(draw.kills) or '-'} | "
        f"{'equal' if draw.equal else 'DIFFERENT'} |"
        for number, draw in enumerate(done, start=1)
    ]
    return "\n".join(
        [
            "# Training killed at random moments and resumed",
            "",
            f"`make faults` (`python tests/faults/kill_anywhere.py --draws {draws} "
            f"--seed {seed}`), {datetime.now(UTC):%Y-%m-%d}, commit {commit}, "
            f"{os.cpu_count()} CPU cores ({platform.machine()}), {minutes:.0f} minutes.",
            "",
            f"**{sum(draw.equal for draw in done)} of {len(done)}** runs ended with the weights "
            f"(SHA-256) of the run that was never killed; {sum(len(d.kills) for d in done)} kills "
            f"in {len(killed)} runs. Where one rank was killed the whole job was down after "
            + (f"{sum(one) / len(one):.1f} s on average, {max(one):.1f} at most." if one else "-"),
            "",
            "| draw | method | ranks | kills | final weights |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    began = time.monotonic()

    def note(done: list[Draw]) -> None:
        """After every draw: a record of what was seen so far, whatever becomes of the rest."""
        if options.record:
            minutes = (time.monotonic() - began) / 60
            options.record.write_text(record(done, options.draws, options.seed, minutes))

    with tempfile.TemporaryDirectory() as folder:
        done = run(options.draws, options.seed, Path(folder), note)
    equal = sum(draw.equal for draw in done)
    print(f"{equal} of {len(done)} equal")
    return 0 if equal == len(done) else 1


if __name__ == "__main__":
    os.environ["REAL_PROCESSES"] = "1"  # to be killed while they import torch, too
    sys.exit(main())
