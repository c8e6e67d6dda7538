"""Train what a YAML file says in the folder beside it, then say what this process was started as.

Arguments: the file, the run folder.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import PartialState

from dist_adv.config import load_config
from dist_adv.training.run import train_run

if __name__ == "__main__":
    train_run(load_config(Path(sys.argv[1])), Path(sys.argv[2]), "none")
    state = PartialState()
    backend = dist.get_backend() if dist.is_initialized() else None
    print(json.dumps({"backend": backend, "device": state.device.type, "n": state.num_processes}))
