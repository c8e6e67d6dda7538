"""What an engine refuses, in one line, before anything is trained."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from dist_adv.config import parse_config
from dist_adv.distributed import deepspeed, engines
from dist_adv.distributed.accelerator import EngineAccelerator
from dist_adv.distributed.start import as_it_was
from dist_adv.errors import UserError
from engine_runs import allow_double_precision


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_process_without_launcher_is_told(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=f"{variable} is set, but no launcher"):
        engines.start_engine(cpu=True, precision="fp32")


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_fp16_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"train\.precision: fp16"):
        engines.start_engine(cpu=False, precision="fp16")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_stage: 1, 2 or 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"bf16": {"enabled": True}}, "fp16, bf16"),
        ({"fp16": {"enabled": True}}, "fp16, bf16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer, scheduler"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"compression_training": {}}, "compression_training"),
    ],
)
def test_deepspeed_settings_that_make_another_experiment_are_refused(settings, key):
    whole = {"zero_optimization": {"stage": 2}} | settings
    whole["zero_optimization"] = {"stage": 2} | whole["zero_optimization"]
    with pytest.raises(UserError, match=f"DeepSpeed's configuration: {key}"):
        deepspeed.check_deepspeed(whole)


def test_deepspeed_settings_of_accelerate_are_accepted():
    """`auto` is its word for what it was not told."""
    device = {"device": "none", "nvme_path": None}
    zero = {"stage": 2, "offload_optimizer": device, "offload_param": device}
    auto = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    deepspeed.check_deepspeed({"zero_optimization": zero, **auto})


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 1"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE", "Invalid auto wrap policy"),
    ],
)
def test_fsdp_settings_that_are_not_tried_are_refused(variable, value, key, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"FSDP's configuration: .*{key}"):
        engines.start_engine(cpu=True, precision="fp32")


KINDS = {"DDP": DistributedType.MULTI_GPU, "FSDP2": DistributedType.FSDP}
PARTS = ("ZeRO-3", "FSDP2")
ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
OTHERS = (*ZERO, "FSDP2")


@pytest.mark.parametrize("engine", ["DDP", *OTHERS])
@pytest.mark.parametrize(
    ("wanted", "told", "refusing"),
    [
        ({"train": {"compile": "default"}}, "train.compile: .*; use none", OTHERS),
        ({"awp": {"gamma": 0.01}}, "awp: .*; use null", OTHERS),
        ({"method": {"name": "gradalign"}}, "method.name: .*; use another", OTHERS),
        ({"method": {"name": "consistency"}}, "method.name: .*; use another", ZERO),
        ({"average": {"epochs": 1}}, "average: .*; use null", PARTS),
        ({"method": {"name": "trades"}}, "", ()),
        ({"optim": {"name": "adamw", "decay_norms": False, "clip": 1.0}}, "", ()),
        ({"train": {"label_smoothing": 0.1}, "threat": {"warmup": 1.0}}, "", ()),
    ],
)
def test_what_an_engine_cannot_do_is_refused(wanted, told, refusing, engine):
    stage = SimpleNamespace(zero_stage=int(engine[-1])) if engine.startswith("ZeRO") else None
    accelerator: Any = SimpleNamespace(
        distributed_type=KINDS.get(engine, DistributedType.DEEPSPEED),
        state=SimpleNamespace(deepspeed_plugin=stage),
    )
    config = parse_config({"method": {"name": "fast"}} | wanted, "here")
    if engine in refusing:
        with pytest.raises(UserError, match=f"{told}, or launch without .*{engine}"):
            engines.prepare(accelerator, torch.nn.Linear(1, 1), config)
    else:
        engines.check_engine(accelerator, config)


def test_a_gradient_of_a_gradient_is_not_compiled():
    tree = {"method": {"name": "gradalign"}, "train": {"compile": "default"}}
    with pytest.raises(UserError, match=r"^here: train\.compile: gradalign .*; use none$"):
        parse_config(tree, "here")


@pytest.mark.parametrize(("precision", "found"), [("bf16", torch.bfloat16), ("fp32", torch.float)])
def test_an_average_computes_in_the_precision_of_its_network(precision, found):
    """`net.averaged` is beside the network that the engine has prepared."""
    with as_it_was(), EngineAccelerator(precision, cpu=True).autocast():
        assert torch.nn.Linear(1, 1)(torch.ones(1, 1)).dtype == found


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dist-adv\[deepspeed\]"):
        engines.start_engine(cpu=True, precision="fp32")


@pytest.mark.parametrize("instructions", [True, False])
def test_the_tests_double_precision_is_had_on_any_cpu(instructions, monkeypatch):
    """With fp16 instructions or without: `zero.Init` chooses by them."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partition_parameters

    init = partition_parameters.InsertPostInitMethodToModuleSubClasses
    monkeypatch.setattr(init, "_set_dtype", init._set_dtype)  # put back afterwards
    allow_double_precision()
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: instructions)
    assert init(enabled=False, dtype=torch.float64).dtype != torch.float64
