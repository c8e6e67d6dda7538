"""Train every case with the framework, alone or under torchrun.

Arguments: out, norm, images, numbers (fp32, fp64 or bf16).
"""

import os
import sys
from pathlib import Path

import torch
from cases import CASES, config

from dist_adv.config import parse_config
from dist_adv.runner import train_run

if __name__ == "__main__":
    out, norm, images = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    numbers = sys.argv[4]
    if numbers == "fp64":
        torch.set_default_dtype(torch.float64)
    precision = "bf16" if numbers == "bf16" else "fp32"
    for case in CASES:
        train_run(parse_config(config(case, norm, images, precision), case), out / case, "none")
    sys.stdout.flush()
    os._exit(0)  # see cli.main
