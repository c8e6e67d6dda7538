"""Train every case with the framework, alone or under torchrun. Arguments: out, norm, images."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, config

from dist_adv.config import parse_config
from dist_adv.runner import train_run

if __name__ == "__main__":
    out, norm, images = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    for case in CASES:
        train_run(parse_config(config(case, norm, images), case), out / case, "none")
    sys.stdout.flush()
    os._exit(0)  # see cli.main
