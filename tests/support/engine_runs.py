"""Train what a JSON list asks for, one after the other, under whatever launcher started this.

Arguments: out, images, the list. A run has a name and a case of `cases.py`; perhaps `norm`,
`numbers` (fp64, fp32 or bf16), `train` (keys of that section), `start` (a checkpoint), `frozen`
(the first layer is not trained), `fault` (see `faulty.py`), `count` (NAME.json then has how often
torch did what). What fails leaves NAME.failed.
"""

import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from cases import CASES, config
from dist_adv.config import parse_config
from dist_adv.distributed import deepspeed, fsdp2
from dist_adv.errors import RunFailure, UserError
from dist_adv.training import learner, trainer
from dist_adv.training.run import train_run
from faulty import Faulty

build_method, build_model = learner.build_method, learner.build_model
check = deepspeed.check_deepspeed


def channels_not_last(*arguments: object, **options: object) -> torch.nn.Module:
    """As the other engines have it, whose sums are in another order than with channels last."""
    return build_model(*arguments, **options).to(memory_format=torch.contiguous_format)


def first_layer_stays(*arguments: object, **options: object) -> torch.nn.Module:
    model = channels_not_last(*arguments, **options)
    next(model.parameters()).requires_grad_(False)
    return model


def share_out_everything(settings: dict) -> None:
    """Stage 3 leaves parameters of less than 100,000 elements whole, which all are here."""
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["sub_group_size"] = 4_000
        allow_double_precision()
    check(settings)


def allow_double_precision() -> None:
    """Keep DeepSpeed's `zero.Init` from refusing float64 weights, which only these tests have.

    DeepSpeed 0.19.8, runtime/zero/partition_parameters.py:409, `dtype or torch.float16 if
    is_fp16_supported() else ...`, is read as `(dtype or torch.float16) if ...`: on a CPU with fp16
    instructions it takes the float64 that it was given and fails its own assertion, on any other
    CPU bfloat16, whatever it was given. Neither is used for a network that exists already.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    set_dtype = InsertPostInitMethodToModuleSubClasses._set_dtype

    def set_another(init: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        set_dtype(init, ds_config, None if dtype == torch.float64 else dtype)

    InsertPostInitMethodToModuleSubClasses._set_dtype = set_another


class Checked(learner.Learner):
    """Sees that no rank holds whole weights where the engine says so."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        weights = list(self.net.bare.parameters())
        if isinstance(self.net, fsdp2.ShardedNet):
            assert all(isinstance(weight, DTensor) for weight in weights)
        elif (
            isinstance(self.net, deepspeed.ZeroNet)
            and self.net.prepared.zero_optimization_stage() == 3
        ):
            assert all(weight.numel() == 0 for weight in weights)


def once(run: dict, out: Path, images: Path) -> None:
    numbers = run.get("numbers", "fp64")
    torch.set_default_dtype(torch.float64 if numbers == "fp64" else torch.float32)
    learner.build_method = build_method
    learner.build_model = first_layer_stays if "frozen" in run else channels_not_last
    if "fault" in run:
        os.environ["FAULT"] = run["fault"]
        learner.build_method = Faulty
    precision = "bf16" if numbers == "bf16" else "fp32"
    tree = config(run["case"], run.get("norm", "group"), images, precision, small=True)
    every = 3 * CASES[run["case"]][0].get("replays", 1)  # the first: in the middle of an epoch
    tree["train"] |= {"save_steps": every, "keep": 100} | run.get("train", {})
    with profile(activities=[ProfilerActivity.CPU]) if "count" in run else nullcontext() as seen:
        try:
            train_run(parse_config(tree, run["name"]), out / run["name"], run.get("start", "none"))
        except (RunFailure, UserError) as failure:
            (out / f"{run['name']}.failed").write_text(str(failure))
    if seen and os.environ["RANK"] == "0":
        # Not key_averages, which takes ten seconds for the tree of ZeRO-3's events.
        counts = Counter(event.name() for event in seen.profiler.kineto_results.events())
        (out / f"{run['name']}.json").write_text(json.dumps(counts))
    AcceleratorState._reset_state()  # DeepSpeed is for one model a process otherwise


if __name__ == "__main__":
    deepspeed.check_deepspeed = share_out_everything
    trainer.Learner = Checked
    for run in json.loads(sys.argv[3]):
        once(run, Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # see cli.main
