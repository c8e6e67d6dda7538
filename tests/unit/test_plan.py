"""What N GPUs would take, against closed forms."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dist_adv.config import Config, parse_config
from dist_adv.errors import UserError
from dist_adv.methods.cost import Cost
from dist_adv.models import build_model
from dist_adv.plan.command import LINKS
from dist_adv.plan.measure import Images, blank_network, cost, gradient_buckets
from dist_adv.plan.model import Cluster, Link, StepTime, Work, buckets, exposed, predict, sent
from dist_adv.plan.record import plan_record, read_step_times

MB = 10**6
CIFAR = Images(50_000, 3, (32, 32), 10)


def config(method: dict, model: dict | None = None, **train: object) -> Config:
    model = {"name": "preact_resnet18", "width": 4} | (model or {})
    return parse_config({"method": method, "model": model, "train": train}, "test")


def attacked(passes: float) -> Cost:
    """Of a step with so many passes of an attack."""
    return Cost(1, 3 + 2 * passes, 2)


def work(attack_passes: float = 1, **changes: object) -> Work:
    """128 images a batch, 12,800 in all; a training forward takes 1 ms and 0.01 ms an image."""
    units = 1e-3 * (3 + 2 * attack_passes)
    step = StepTime(units, units / 100, attacked(attack_passes))
    usual = Work(step, [10 * MB, 10 * MB, 2 * MB], 128, 3, 1, 0.2, lambda batch, _: 12_800 // batch)
    return replace(usual, **changes)


# The all-reduce.


def test_one_rank_sends_nothing():
    assert sent(MB, 1) == 0
    assert Link(1.0, 1.0).ring(MB, 1) == 0


@pytest.mark.parametrize(("ranks", "megabytes"), [(2, 1), (4, 1.5), (8, 1.75)])
def test_ring(ranks: int, megabytes: float):
    """2 (N - 1) / N of the bytes; 2 (N - 1) messages."""
    assert sent(MB, ranks) == megabytes * MB
    seconds = Link(1e9, 1e-6).ring(MB, ranks)
    assert seconds == pytest.approx(megabytes * 1e-3 + 2 * (ranks - 1) * 1e-6)


@pytest.mark.parametrize("gpus", [8, 16, 64, 512])
def test_nodes_as_fast_as_their_gpus_together_are_one_ring(gpus: int):
    link = Link(10e9)
    nodes = Cluster(link, 8, Link(80e9))
    assert nodes.all_reduce(MB, gpus) == pytest.approx(link.ring(MB, gpus))


def test_a_slow_network_is_what_counts_between_nodes():
    cluster = Cluster(Link(math.inf), 8, Link(1e9, 1e-6))
    assert cluster.all_reduce(MB, 8) == 0
    assert cluster.all_reduce(MB, 32) == Link(1e9, 1e-6).ring(MB, 4)
    with pytest.raises(UserError, match=r"--gpus: 12 does not fill nodes of 8"):
        cluster.all_reduce(MB, 12)


# The buckets, and what they hide behind.


def test_buckets_are_full_at_1_and_25_mebibytes():
    assert buckets([2**20]) == [2**20]
    assert buckets([2**19] * 3) == [2**20, 2**19]
    assert buckets([2**20, 20 * 2**20, 4 * 2**20, 5 * 2**20, 7]) == [2**20, 29 * 2**20, 7]


def test_nothing_is_hidden_without_a_backward_pass():
    assert exposed([3, 1], 0.0, lambda size: size) == 4


def test_one_bucket_is_never_hidden():
    assert exposed([3], 100.0, lambda size: size) == 3


def test_a_long_backward_pass_hides_all_but_the_last_bucket():
    assert exposed([50, 30, 20], 1000.0, lambda size: size) == pytest.approx(20)


def test_a_slow_network_is_busy_from_the_first_bucket_on():
    """Ready after half of the backward pass; from there on everything follows everything."""
    assert exposed([50, 30, 20], 10.0, lambda size: size) == pytest.approx(5 + 100 - 10)


# Step times.


def test_the_line_through_two_batch_sizes():
    step = StepTime.fit({32: 0.010, 128: 0.028}, 1)
    assert step.fixed == pytest.approx(0.004)
    assert step.per_image == pytest.approx(0.018 / 96)
    assert step.seconds(64) == pytest.approx(0.016)


@pytest.mark.parametrize("points", [{128: 0.032}, {64: 0.010, 128: 0.0375}])
def test_no_floor_below_zero(points: dict[int, float]):
    """Of one batch size, and of times that noise has tilted."""
    step = StepTime.fit(points, attacked(1))
    assert step.fixed == 0
    squares = sum(size**2 for size in points)
    assert step.per_image == pytest.approx(sum(b * t for b, t in points.items()) / squares)


@pytest.mark.parametrize(("attack_passes", "share"), [(0, 2 / 3), (1, 2 / 5), (7, 2 / 17)])
def test_the_share_of_the_step_in_which_gradients_travel(attack_passes: int, share: float):
    assert StepTime(0, 1, attacked(attack_passes)).backward_share == pytest.approx(share)


def test_a_step_with_more_passes_is_longer_by_them():
    """A training pass counts 3, an attack's 2: natural 3, Fast 5, PGD-7 17."""
    natural, fast = StepTime(3, 6, attacked(0)), StepTime(5, 10, attacked(1))
    for step in (
        natural.at_cost(attacked(1)),
        natural.at_cost(attacked(7)).at_cost(attacked(1)),
    ):
        assert (step.fixed, step.per_image) == pytest.approx((fast.fixed, fast.per_image))
        assert step.cost == attacked(1)


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ({"name": "natural"}, attacked(0)),
        ({"name": "fast"}, attacked(1)),
        ({"name": "fast", "init": "previous"}, attacked(1)),
        ({"name": "pgd", "steps": 7}, attacked(7)),
        ({"name": "free", "replays": 8}, Cost(8, 3, 2)),
        ({"name": "n-fgsm"}, attacked(1)),
        # A clean forward, ten passes of the attack, two forwards and two backwards in training.
        ({"name": "trades", "steps": 10}, Cost(1, 1 + 20 + 6, 4)),
    ],
)
def test_passes_are_counted(method: dict, passes: Cost):
    assert cost(config(method)) == passes


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ({"name": "pgd", "steps": 7}, replace(attacked(7), passes=14 + 3 + 3)),
        ({"name": "free", "replays": 8}, Cost(8, 3 + 3, 2)),
        ({"name": "trades", "steps": 10}, Cost(1, 1 + 20 + 6 + 6, 4)),
    ],
)
def test_weight_perturbation_costs_the_training_pass_again(method: dict, passes: Cost):
    tree = {"method": method, "awp": {}, "model": {"name": "preact_resnet18"}}
    assert cost(parse_config(tree, "test")) == passes


# The whole.


def test_a_perfect_network_and_no_floor_scale_perfectly():
    ideal = work(step=StepTime(0.0, 1e-4, attacked(1)))
    for gpus in (1, 2, 8, 64):
        row = predict(ideal, Cluster(Link(math.inf)), gpus)
        assert row.efficiency == pytest.approx(1)
        assert row.run_s == pytest.approx(3 * 12_800 * 1e-4 / gpus)
        assert row.gpu_hours == pytest.approx(3 * 12_800 * 1e-4 / 3600)


def test_the_floor_alone_bounds_the_speed():
    """A step is never shorter than its fixed part, whatever the network."""
    row = predict(work(), Cluster(Link(math.inf)), 128)
    assert row.step_s == pytest.approx(0.005 * (1 + 1 / 100))
    assert row.efficiency == pytest.approx((1 + 1.28) / (1 + 0.01) / 128)


def test_efficiency_falls_and_cost_grows_with_the_gpus():
    rows = [predict(work(), Cluster(LINKS["pcie3"]), n) for n in (1, 2, 4, 8, 16, 32)]
    efficiencies = [row.efficiency for row in rows]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert len(set(efficiencies)) == 6
    costs = [row.gpu_hours for row in rows]
    assert costs == sorted(costs)


def test_pgd_dilutes_the_communication_that_fast_has_too():
    """The same training pass hides the same; what is left is a smaller part of a longer step."""
    cluster = Cluster(Link(1e9))
    natural, fast, pgd = (predict(work(passes), cluster, 8) for passes in (0, 1, 7))
    assert fast.exposed_s == pytest.approx(pgd.exposed_s)
    assert fast.sent_per_epoch == pgd.sent_per_epoch == natural.sent_per_epoch > 0
    assert natural.efficiency < fast.efficiency < pgd.efficiency


def test_free_communicates_at_every_replay():
    cluster = Cluster(Link(1e9))
    once, eight = (predict(work(0, steps_per_batch=m), cluster, 8) for m in (1, 8))
    assert eight.sent_per_epoch == 8 * once.sent_per_epoch == 8 * 100 * sent(22 * MB, 8)
    assert eight.run_s == pytest.approx(8 * once.run_s)
    assert eight.images_per_s == pytest.approx(once.images_per_s / 8)


def test_overlap_hides():
    cluster = Cluster(Link(5e9))
    hidden, plain = (predict(work(overlap=overlap), cluster, 4) for overlap in (True, False))
    assert plain.exposed_s == pytest.approx(plain.all_reduce_s)
    assert Link(5e9).ring(2 * MB, 4) <= hidden.exposed_s < plain.exposed_s


def test_the_largest_share_sets_the_pace():
    assert predict(work(), Cluster(Link(1e9)), 3).local_batch == 43


def test_weak_scaling_grows_batch_and_rate():
    row = predict(work(weak=True), Cluster(Link(math.inf)), 4)
    assert (row.global_batch, row.local_batch, row.lr) == (512, 128, 0.8)
    assert row.efficiency == pytest.approx(1)
    assert row.epoch_s == pytest.approx(25 * row.step_s)


def test_max_steps_ends_the_run_at_a_batch():
    row = predict(work(max_steps=10, steps_per_batch=4), Cluster(Link(math.inf)), 1)
    assert row.run_s == pytest.approx(12 * row.step_s)


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet50"])
def test_gradients_are_the_networks_parameters_in_fp32(name: str):
    settings = parse_config({"method": {"name": "fast"}, "model": {"name": name}}, "test")
    model = build_model(settings.model, [0.5] * 3, [0.5] * 3, ["?"] * 10, 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(gradient_buckets(blank_network(settings, CIFAR))) == 4 * parameters


def test_gradients_of_1000_classes():
    """ResNet50 of ImageNet has 25,557,032 parameters (torchvision's resnet50)."""
    tree = {"method": {"name": "fast"}, "model": {"name": "resnet50", "stem": "imagenet"}}
    settings = parse_config(tree, "test")
    network = blank_network(settings, Images(1_281_167, 3, (224, 224), 1000))
    assert sum(gradient_buckets(network)) == 4 * 25_557_032


# Records of step times.


def record(path: Path, *whats: str) -> Path:
    """As `gpu_suite.py` writes it."""
    rows = [{"what": what, "step_ms": 10.0 + k} for k, what in enumerate(whats)]
    about = {"hardware": "GPU", "network": "preact_resnet18, 4, batch, 32x32"}
    path.write_text(json.dumps(about | {"rows": rows}))
    return path


def test_a_record_gives_the_case_that_is_planned(tmp_path: Path):
    path = record(
        tmp_path / "b.json",
        "Free m=4, bf16, batch 128, compile none",
        "Free m=4, bf16, batch 512, compile none",
        "Free m=4, bf16, batch 128, compile max",
        "Free m=4, fp32, batch 128, compile none",
        "Fast, bf16, batch 128, compile none",
        "Fast 512 max",
        "A method of two words, bf16, batch 64, compile none",
    )
    other = {"name": "natural"}
    with pytest.raises(UserError, match="it has A method of two words bf16 none, Fast bf16 none"):
        read_step_times(path, config(other), CIFAR)
    free = {"name": "free", "replays": 8}  # of whose replays each is a step
    points, about = read_step_times(path, config(free), CIFAR)
    assert points == {128: 0.010, 512: 0.011}
    assert (about["hardware"], about["precision"]) == ("GPU", "bf16")
    assert read_step_times(path, config(free, compile="max"), CIFAR)[0] == {128: 0.012}
    assert read_step_times(path, config(free, precision="fp32"), CIFAR)[0] == {128: 0.013}


def test_a_record_is_with_awp_or_without(tmp_path: Path):
    """A step with it is as much longer as a second pass of training is."""
    bare = config({"name": "fast"})
    awp = parse_config({**bare.model_dump(), "awp": {"gamma": 0.01}}, "test")
    path = record(tmp_path / "b.json", "Fast, bf16, batch 128, compile none")
    with pytest.raises(UserError, match=r"has no Fast with AWP .* it has Fast bf16 none"):
        read_step_times(path, awp, CIFAR)
    kept = plan_record(awp, CIFAR, {128: 0.1}, {"precision": "bf16"}, [])
    path.write_text(json.dumps(kept))
    assert read_step_times(path, awp, CIFAR)[0] == {128: 0.1}
    with pytest.raises(UserError, match="it has Fast with AWP bf16 none"):
        read_step_times(path, bare, CIFAR)


def test_a_record_is_of_one_kind_of_network(tmp_path: Path):
    """One from before there was a choice of shortcuts is of the activated one."""
    path = record(tmp_path / "b.json", "Fast, bf16, batch 128, compile none")
    other = config({"name": "fast"}, {"shortcut": "raw", "final_norm": False})
    with pytest.raises(UserError, match=r"not with .* 4, batch, raw, no_final_norm, 32x32"):
        read_step_times(path, other, CIFAR)


@pytest.mark.parametrize(
    ("method", "images", "says"),
    [
        ({"name": "pgd", "steps": 7}, CIFAR, "has no PGD-7 .* it has Fast bf16 none"),
        (
            {"name": "fast"},
            replace(CIFAR, size=(64, 64)),
            "was measured with .*32x32, not with .*64x64",
        ),
    ],
)
def test_a_record_of_something_else(method: dict, images: Images, says: str, tmp_path: Path):
    path = record(tmp_path / "b.json", "Fast, bf16, batch 128, compile none")
    with pytest.raises(UserError, match=says):
        read_step_times(path, config(method), images)
