"""Somebody's own code in a configuration: what is refused, and how it is said."""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cases import config as case
from dist_adv import plugins
from dist_adv.attacks.threat import Linf
from dist_adv.bench.timing import network
from dist_adv.config import Config, parse_config
from dist_adv.config.schema import EvalOptions
from dist_adv.data import Dataset, load_dataset
from dist_adv.errors import RankFailure, UserError
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.methods.cost import cost_of
from dist_adv.methods.registry import find_method
from dist_adv.plan.measure import count_images, measure_steps
from dist_adv.runs.folder import RunFolder
from dist_adv.training.learner import Learner
from dist_adv.training.run import train_run

Write = Callable[[str], str]

METHOD = """
import dist_adv
class Options(dist_adv.MethodOptions):
    alpha: float = 0.1
class Mine(dist_adv.Method[Options]):
    def steps(self, net, batch, threat):
        {steps}
"""
NETWORK = """
import dist_adv, torch
class Net(torch.nn.Module):
    class Options(dist_adv.ModelOptions):
        width: int = 3
    def __init__(self, options, channels, classes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        {forward}
"""
DATA = """
import dist_adv, torch
class Data:
    Options = dist_adv.DataOptions
    def __init__(self, options): pass
    def load(self, split):
        {load}
"""
ATTACK = """
import dist_adv, torch
class Attack:
    class Options(dist_adv.AttackOptions):
        tries: int = 1
    def __init__(self, options, threat): pass
    def __call__(self, model, x, y, keys):
        {attack}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write(text)` makes a module that nobody has imported, and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_FOUND", {})

    def write(text: str) -> str:
        name = f"mine{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def config(method: str = "natural", **sections: object) -> Config:
    return parse_config({"method": {"name": method}, **sections}, "test")


@pytest.mark.parametrize(
    ("text", "what", "said"),
    [
        ("import absent", "Mine", r"line 1: ModuleNotFoundError: No module named 'absent'"),
        ("x = 1\ny = (", "Mine", r"\.py, line 2: "),
        ("x = 1 / 0", "Mine", r"line 1: ZeroDivisionError: division by zero"),
        ("x = 1", "Mine", "has no attribute 'Mine'"),
        ("x = 1", "x", "is no method; write class Mine"),
        ("class Mine: pass", "Mine", "is no method"),
        (
            "import dist_adv\nclass Mine(dist_adv.Method):\n    def steps(self, *_): yield",
            "Mine",
            "has no options; give it an attribute Options, a class of dist_adv.MethodOptions",
        ),
    ],
)
def test_a_reference_that_leads_nowhere(text: str, what: str, said: str, write: Write) -> None:
    with pytest.raises(UserError, match=rf"test: method\.name: 'mine\d+:{what}' .*{said}") as error:
        config(f"{write(text)}:{what}")
    assert "\n" not in str(error.value)


def test_a_module_that_is_not_there(write: Write) -> None:
    with pytest.raises(
        UserError, match=r"'absent:Mine' cannot be imported .ModuleNotFoundError: No module named"
    ):
        config("absent:Mine")


def test_options_are_as_strict_as_elsewhere(write: Write) -> None:
    name = f"{write(METHOD.format(steps='yield'))}:Mine"
    assert parse_config({"method": {"name": name, "alpha": 0.2}}, "test").method.alpha == 0.2
    for options, said in (
        ({"alhpa": 1.0}, r"method\.alhpa: unknown key; did you mean 'alpha'"),
        ({"alpha": "x"}, r"method\.alpha: input should be a valid number"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config({"method": {"name": name, **options}}, "test")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("return [1]", "steps is no generator"),
        ("yield 1", "yields no function; yield one that returns a Step"),
        ("yield lambda: 3", r"returns int; return a Step\(loss, logits\)"),
        ("yield from [self.minimise(net, batch.x, batch.y)] * 2", "yields more than the 1 obj"),
        ("yield from ()", r"yields 0 and not the 1 objective\(s\) that steps_per_batch says"),
        (
            "yield lambda: dist_adv.Step(net(batch.x).sum(1), net(batch.x))",
            r"has a loss of shape \(2,\); take the mean",
        ),
        (
            "yield lambda: dist_adv.Step(net(batch.x).mean(), net(batch.x)[:1])",
            r"has logits of shape \(1, 10\); give those of this batch, \(2, 10\)",
        ),
        (
            "yield lambda: dist_adv.Step(net(batch.x).detach().mean(), net(batch.x))",
            "has a loss without a gradient",
        ),
        ("raise ValueError('made up')", "fails on two images: .*line 7: ValueError: made up"),
    ],
)
def test_what_a_method_may_not_yield(steps: str, said: str, write: Write) -> None:
    """Its file and line are named, before anything is written."""
    name = write(METHOD.format(steps=steps))
    options = config(f"{name}:Mine").method
    with pytest.raises(UserError, match=rf"method\.name: {name}:Mine.*{said}") as error:
        cost_of(options, Linf(0.1))
    assert f"{name}.py, line " in str(error.value)
    assert "\n" not in str(error.value)


DOUBLE = """
        near = batch.x.requires_grad_()
        loss = net(near).logsumexp(1).mean()
        gradient, = __import__('torch').autograd.grad(loss, near, create_graph=True)
        yield lambda: dist_adv.Step(gradient.square().sum() + loss, net(batch.x))
"""
KEPT = """
        near = batch.x.requires_grad_()
        logits = net(near)
        loss = logits.logsumexp(1).mean()
        gradient, = __import__('torch').autograd.grad(loss, near, retain_graph=True)
        yield lambda: dist_adv.Step(logits.square().mean(), net(batch.x + gradient.sign()))
"""
AVERAGED = """
        soft = net.averaged(batch.x).softmax(1)
        yield self.minimise(net, batch.x, soft)
"""


@pytest.mark.parametrize(
    ("steps", "need"),
    [(DOUBLE, "double backward"), (KEPT, "kept graph"), (AVERAGED, "average")],
)
def test_what_a_method_needs_it_says(steps: str, need: str, write: Write) -> None:
    """Found out by running it; else some runs would end in errors of others, or be wrong."""
    text = METHOD.format(steps=steps)
    options = config(f"{write(text)}:Mine").method
    with pytest.raises(UserError, match=rf"mine\d+:Mine must say what it needs: needs = .'{need}'"):
        cost_of(options, Linf(0.1))
    declared = text.replace("Options]):", f"Options]):\n    needs = frozenset({{'{need}'}})")
    name = f"{write(declared)}:Mine"
    if need == "average":
        with pytest.raises(UserError, match=r"average: .* needs averaged weights; set average"):
            config(name)
    made = config(name, average={"epochs": 1})
    assert cost_of(made.method, Linf(0.1)).steps == 1


def test_a_broken_package_stops_nobody_else(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write("import absent")
    point = EntryPoint("broken", f"{name}:Mine", "dist_adv.methods")
    monkeypatch.setattr(plugins, "installed", lambda group: {"broken": point})
    assert find_method("fast").title == "Fast"
    with pytest.raises(ValueError, match="'fats' is not known; did you mean 'fast'"):
        find_method("fats")
    with pytest.raises(ValueError, match=r"'broken' cannot be imported .*No module named 'absent'"):
        find_method("broken")
    with pytest.raises(ValueError, match=r"choose from .*, broken"):
        find_method("xyz")


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("return x", r"returns \(2, 1, 8, 8\) for 2 images of 10 classes; return logits of shape"),
        (
            "return self.absent(x)",
            r"fails on images of shape \(2, 1, 8, 8\): .*mine0.py, line 10: .*absent",
        ),
        (
            "return (x, x) if self.training else x.new_zeros(2, 10)",
            r"returns tuple in train mode for 2 images of 10 classes",
        ),
    ],
)
def test_a_network_that_does_not_fit(
    forward: str, said: str, write: Write, accelerator: Accelerator, digits: Dataset
) -> None:
    name = write(NETWORK.format(forward=forward))
    with pytest.raises(UserError, match=rf"model\.name: {name}:Net {said}"):
        Learner(config(model={"name": f"{name}:Net"}), accelerator, digits)


def test_memory_is_no_fault_of_a_network(write: Write, images: Path, tmp_path: Path) -> None:
    tree = case("natural", "batch", images, small=True)
    tree["model"] = {"name": f"{write(NETWORK.format(forward='raise MemoryError'))}:Net"}
    with pytest.raises(
        RankFailure, match=r"^rank 0 of 1 has no memory left .*train\.batch_size=16"
    ):
        train_run(parse_config(tree, "large"), tmp_path / "run", "none")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("return torch.zeros(2, 3), [0, 1], 'ab'", r"images are torch.float32|images are torch"),
        ("return torch.full((2, 1, 4, 4), 7.0), [0, 1], 'ab'", r"must be in \[0, 1\]"),
        ("return torch.zeros(2, 1, 4, 4), [0, 2], 'ab'", "labels go from 0 to 2 and there are 2"),
        ("return torch.zeros(2, 1, 4, 4), [0], 'ab'", r"labels are torch.int64 \(1,\)"),
        ("return torch.zeros(2, 1, 4, 4), [0.9, 0.1], 'ab'", r"labels are torch.float32 \(2,\)"),
        ("return 3", "cannot be loaded: "),
    ],
)
def test_data_that_are_none(load: str, said: str, write: Write) -> None:
    options = config(data={"name": f"{write(DATA.format(load=load))}:Data"}).data
    with pytest.raises(UserError, match=said):
        load_dataset(options, "train")


def test_names_of_classes_may_be_numbers(write: Write) -> None:
    load = "return torch.zeros(2, 1, 4, 4), [0, 1], range(2)"
    options = config(data={"name": f"{write(DATA.format(load=load))}:Data"}).data
    assert load_dataset(options, "train").classes == ["0", "1"]


def test_images_that_are_no_squares_are_planned_as_they_are(
    write: Write, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are timed, and a network is made, for images of that height and width."""
    load = "return torch.zeros(8, 1, 12, 20), [0, 1] * 4, 'ab'"
    asked = config(
        data={"name": f"{write(DATA.format(load=load))}:Data"},
        model={"name": "preact_resnet18", "width": 4},
    )
    images, seen, learn = count_images(asked.data), set(), Learner.learn
    monkeypatch.setattr(
        Learner, "learn", lambda self, b, meter: seen.add(b.x.shape[1:]) or learn(self, b, meter)
    )
    measure_steps(asked, images, [2, 4], accelerator, rounds=1)
    assert seen == {(1, 12, 20)}
    assert network(asked.model, images.size) == "preact_resnet18, 4, batch, 20x12"


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("return None", "returns NoneType, not images"),
        ("return x[:1]", r"returns \(1, 1, 8, 8\), not images"),
        ("return x.absent", "fails: .*mine0.py, line 8: .*absent"),
    ],
)
def test_an_attack_that_is_none(
    attack: str, said: str, write: Write, digits: Dataset, digits_net: torch.nn.Module
) -> None:
    options = EvalOptions(attacks=[f"{write(ATTACK.format(attack=attack))}:Attack"], limit=9)
    with pytest.raises(UserError, match=rf"eval\.attacks: mine\d+:Attack {said}"):
        evaluate(digits_net, digits, Linf(0.1), options, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("attack", "eps", "flag"),
    [
        # As FGSM of the same images would be: what it found outside does not count.
        ("return 1 - x", 0.0, "its images left the ball or [0, 1] and were projected"),
        ("return x.neg_().add_(1)", 0.0, "its images left the ball or [0, 1] and were projected"),
        # As of an attack that divides by the norm of a gradient, which is 0 at times.
        (
            "return x / (y > 4).view(-1, 1, 1, 1)",
            0.1,
            "some of its images were not finite; they count as they were",
        ),
    ],
)
def test_images_that_do_not_count(
    attack: str,
    eps: float,
    flag: str,
    write: Write,
    digits: Dataset,
    digits_net: torch.nn.Module,
) -> None:
    name = f"{write(ATTACK.format(attack=attack))}:Attack"
    options = EvalOptions(attacks=["natural", name], limit=50)
    (natural, own), _ = evaluate(digits_net, digits, Linf(eps), options, Accelerator(cpu=True))
    assert own.correct == natural.correct
    assert own.flags == [flag]


def test_any_name_and_options_of_any_names(
    write: Write, digits: Dataset, digits_net: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of which are taken for PGD's, or for the figure's own."""
    attack = ATTACK.replace("tries: int", "n: int").format(attack="return x")
    point = EntryPoint("pgdmine", f"{write(attack)}:Attack", "dist_adv.attacks")
    monkeypatch.setattr(plugins, "installed", lambda group: {"pgdmine": point})
    options = EvalOptions(
        attacks=["fgsm", "pgd-2", "pgdmine"], attack_options={"pgdmine": {"n": 3}}, limit=50
    )
    (*_, own), _ = evaluate(digits_net, digits, Linf(0.1), options, Accelerator(cpu=True))
    assert own.record()["n"] == 50
    assert own.record()["options"] == {"n": 3}


def test_options_of_attacks(write: Write) -> None:
    name = f"{write(ATTACK.format(attack='return x'))}:Attack"
    chosen = {"attacks": [name], "attack_options": {name: {"tries": 3}}}
    assert config(eval=chosen).eval.attack_options == {name: {"tries": 3}}
    chosen["attack_options"] = {name: {"trise": 3}}
    with pytest.raises(UserError, match="trise: unknown option; did you mean 'tries'"):
        config(eval=chosen)


def test_schedules(write: Write) -> None:
    name = write("def falling(done): return 1 - done\nconstant = 3")
    assert config(optim={"schedule": f"{name}:falling"}).sources().keys() == {f"{name}:falling"}
    with pytest.raises(UserError, match=r"optim\.schedule: .* is no function"):
        config(optim={"schedule": f"{name}:constant"})
    other = write("def word(done): return 'fast'\ndef endless(done): return float('inf')")
    for function, said in (("word", "is no function, or fails"), ("endless", "gives inf at the")):
        with pytest.raises(UserError, match=rf"optim\.schedule: .*{said}"):
            config(optim={"schedule": f"{other}:{function}"})


LATE = """
import dist_adv
class Options(dist_adv.MethodOptions): pass
class Mine(dist_adv.Method[Options]):
    def steps(self, net, batch, threat):
        if batch.when.epoch == 1:
            raise {error}
        yield self.minimise(net, batch.x, batch.y)
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ValueError('made up')", r"^rank 0 of 1: .*mine0\.py, line 7: ValueError: made up$"),
        ("MemoryError", "has no memory left"),
    ],
)
def test_what_fails_later_is_a_line_too(
    error: str, said: str, write: Write, images: Path, tmp_path: Path
) -> None:
    """With its file; the memory of the device is what it is for any method."""
    tree = case("natural", "batch", images, small=True)
    tree["method"] = {"name": f"{write(LATE.format(error=error))}:Mine"}
    with pytest.raises(RankFailure, match=said):
        train_run(parse_config(tree, "late"), tmp_path / "run", "none")
    assert RunFolder(tmp_path / "run").state == "failed"


def test_sources_follow_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    text = METHOD.format(steps="yield")
    name = f"{write(text)}:Mine"
    before = config(name).sources()
    monkeypatch.setattr(plugins, "_FOUND", {})
    file = Path(sys.modules[name.split(":")[0]].__file__ or "")
    file.write_text(text + "#")
    assert config(name).sources() != before
    assert config("fast").sources() == {}


def test_hidden_files_are_no_source(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editor's lock, which leads nowhere, and a notebook's copy."""
    package = tmp_path / "of_mine"
    (package / ".ipynb_checkpoints").mkdir(parents=True)
    (package / "__init__.py").write_text(METHOD.format(steps="yield"))
    monkeypatch.setitem(sys.modules, "of_mine", None)
    del sys.modules["of_mine"]
    before = config("of_mine:Mine").sources()
    monkeypatch.setattr(plugins, "_FOUND", {})
    (package / ".#m.py").symlink_to("me@host.1:2")
    (package / ".ipynb_checkpoints" / "m-checkpoint.py").write_text("x = 1")
    assert config("of_mine:Mine").sources() == before
