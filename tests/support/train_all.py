"""Train every case with the framework, alone or under torchrun.

Arguments: out, norm, images, numbers (fp32, fp64 or bf16; with `-` how to compile the cases that
are for it, `-few` for one of them, or `small` for the small network of `cases.config`); then, to
go on from what an earlier call left, its `out` and which checkpoint (0 is the first; there is one
a batch, where tests/resume goes on).
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from cases import AT_THREE, AUTOTUNED, CASES, COMPILED, LARGE, MIXED, SHARED, config
from dist_adv.config import parse_config
from dist_adv.training.run import train_run

if __name__ == "__main__":
    out, norm, images = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    numbers, _, kind = sys.argv[4].partition("-")
    kind, _, few = kind.partition("-")
    small, compile = kind == "small", kind.replace("small", "") or "none"
    if numbers == "fp64":
        torch.set_default_dtype(torch.float64)
    precision = "bf16" if numbers == "bf16" else "fp32"
    # Whatever tests/resume goes on from, or has gone on from.
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    resumable = ranks in (2, 3) or len(sys.argv) > 5
    chosen = CASES if ranks == 1 and len(sys.argv) == 5 else SHARED
    if ranks == 3:
        chosen = AT_THREE
    elif few:
        chosen = LARGE
    elif compile == "max":
        chosen = AUTOTUNED
    elif compile == "default":
        chosen = MIXED if precision == "bf16" else COMPILED
    for case in chosen:
        tree = config(case, norm, images, precision, compile, small)
        if resumable:
            tree["train"] |= {"save_steps": 1, "keep": 100}
        resume = "none"
        if len(sys.argv) > 5:
            checkpoints = sorted((Path(sys.argv[5]) / case / "checkpoints").iterdir())
            resume = str(checkpoints[int(sys.argv[6])])
        train_run(parse_config(tree, case), out / case, resume)
        AcceleratorState._reset_state()  # DeepSpeed is for one model a process otherwise
    sys.stdout.flush()
    os._exit(0)  # see cli.main
