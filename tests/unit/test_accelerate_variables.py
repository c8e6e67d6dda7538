"""Every variable that Accelerate reads is known here: used, refused, or harmless, and why.

Its sources are searched, so that an Accelerate with a new one fails until somebody has looked.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import accelerate
import pytest

from dist_adv.distributed import engines, launched
from dist_adv.errors import UserError

# Read by what dist_adv does not import (commands) or never calls.
NOT_OURS = {"commands", "test_utils", "launchers.py", "tracking.py", "launch.py", "big_modeling.py"}

LAUNCHER = {  # `launched.check`, or of MPI, which it refuses
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    *("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
DEEPSPEED = {  # `deepspeed.check_deepspeed` looks at what becomes of them; others name where or how
    *("ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
    *("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    *("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_CONFIG_DS_FIELDS"),
    *("ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
}
FSDP = {  # `engines._start_fsdp2` looks at what becomes of them; others say how it is split
    *("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"),
    *("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_BACKWARD_PREFETCH"),
    *("FSDP_AUTO_WRAP_POLICY", "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_MIN_NUM_PARAMS"),
    *("FSDP_USE_ORIG_PARAMS", "FSDP_SYNC_MODULE_STATES", "FSDP_FORWARD_PREFETCH"),
    *("FSDP_IGNORED_MODULES", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_STATE_DICT_TYPE"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
}
OVERRIDDEN = {"ACCELERATE_MIXED_PRECISION"}  # by train.precision, aloud
HARMLESS = {
    "ACCELERATE_LOG_LEVEL": "how much it says",
    "ACCELERATE_ENABLE_RICH": "in which colours",
    "ACCELERATE_BYPASS_DEVICE_MAP": "models split by transformers",
    "ACCELERATE_ALLOW_CP_STANDALONE": "with ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "with ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_DOWNCAST_BF16": "TPUs",
    "XLA_USE_BF16": "TPUs",
    "XLA_DOWNCAST_BF16": "TPUs",
    "USE_TORCH_XLA": "TPUs",
    "PT_HPU_LAZY_MODE": "Gaudi",
    "DEEPSPEED_USE_HPU": "Gaudi",
    "PYTORCH_ENABLE_MPS_FALLBACK": "Apple's GPUs",
    "FORK_LAUNCHED": "notebooks",
    "OMP_NUM_THREADS": "`start.threads_per_rank` sets the number of threads",
    "NCCL_P2P_DISABLE": "how bytes travel",
    "NCCL_IB_DISABLE": "how bytes travel",
    "systemdrive": "Windows",
}
# With the switch before them only, which is refused.
BEHIND = {
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM_",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "PARALLELISM_CONFIG_",
    "ACCELERATE_DYNAMO_BACKEND": "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_BACKEND": "ACCELERATE_FP8_",
}
READERS = {"get", "getenv", "parse_flag_from_env", "parse_choice_from_env", "get_int_from_env"}


def read_by(tree: ast.AST) -> Iterator[str]:
    """Names of variables in a source: literal, in a list, or joined to a prefix of a function."""
    prefixes = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]) if (
                name in READERS and (name != "get" or ast.unparse(node.func) == "os.environ.get")
            ):
                keys = first.elts if isinstance(first, ast.List) else [first]
            case ast.Subscript(value=value, slice=key) if ast.unparse(value) == "os.environ":
                keys = [key]
            case ast.Compare(left=key, comparators=[where]) if ast.unparse(where) == "os.environ":
                keys = [key]
            case _:
                continue
        for key in keys:
            match key:
                case ast.Constant(value=str(name)):
                    yield name
                case ast.BinOp(left=ast.Name(id=prefix), right=ast.Constant(value=str(name))) if (
                    isinstance(tree, ast.FunctionDef)
                ):
                    yield prefixes[prefix] + name


def all_read() -> set[str]:
    root = Path(accelerate.__file__).parent
    found: set[str] = set()
    for path in root.rglob("*.py"):
        if NOT_OURS.isdisjoint(path.relative_to(root).parts):
            tree = ast.parse(path.read_text())
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            for function in functions:
                found.update(read_by(function))
            found.update(read_by(tree))
    return found


def test_every_variable_is_known() -> None:
    found = all_read()
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "FSDP_VERSION", "RANK"} <= found
    known = LAUNCHER | DEEPSPEED | FSDP | OVERRIDDEN | HARMLESS.keys() | engines._VARIABLES.keys()
    assert BEHIND.keys() <= engines._VARIABLES.keys()
    behind = {name for name in found if name.startswith(tuple(BEHIND.values()))}
    assert found - known - behind == set()
    assert (LAUNCHER & found) >= set(launched._OF_MPI)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.batch_size is the whole batch"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "", "train.batch_size is the whole batch"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "set train.compile"),
        ("ACCELERATE_FP8_BACKEND", "MSAMP", "set train.precision"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", "CUDA_VISIBLE_DEVICES chooses GPUs"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "is no engine here"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "are not split here"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "start with torchrun"),
        ("ACCELERATE_USE_FSDP", "1", "write true or false"),
        ("ACCELERATE_USE_CPU", "perhaps", "write true or false"),
    ],
)
def test_refused(name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        engines.check_environment()
    assert str(caught.value).startswith(f"{name}: {value!r} in the environment is not for dist-adv")
    assert says in str(caught.value)
