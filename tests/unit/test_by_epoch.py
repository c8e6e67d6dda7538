"""Values that change from epoch to epoch: how they are written, kept, and what refuses them."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from dist_adv.by_epoch import at_the_end
from dist_adv.config import Config, load_config, parse_config, training_differences
from dist_adv.data import Dataset, Loader, load_dataset
from dist_adv.errors import UserError
from dist_adv.plan.measure import Images, cost, measure_steps, works_of
from dist_adv.plan.model import Cluster, Link, StepTime, predict, total
from dist_adv.runs.reading import read_config
from dist_adv.training.learner import Learner
from dist_adv.training.run import train_run
from dist_adv.training.schedule import lr_at
from dist_adv.training.stages import Stages

TREE = {
    "method": {"name": "pgd", "steps": {0: 1, 2: 3}},
    "threat": {"eps": {0: "2/255", 1: "4/255"}},
    "data": {"name": "imagefolder", "size": {0: 16, 2: 32}},
    "train": {"epochs": 4, "batch_size": {0: 64, 1: 32}},
}


def parsed(**sections: dict) -> Config:
    tree = {name: {**section, **sections.get(name, {})} for name, section in TREE.items()}
    return parse_config(tree | {k: v for k, v in sections.items() if k not in tree}, "x")


def test_each_epoch_has_its_values_and_the_configuration_the_last():
    config = parsed()
    at = {
        first: (each.data.size, each.train.batch_size, each.threat.eps, each.method.steps)
        for first, each in config.stages.items()
    }
    assert at == {
        0: (16, 64, 2 / 255, 1),
        1: (16, 32, 4 / 255, 1),
        2: (32, 32, 4 / 255, 3),
    }
    assert (config.data.size, config.method.steps) == (32, 3)
    assert config.stages[2] == parse_config(at_the_end(TREE), "x")
    plain = parse_config({"method": {"name": "fast"}}, "x")
    assert plain.stages == {0: plain}


def test_what_is_written_reads_back_to_the_same(tmp_path):
    config, path = parsed(), tmp_path / "config.yaml"
    path.write_text(config.dump())
    assert load_config(path) == config
    # A checkpoint has it as JSON, in which keys are text.
    assert parse_config(json.loads(json.dumps(config.model_dump())), "x") == config
    # What reads runs for reports knows the last value.
    assert read_config(tmp_path)["train"]["batch_size"] == 32
    assert read_config(tmp_path)["threat"]["eps"] == 4 / 255


def test_values_by_epoch_replace_those_of_a_base(tmp_path):
    (tmp_path / "base.yaml").write_text(parsed().dump())
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ndata: {size: {0: 8, 3: 24}}\n")
    stages = load_config(tmp_path / "top.yaml").stages
    assert {first: each.data.size for first, each in stages.items()} == {0: 8, 1: 8, 2: 8, 3: 24}
    one = load_config(tmp_path / "top.yaml", ["data.size=20"]).stages
    assert {each.data.size for each in one.values()} == {20}


def test_whatever_is_given_takes_the_place_of_epochs(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(parsed(optim={"schedule": "linear", "points": {0: 1, 2: 0.5, 4: 0}}).dump())
    for points in ({0: 1, 1.5: 0}, {0.5: 1}):
        assert load_config(path, [f"optim.points={points}"]).optim.points == points
    assert load_config(path, ["optim.schedule=cosine", "optim.points={}"]).optim.points == {}
    with pytest.raises(UserError, match=r"data\.size: \{\} is not by epoch"):
        load_config(path, ["data.size={}"])


def test_a_run_goes_on_with_none_of_it_changed():
    other = parsed(data={"size": {0: 16, 2: 24}})
    assert training_differences(parsed(), other) == ["data.size.2: 32 -> 24"]
    assert training_differences(parsed(), parsed(train={"epochs": 5})) == []
    lines = [parsed(optim={"schedule": "linear", "points": {0: 1, 4: end}}) for end in (0, 0.5)]
    assert training_differences(*lines) == ["optim.points.4.0: 0.0 -> 0.5"]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": {"size": {1: 16}}}, "data.size: say what it is at first: data.size={0: ..., 1"),
        ({"data": {"size": {0: 16, 1.5: 24}}}, "{0: 16, 1.5: 24} is not by epoch, a whole number"),
        ({"data": {"size": {-1: 16}}}, "data.size: {-1: 16} is not by epoch, a whole number"),
        (
            {"optim": {"schedule": "linear", "points": {0: 1, 9: 0}}},
            "optim.points: goes to epoch 9 and train.epochs is 4",
        ),
        ({"train": {"epochs": 2}}, "changes in epoch 2, counted from 0, and train.epochs is 2"),
        ({"threat": {"eps": {0: 8, 1: "4/255"}}}, "in epoch 0: threat.eps: 8 is too large"),
        ({"data": {"size": {0: 16, 2: 32}, "shorter": {0: 12, 1: 32}}}, "in epoch 0: data.shorter"),
        ({"optim": {"lr": {0: 1}}}, "optim.lr: input should be a valid number"),
        ({"optim": {"schedule": "linear"}}, "points: missing, and the schedule is linear"),
        ({"optim": {"points": {0: 1}}}, "optim.points: are of linear, and the schedule is cyclic"),
    ],
)
def test_what_makes_no_sense_is_one_line(sections, line):
    with pytest.raises(UserError) as error:
        parsed(**sections)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_and_epochs_of_stages():
    noise = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
    data = Dataset("noise", noise, torch.zeros(100).long(), ["a", "b"], 0, False)
    stages = Stages(parsed().stages, data, ranks=1)
    assert [stages.at(epoch).batches for epoch in range(5)] == [2, 4, 4, 4, 4]
    assert [stages.batches_until(epochs) for epochs in (0, 0.5, 1, 1.5, 4)] == [0, 1, 2, 4, 14]
    for epoch, each in enumerate([2, 4, 4, 4]):
        for batch in range(each):
            number = stages.batches_until(epoch) + batch
            assert stages.epochs_after(number) == pytest.approx(epoch + batch / each)
    two = parsed(train={"batch_size": {0: 64, 3: 20}}).stages
    longer = Stages({0: two[0], 3: two[3]}, data, ranks=1)
    assert longer.batches_until(4) == 3 * 2 + 5
    assert [longer.epochs_after(batches) for batches in (5, 6, 11)] == [2.5, 3, 4]
    with pytest.raises(UserError, match="the last batch has 4 images for 8 ranks"):
        Stages(parsed().stages, data, ranks=8)


def test_a_linear_rate_goes_from_point_to_point():
    points = {0.0: 0.0, 5: 1, 15: 0.1}
    rates = [lr_at("linear", 0.4, 0, 1, points=points, epoch=at) for at in (0, 2.5, 5, 10, 15, 20)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.22, 0.04, 0.04])


def config_of(images: Path, **sections: dict) -> Config:
    tree = {
        "method": {"name": "free", "replays": 2},
        "model": {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 8},
        "data": {"name": "imagefolder", "root": str(images)},
        "train": {"epochs": 2, "batch_size": 40, "precision": "fp32", "threads": 1},
        "eval": {"attacks": ["natural"], "every": 0},
        "track": {"wandb": {"mode": "disabled"}},
    }
    for name, section in sections.items():
        tree[name] = section if name == "method" else tree.get(name, {}) | section
    return parse_config(tree, "x")


def test_perturbations_of_batches_of_another_size_start_at_zero(images, tmp_path):
    """Free's first batch of such an epoch is natural training's; its next one is not."""
    still = {"schedule": "constant", "lr": 1e-30, "weight_decay": 0}

    def losses(method: dict) -> list[float]:
        train = {"batch_size": {0: 40, 1: 30}, "log_every": 1}
        config, run = config_of(images, method=method, train=train, optim=still), method["name"]
        train_run(config, tmp_path / run, "none")
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    free, natural = losses({"name": "free", "replays": 1}), losses({"name": "natural"})
    same = [ours == theirs for ours, theirs in zip(free, natural, strict=True)]
    assert same == [True, False, False, True, False, False, False]


@pytest.mark.parametrize(("eps", "compared"), [({0: 0.01, 1: 0.1}, False), (0.1, True)])
def test_a_change_is_told_and_the_guard_compares_like_with_like(eps, compared, images, tmp_path):
    """Of the last epoch before nothing is left to compare with."""
    config = config_of(images, method={"name": "fast"}, threat={"eps": eps})
    train_run(config, tmp_path / "run", "none")
    told = "from epoch 2 on: threat.eps=0.1" in (tmp_path / "run" / "log.txt").read_text()
    assert told is not compared
    first, last = (
        json.loads((path / "state.json").read_text())["guard"]
        for path in sorted((tmp_path / "run" / "checkpoints").iterdir())
    )
    assert first is None
    assert (last is None) is not compared


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"method": {"name": "consistency", "start": "prior"}}, "consistency keeps perturbations"),
        ({"method": {"name": "consistency"}}, "consistency keeps perturbations from epoch to"),
    ],
)
def test_what_has_one_size_is_refused(images, tmp_path, sections, line):
    config = config_of(images, data={"size": {0: 6, 1: 8}}, **sections)
    with pytest.raises(UserError) as error:
        train_run(config, tmp_path / "run", "none")
    assert line in str(error.value)
    assert not (tmp_path / "run").exists()


def test_images_of_a_stage_are_those_of_its_size(images):
    """As they are where a run has no other: crops with borders, and boxes at random."""
    for more in ({}, {"crop_scale": [0.3, 1]}):
        changing = config_of(images, data={"size": {0: 6, 1: 8}, **more})
        whole = load_dataset(changing.data, "train", as_files=changing.resizes)
        for epoch, size in ((0, 6), (1, 8)):
            alone = load_dataset(config_of(images, data={"size": size, **more}).data, "train")
            framed = whole.framed(changing.stages[epoch].data)
            ours, theirs = (
                next(Loader(data, 32, 0, torch.device("cpu")).epoch(epoch)).x
                for data in (framed, alone)
            )
            assert ours.shape[-1] == size
            assert torch.equal(ours, theirs)


def test_a_plan_adds_up_the_stages():
    """Steps of as many passes, on images of as much area, as each stage has."""
    config, images = parsed(), Images(1000, 3, (32, 32), 10)
    step = StepTime(0.001, 0.002, cost(config))  # PGD-3 at 32 pixels, nine passes
    works = [work.timed(step) for work in works_of(config, images)]
    rows = [predict(work, Cluster(Link(math.inf)), 1) for work in works]
    assert [work.epochs for work in works] == [1, 1, 2]
    fixed, image = 5 / 9 * 0.001, 5 / 9 * 0.002  # PGD-1's
    expected = [
        16 * (fixed + 64 * image / 4),
        32 * (fixed + 32 * image / 4),
        2 * 32 * (0.001 + 32 * 0.002),
    ]
    assert [row.run_s for row in rows] == pytest.approx(expected)
    assert total(rows).run_s == pytest.approx(sum(expected))
    assert total(rows).gpu_hours == pytest.approx(sum(expected) / 3600)
    with pytest.raises(UserError, match=r"train\.max_steps"):
        works_of(parsed(train={"max_steps": 5}), images)


def test_steps_are_timed_as_they_are_in_the_last_epochs(images, accelerator, monkeypatch):
    """Of batches of the size that is said, and of images of the last one."""
    seen = Counter()
    learn = Learner.learn

    def counted(self, batch, meter):
        seen[tuple(batch.x.shape)] += 1
        learn(self, batch, meter)

    monkeypatch.setattr(Learner, "learn", counted)
    config = config_of(
        images,
        data={"size": {0: 4, 1: 8}, "drop_last": True},
        train={"batch_size": {0: 40, 1: 6}},
    )
    measure_steps(config, Images(120, 3, (8, 8), 3), [2, 6], accelerator, rounds=1)
    assert seen.keys() == {(2, 3, 8, 8), (6, 3, 8, 8)}
    # Of sizes that could be neither parted nor mixed.
    seen.clear()
    train = {"batch_size": 36, "accumulate": 6}
    config = config_of(images, method={"name": "pgd"}, data={"mixup": 0.8}, train=train)
    measure_steps(config, Images(120, 3, (8, 8), 3), [3, 6], accelerator, rounds=1)
    assert seen.keys() == {(3, 3, 8, 8), (6, 3, 8, 8)}


def test_a_run_records_what_changed_and_what_it_cost(images, tmp_path):
    steps = {"name": "pgd", "steps": {0: 1, 1: 3}, "alpha": 0.04}
    config = config_of(images, method=steps, data={"size": {0: 4, 1: 8}})
    train_run(config, tmp_path / "run", "none")
    about = json.loads((tmp_path / "run" / "env.json").read_text())
    assert about["by_epoch"] == {
        "0": "data.size=4, method.steps=1",
        "1": "data.size=8, method.steps=3",
    }
    assert about["method"]["passes"] == (5 / 4 + 9) / 2  # a mean of two epochs
