"""`train.compile: graphs`: what passes return holds as long as it is needed, and refusals.

Nothing is recorded here: `replays.Replays` stands in for CUDA graphs and overwrites what a replay
would. That recording works, and that nothing is skipped, is for tests/gpu.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_utils
from torch._inductor.cudagraph_trees import MarkStepBox

from cases import CASES, config
from dist_adv.config import parse_config
from dist_adv.data import load_dataset
from dist_adv.distributed import graphs
from dist_adv.distributed.network import compile_network
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import RunFailure, UserError
from dist_adv.methods.registry import find_method
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.run import train_run
from replays import Replays

# All but the one that differentiates a gradient, which is refused, and other networks.
METHODS = [
    name
    for name, case in CASES.items()
    if "model" not in case.sections
    and "double backward" not in find_method(case.method["name"]).needs
]

CHECK = graphs.check_graphs


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice is not refused, as on a GPU; and torch is left as it was."""
    torch.compiler.reset()
    monkeypatch.setattr(graphs, "check_graphs", lambda *_: None)
    monkeypatch.setattr(MarkStepBox, "mark_step_counter", 0)
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    with dynamo.patch(optimize_ddp=True), functorch.patch(donated_buffer=True):
        yield
    torch.compiler.reset()


def learnt(tree: dict, replays: Replays, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights after two epochs (of two batches each), and the sums of the meter."""
    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda model, **_: replays.compile(model))
    settings = parse_config(tree, "test")
    data = load_dataset(settings.data, "train", as_files=settings.resizes)
    learner = Learner(settings, start_accelerator("fp32", 1), data)
    meter = Meter(torch.device("cpu"))
    for epoch in range(settings.train.epochs):
        learner.enter(epoch)
        for batch in learner.loader.epoch(epoch):
            learner.learn(batch, meter)
    learner.check_updates()
    learner.update_copy()
    return learner.copy.state_dict() | {"meter": meter.sums}


def tree(case: str, images: Path) -> dict:
    made = config(case, "batch", images)
    made["model"] = {"name": "made_up_method:Tiny"}
    made["train"] |= {"compile": "graphs"}
    if case != "stages":
        made["train"] |= {"batch_size": 48}  # and a short batch of 24
    return made


@pytest.mark.parametrize("case", METHODS)
def test_no_result_is_read_after_a_replay_has_overwritten_it(case, images, monkeypatch):
    plain, overwriting = Replays(overwriting=False), Replays()
    expected = learnt(tree(case, images), plain, monkeypatch)
    seen = learnt(tree(case, images), overwriting, monkeypatch)
    assert overwriting.calls == plain.calls > 8
    assert {name for name, each in seen.items() if not torch.equal(each, expected[name])} == set()


def in_parts(case: str, images: Path) -> dict:
    made = tree(case, images)
    made["train"] |= {"accumulate": 2}
    return made


def test_gradients_of_a_part_hold_until_all_parts_are_through(images, monkeypatch):
    expected = learnt(in_parts("pgd-random", images), Replays(overwriting=False), monkeypatch)
    seen = learnt(in_parts("pgd-random", images), Replays(), monkeypatch)
    assert all(torch.equal(each, expected[name]) for name, each in seen.items())


@pytest.mark.parametrize(
    ("made", "case"), [(tree, "gat"), (tree, "random"), (tree, "aaer"), (in_parts, "pgd-random")]
)
def test_without_marks_they_would_not_hold(made, case, images, monkeypatch):
    monkeypatch.setattr(graphs, "begin_batch", lambda _: None)
    with pytest.raises(RunFailure, match="not finite"):
        learnt(made(case, images), Replays(), monkeypatch)


@pytest.mark.parametrize("cloned", [False, True])
def test_what_a_method_keeps_from_batch_to_batch_it_has_to_clone(cloned, images, monkeypatch):
    made = tree("natural", images) | {"method": {"name": "replays:Keeping", "cloned": cloned}}
    replays = Replays()
    if cloned:
        learnt(made, replays, monkeypatch)
    else:
        with pytest.raises(RunFailure, match=r"not finite at optimiser step 2 "):
            learnt(made, replays, monkeypatch)


@pytest.mark.parametrize(
    ("choice", "mode"),
    [("default", None), ("graphs", "reduce-overhead"), ("max", "max-autotune")],
)
def test_choices_are_modes_of_torch_which_cuts_nothing_for_ddp(choice, mode, monkeypatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **how: asked.append(how))
    compile_network(nn.Linear(1, 1), choice, keep_graph=False)
    assert asked == [{"dynamic": False, "mode": mode}]
    assert not torch._dynamo.config.optimize_ddp


def test_skipped_passes_are_said_once_in_a_line_with_the_reason(images, monkeypatch, said, capfd):
    """torch's own function tells of it, as where it records."""
    monkeypatch.setattr(nn.Module, "compile", lambda _, **how: None)
    settings = parse_config(tree("natural", images), "test")
    learner = Learner(settings, start_accelerator("fp32", 1), load_dataset(settings.data, "train"))
    assert learner.skipped_graphs is None  # on a CPU nothing is recorded
    another, learner.skipped_graphs = graphs.SkippedGraphs(), graphs.SkippedGraphs()
    learner.check_graphs()
    assert said.messages == []
    why = "skipping cudagraphs due to mutated inputs (2 instances). Found from : \n File x, line 3"
    for _ in range(2):
        cudagraph_utils.log_cudagraph_skip_and_bump_counter(why)
    learner.check_graphs()
    learner.check_graphs()
    assert said.messages == [
        "train.compile: 2 pass(es) of the network are not replayed as CUDA graphs (mutated inputs "
        "(2 instances))"
    ]
    assert "skipping" not in capfd.readouterr().err
    assert another.news().startswith("2 pass(es) of the network")


def test_reasons_that_torch_does_not_log_are_counted(images):
    skipped = graphs.SkippedGraphs()
    counters["inductor"]["cudagraph_skips"] += 1
    assert "1 pass(es)" in (news := skipped.news())
    assert "TORCH_LOGS=cudagraphs" in news
    assert skipped.news() == ""


def test_a_run_looks_for_skipped_passes_with_each_line_of_metrics(images, monkeypatch, tmp_path):
    looked: list[int] = []
    monkeypatch.setattr(Learner, "check_graphs", lambda each: looked.append(each.clock.step))
    made = tree("natural", images)
    made["train"] |= {"compile": "none", "log_every": 2}
    train_run(parse_config(made, "test"), tmp_path / "run", "none")
    assert looked == [2, 3, 5, 6]  # epochs of three batches


@pytest.mark.parametrize("cpu", [True, False])
def test_graphs_are_for_gpus(cpu):
    if cpu:
        with pytest.raises(UserError, match=r"^train\.compile: graphs are .* CPU; use default$"):
            CHECK("graphs", cpu)
    else:
        CHECK("graphs", cpu)
    for choice in ("none", "default", "max"):
        CHECK(choice, cpu)


def test_a_run_on_a_cpu_is_refused_before_anything_is_written(images, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "check_graphs", CHECK)
    with pytest.raises(UserError, match=r"train\.compile: graphs"):
        train_run(parse_config(tree("natural", images), "test"), tmp_path / "run", "none")
    assert not (tmp_path / "run").exists()
