"""DeepSpeed's ZeRO and FSDP2 give the weights of DDP, started as a user starts them.

Two real ranks, the real files of `launch/accelerate/`, and as the judge the same runs under DDP. In
double precision, where a real difference cannot hide behind one ulp that turns a sign; DeepSpeed
keeps its own copy of weights and momentum in single precision even so, hence the two tolerances.
Under DDP, too, no weights have their channels last: sums would be in another order.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dist_adv.runs.export import export_run
from launch import train_under

pytestmark = [pytest.mark.slow, pytest.mark.shares("engine")]

TOLERANCE = {
    "deepspeed-zero1.yaml": 2e-6,
    "deepspeed-zero2.yaml": 2e-6,
    "deepspeed-zero3.yaml": 2e-6,
    "fsdp2.yaml": 1e-10,
}
MIDDLE = Path("checkpoints") / "step-000000009"  # of Free: the third batch of eight
COUNTED = ("natural", "pgd-random")  # a step each: torch's profiler takes seconds a run
# What differs for an engine: passes that give no weights gradients, a graph used several times, a
# perturbation that is carried on. Where an attack starts is nothing that it sees.
METHODS = ("natural", "pgd-random", "free", "fast-previous")
RUNS: list[dict[str, Any]] = [
    *({"name": case, "case": case} for case in METHODS),
    {"name": "mixed", "case": "fast-previous", "numbers": "bf16", "train": {"epochs": 1}},
    {"name": "skips", "case": "natural", "norm": "batch", "train": {"on_nan": "skip"}},
    {"name": "shard", "case": "natural", "train": {"on_nan": "skip"}, "fault": "channel:1:3:5"},
    {"name": "stops", "case": "natural", "train": {"log_every": 1}},
]
for run in RUNS:
    if run["name"] in ("skips", "stops"):
        run["fault"] = "nan:1:3:5"  # the loss of rank 1, at two steps
RUNS += [
    {"name": f"count-{case}", "case": case, "count": True, "train": {"max_steps": 1}}
    for case in COUNTED
]


def difference(one: Path, two: Path) -> float:
    """Of the files: load_model gives single precision."""
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    return max((expected[name].double() - found[name]).abs().max().item() for name in expected)


@pytest.fixture(scope="module")
def ddp(once: Callable[[str, Callable], Path], images: Path) -> Path:
    return once("ddp", lambda out: train_under(out, images, RUNS))


@pytest.fixture(scope="module", params=TOLERANCE)
def engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    images: Path,
    ddp: Path,
) -> tuple[Path, float]:
    """The folder of an engine's runs, two of which go on from checkpoints; its tolerance."""
    out = tmp_path_factory.mktemp(request.param)
    begun = {"name": "free-2", "case": "free", "start": str(out / "free" / MIDDLE)}
    from_ddp = {"name": "from-ddp", "case": "free", "start": str(ddp / "free" / MIDDLE)}
    with pytest.MonkeyPatch.context() as patch:
        if "zero1" in request.param:  # once as accelerate starts ranks, which are forked otherwise
            patch.setenv("REAL_PROCESSES", "1")
        train_under(out, images, [*RUNS, begun, from_ddp], request.param)
    return out, TOLERANCE[request.param]


@pytest.mark.parametrize("name", [*METHODS, "skips", "shard"])
def test_weights_are_those_of_ddp(name, engine, ddp):
    """`skips`: two updates of eight were NaN on one rank and were taken on none.

    `shard`: in gradients of one channel only, which the engine gives to one rank.
    """
    out, tolerance = engine
    assert difference(ddp / name, out / name) < tolerance


def test_attacks_reduce_nothing(engine):
    """As many reductions, of whatever kind, with three passes of an attack a step as without."""
    out, _ = engine
    natural, pgd = (json.loads((out / f"count-{name}.json").read_text()) for name in COUNTED)
    reductions = {key for key in natural | pgd if key.startswith("c10d::") and "reduce" in key}
    assert reductions
    assert {key: natural[key] for key in reductions} == {key: pgd[key] for key in reductions}


def test_bf16_is_that_of_ddp(engine, ddp):
    out, _ = engine
    assert difference(ddp / "mixed", out / "mixed") < 1e-6
    assert difference(ddp / "mixed", ddp / "fast-previous") > 1e-4  # it is another experiment


def test_no_update_is_taken_from_nan(engine):
    out, _ = engine
    told = "the loss of rank 1 was not finite at optimiser step 3 (epoch 1, batch 3)"
    assert told in (out / "stops.failed").read_text()
    assert not list((out / "stops").rglob("*.safetensors"))


def test_a_run_goes_on_bit_for_bit(engine):
    """From the middle of an epoch, Free's perturbation of each rank included."""
    out, _ = engine
    assert difference(out / "free", out / "free-2") == 0


def test_a_run_changes_engines(engine, ddp, images, tmp_path):
    """Begun under DDP and ended under the engine; or ended under DDP on one rank.

    What the latter reads is written alike by all: one of them is enough.
    """
    out, tolerance = engine
    assert difference(ddp / "free", out / "from-ddp") < tolerance
    if "zero2" in out.name:
        late = str(out / "from-ddp" / "checkpoints" / "step-000000018")
        train_under(tmp_path, images, [{"name": "back", "case": "free", "start": late}], ranks=1)
        assert difference(ddp / "free", tmp_path / "back") < tolerance


def test_export_is_the_same(engine, ddp, tmp_path):
    out, tolerance = engine
    export_run(out / "free", tmp_path / "ours")
    export_run(ddp / "free", tmp_path / "ddp")
    assert difference(tmp_path / "ours", tmp_path / "ddp") < tolerance
    ours, theirs = (tmp_path / who / "config.json" for who in ("ours", "ddp"))
    assert ours.read_text() == theirs.read_text()
